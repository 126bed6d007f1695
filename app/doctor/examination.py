"""All checks, side by side, each within its own time."""

import asyncio
from collections.abc import Awaitable, Callable

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from app.dashscope import HttpClient
from app.doctor.admins import examine_admins
from app.doctor.backlog import examine_jobs
from app.doctor.case import Case
from app.doctor.configuration import examine_machine, examine_settings
from app.doctor.database import (
    examine_address,
    examine_database,
    examine_migrations,
    find_missing_file,
    opened,
    read_revisions,
)
from app.doctor.disk import examine_data_folder, examine_held_audio
from app.doctor.finding import Finding, fail, skip
from app.doctor.limits_store import examine_redis
from app.doctor.objects import examine_storage
from app.doctor.provider import CONNECT_SECONDS, examine_key, examine_reach
from app.doctor.secrecy import examine_agreement, examine_sealed_keys, examine_secrets
from app.settings import Settings

LOCAL_SECONDS = 5.0
DATABASE_SECONDS = 6.0
SCHEMA_SECONDS = 8.0
ROWS_SECONDS = 2.5
REDIS_SECONDS = 9.0
STORAGE_SECONDS = 11.0
PROVIDER_SECONDS = 10.0
SILENCE_SECONDS = 4.0
ROW_CHECKS = (
    ("agreement", examine_agreement),
    ("sealed keys", examine_sealed_keys),
    ("admins", examine_admins),
    ("jobs", examine_jobs),
)
SCHEMA_CHECKS = ("migrations", *(check for check, _ in ROW_CHECKS))


async def examine(
    settings: Settings, *, api_key: str | None = None, region: str | None = None, workspace: str | None = None
) -> list[Finding]:
    """Examine an installation from here, within a quarter of a minute, and change nothing.

    The key, if there is one, is tried for free. Nothing is raised: what cannot be examined is a finding too.
    """
    http = HttpClient(
        handshake_seconds=min(CONNECT_SECONDS, settings.handshake_seconds), silence_seconds=SILENCE_SECONDS
    )
    case = Case(settings, http, api_key or None, region, workspace)
    try:
        groups = await asyncio.gather(
            _in_thread("settings", examine_settings, case),
            _in_thread("secrets", examine_secrets, case),
            _in_thread("data folder", examine_data_folder, case),
            _within(DATABASE_SECONDS + SCHEMA_SECONDS, "database", _examine_database(case)),
            _within(REDIS_SECONDS, "redis", examine_redis(case)),
            _within(STORAGE_SECONDS, "storage", examine_storage(case)),
            _in_thread("held audio", examine_held_audio, case),
            _within(PROVIDER_SECONDS, "provider", examine_reach(case)),
            _within(PROVIDER_SECONDS, "api key", examine_key(case)),
            _in_thread("proxies", examine_machine, case),
        )
    finally:
        await http.close()
    return [finding for group in groups for finding in group] + case.clocks.examine()


async def _within(seconds: float, check: str, examining: Awaitable[list[Finding]]) -> list[Finding]:
    """Give a check its time; whatever becomes of it is a finding."""
    try:
        async with asyncio.timeout(seconds):
            return await examining
    except TimeoutError:
        return [fail(check, f"no answer within {seconds:g} s", "See what keeps it: network, firewall or disk.")]
    except Exception as error:
        return [fail(check, f"could not be examined: {type(error).__name__}", "Look at the other findings first.")]


def _in_thread(check: str, examine_case: Callable[[Case], list[Finding]], case: Case) -> Awaitable[list[Finding]]:
    return _within(LOCAL_SECONDS, check, asyncio.to_thread(examine_case, case))


async def _examine_database(case: Case) -> list[Finding]:
    """The database first, then its schema, then what is in it."""
    url = case.settings.database_url
    unusable = examine_address(url) or await asyncio.to_thread(find_missing_file, url)
    if unusable:
        return [unusable, *_skipped(*SCHEMA_CHECKS, because="there is no database")]
    async with opened(url) as engine:
        findings = await _within(DATABASE_SECONDS, "database", examine_database(case, engine))
        if any(each.level == "fail" for each in findings):
            return findings + _skipped(*SCHEMA_CHECKS, because="the database is not well")
        return findings + await _within(SCHEMA_SECONDS, "migrations", _examine_schema(case, engine))


async def _examine_schema(case: Case, engine: AsyncEngine) -> list[Finding]:
    revision, head = await read_revisions(engine)
    findings = examine_migrations(case, revision, head)
    if revision != head:
        return findings + _skipped(*SCHEMA_CHECKS[1:], because="the schema is not that of this version")
    for check, examine_rows in ROW_CHECKS:
        findings += await _within(ROWS_SECONDS, check, _in_session(case, engine, examine_rows))
    return findings


async def _in_session(
    case: Case, engine: AsyncEngine, examine_rows: Callable[[Case, AsyncSession], Awaitable[list[Finding]]]
) -> list[Finding]:
    async with AsyncSession(engine) as session:
        return await examine_rows(case, session)


def _skipped(*checks: str, because: str) -> list[Finding]:
    return [skip(check, f"not looked at: {because}") for check in checks]
