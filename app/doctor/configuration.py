"""The settings themselves, and what of this machine they depend on."""

import difflib
import os
import resource
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import urlsplit

from pydantic import ValidationError
from pydantic_settings import DotEnvSettingsSource

from app.catalog import load_prices
from app.doctor.case import Case
from app.doctor.finding import Finding, fail, ok, warn
from app.settings import Settings

KEY_VARIABLE = "DASHSCOPE_API_KEY"
LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1", "0.0.0.0"}  # noqa: S104 - compared, not listened on
# How much two names have in common, 1 being all: an environment holds many names that are not ours.
LIKENESS_IN_FILE = 0.7
LIKENESS_IN_ENVIRONMENT = 0.88
MIN_OPEN_FILES = 4096
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def examine_settings(case: Case) -> list[Finding]:
    """What is set, and what of it would harm in production. It reads files."""
    settings = case.settings
    kinds = ("SQLite" if settings.uses_sqlite else "PostgreSQL", f"{settings.storage} storage")
    processes = f"{settings.workers} web process{'es' if settings.workers > 1 else ''}"
    findings = [ok("settings", f"{settings.environment}, {', '.join(kinds)}, {processes}")]
    findings += [warn("settings", found, advice) for found, advice in _risks(case)]
    try:
        load_prices(settings.prices_file)
    except (ValueError, OSError) as error:
        findings.append(fail("settings", f"PRICES_FILE cannot be used: {error}", "Correct the file, or unset it."))
    return findings + [
        warn("settings", f"{name} {where} is not a setting", f"Did you mean {meant}?")
        for name, where, meant in _misspelt()
    ]


def examine_machine(case: Case) -> list[Finding]:
    """Proxies and limits of the process."""
    set_proxies = [name for name in _PROXIES if os.environ.get(name) or os.environ.get(name.lower())]
    goes = "DashScope is called directly all the same, over WebSocket and HTTP; only OSS goes through the proxy"
    findings = [
        warn("proxies", f"{', '.join(set_proxies)} set: {goes}", "Let this machine reach DashScope without a proxy.")
        if set_proxies
        else ok("proxies", "none set")
    ]
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if open_files != resource.RLIM_INFINITY and open_files < MIN_OPEN_FILES:
        advice = f"Raise it to {MIN_OPEN_FILES} or more (`ulimit -n`, LimitNOFILE= of systemd, ulimits of compose)."
        findings.append(warn("open files", f"at most {open_files}: one for each client and connection", advice))
    else:
        count = "no limit" if open_files == resource.RLIM_INFINITY else f"at most {open_files}"
        findings.append(ok("open files", count))
    return findings


def find_misspelt(names: Iterable[str], likeness: float) -> Iterator[tuple[str, str]]:
    """Names that are no settings, each with the one that it is most like."""
    known = [name.upper() for name in Settings.model_fields]
    for name in map(str.upper, names):
        if name not in known and name != KEY_VARIABLE:
            for meant in difflib.get_close_matches(name, known, n=1, cutoff=likeness):
                yield name, meant


def _misspelt() -> Iterator[tuple[str, str, str]]:
    in_file: Mapping[str, object] = DotEnvSettingsSource(Settings).env_vars
    for name, meant in find_misspelt(in_file, LIKENESS_IN_FILE):
        yield name, "in .env", meant
    for name, meant in find_misspelt(os.environ.keys(), LIKENESS_IN_ENVIRONMENT):
        yield name, "of the environment", meant


def _risks(case: Case) -> Iterator[tuple[str, str]]:
    settings = case.settings
    if settings.environment == "development":
        for problem in _refused_in_production(settings):
            yield f"production would refuse: {problem}", "Mend it before you set ENVIRONMENT=production."
    looks_real = settings.environment == "production" or settings.storage == "oss" or not settings.uses_sqlite
    if looks_real and urlsplit(settings.public_base_url).hostname in LOCAL_HOSTS:
        yield (
            f"PUBLIC_BASE_URL is {settings.public_base_url}: only this machine can play audio from there",
            "Set it to the address that clients reach this backend under.",
        )
    if settings.environment == "production" and settings.login_tokens_in_urls:
        yield (
            "LOGIN_TOKENS_IN_URLS=true: access tokens may stand in URLs, and so in the logs of proxies",
            "Have frontends ask POST /api/auth/ticket for what stands in URLs, and unset it.",
        )
    if case.processes > 1 and not settings.redis_url:
        yield (
            "several processes without REDIS_URL: each counts the rate limits alone",
            "Set REDIS_URL, so that they keep one limit together and DashScope does not throttle.",
        )
    if not settings.background_jobs:
        yield (
            "BACKGROUND_JOBS=false: `serve` does no background jobs",
            "See that at least one `python -m app worker` runs.",
        )


def _refused_in_production(settings: Settings) -> list[str]:
    """What the settings' own rules would say."""
    try:
        Settings(**{**settings.model_dump(), "environment": "production"})
    except ValidationError as error:
        told = "; ".join(each["msg"] for each in error.errors())
        return told.removeprefix("Value error, ").removeprefix("unsafe in production: ").split("; ")
    return []
