"""What a check has found, in words for the operator."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `advice` says what to do where there is something to do."""

    check: str
    level: Level
    found: str
    advice: str = ""


def ok(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check, "ok", found)


def warn(check: str, found: str, advice: str) -> Finding:
    """The program runs, but something is not as it should be."""
    return Finding(check, "warn", found, advice)


def fail(check: str, found: str, advice: str) -> Finding:
    """The program does not run, or does not do its work."""
    return Finding(check, "fail", found, advice)


def skip(check: str, found: str, advice: str = "") -> Finding:
    """Nothing was looked at."""
    return Finding(check, "skip", found, advice)
