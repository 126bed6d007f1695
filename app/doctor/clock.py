"""How far this machine's clock is from those of the services that it works with."""

import time
from datetime import datetime
from email.utils import parsedate_to_datetime

import httpx

from app.doctor.finding import Finding, fail, ok, skip, warn

CHECK = "clock"
WARN_SECONDS = 5.0
FAIL_SECONDS = 300.0
_ADVICE = (
    "Set this machine's clock by NTP (or that of the other, whichever is wrong): login tokens, signed addresses and "
    "the claims on background jobs go by it."
)


class Clocks:
    """Readings of other clocks, each with the time that asking took."""

    def __init__(self) -> None:
        self._offsets: dict[str, tuple[float, float]] = {}
        self._strict: set[str] = set()

    def read(
        self, source: str, their_time: datetime, asked_at: float, *, grain_seconds: float = 0.0, strict: bool = False
    ) -> None:
        """Note what another clock said just now, asked at `asked_at` (`time.time()`), cut to a grain.

        One that is `strict` refuses us when our clock is wrong.
        """
        answered_at = time.time()
        offset = their_time.timestamp() + grain_seconds / 2 - (asked_at + answered_at) / 2
        self._offsets[source] = offset, (answered_at - asked_at + grain_seconds) / 2
        if strict:
            self._strict.add(source)

    def read_header(self, source: str, answer: httpx.Response, asked_at: float, *, strict: bool = False) -> None:
        """Note the `Date` of an HTTP answer, if it has one."""
        try:
            their_time = parsedate_to_datetime(answer.headers.get("Date", ""))
        except ValueError:
            return
        self.read(source, their_time, asked_at, grain_seconds=1.0, strict=strict)

    def examine(self) -> list[Finding]:
        """Say how far off this machine is; what asking took is not held against it."""
        if not self._offsets:
            return [skip(CHECK, "no other clock could be asked")]
        findings, agreeing = [], []
        for source, (offset, uncertainty) in sorted(self._offsets.items()):
            surely = max(0.0, abs(offset) - uncertainty)
            if surely <= WARN_SECONDS:
                agreeing.append(source)
                continue
            found = f"this machine is about {abs(offset):.0f} s {'behind' if offset > 0 else 'ahead of'} {source}"
            if surely > FAIL_SECONDS and source in self._strict:
                findings.append(fail(CHECK, found, f"OSS refuses requests that are 15 minutes off. {_ADVICE}"))
            else:
                findings.append(warn(CHECK, found, _ADVICE))
        if agreeing:
            findings.append(ok(CHECK, f"agrees with {', '.join(agreeing)}"))
        return findings
