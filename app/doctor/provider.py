"""DashScope: whether it can be reached from here, and takes the key. Nothing is bought (PROTOCOL §1.1, §3)."""

import asyncio
import time
from collections.abc import Awaitable

from app.dashscope import WS_URLS, ConnectionPool, Credential, EnrollmentClient, SpeechClient
from app.doctor.case import DEFAULT_REGION, Case
from app.doctor.failures import explain_failure, name_host
from app.doctor.finding import Finding, fail, ok, skip, warn
from app.errors import AppError, ConnectionLost, InvalidApiKey, Throttled, UnclearAnswer, UpstreamTimeout

CHECK = "provider"
KEY = "api key"
CONNECT_SECONDS = 4.0
# Voices of this prefix are asked for: no account has any, so that the answer is short.
UNUSED_PREFIX = "doctor0"


async def examine_reach(case: Case) -> list[Finding]:
    """Ask each host for any HTTP answer at all, without a key and without a proxy, as the product does."""
    needed = case.region or DEFAULT_REGION
    regions = [needed] if case.region or case.api_key else list(WS_URLS)
    users_of: dict[str, str] = {}
    for region in regions:
        credential = case.credential(region)
        for url in (credential.ws_url.replace("ws", "http", 1), credential.http_url):
            users_of.setdefault(url, region)
    asking = (_reach(case, url, is_needed=region == needed) for url, region in users_of.items())
    return list(await asyncio.gather(*asking))


async def examine_key(case: Case) -> list[Finding]:
    """Have the key checked by the WebSocket handshake and by the list of voices: both are free."""
    if not case.api_key:
        return [skip(KEY, "none given", "Set DASHSCOPE_API_KEY, or use --api-key-stdin, to have one tried for free.")]
    credential = case.credential(case.region or DEFAULT_REGION)
    seconds = min(CONNECT_SECONDS, case.settings.handshake_seconds)
    pool = ConnectionPool(handshake_seconds=seconds)
    speech = SpeechClient(pool, _no_turn, 1, seconds)
    voices = EnrollmentClient(case.http, _no_wait)
    try:
        tries = (
            _try(credential, "the WebSocket handshake", speech.verify(credential)),
            _try(credential, "HTTP (list of voices)", voices.find(credential, UNUSED_PREFIX)),
        )
        return list(await asyncio.gather(*tries))
    finally:
        await pool.close()


async def _reach(case: Case, url: str, *, is_needed: bool) -> Finding:
    host = name_host(url)
    where = f"{host} ({'WebSocket' if url.endswith('/inference') else 'HTTP'})"
    asked_at = time.time()
    try:
        async with case.http.stream(case.http.build_request("GET", url)) as answer:
            case.clocks.read_header(host, answer, asked_at)
            status = answer.status_code
    except AppError as error:
        found, advice = explain_failure(error)
        if is_needed:
            return fail(CHECK, f"{where}: {found}", advice)
        return warn(CHECK, f"{where}: {found}", f"Matters only to keys of its region. {advice}")
    if status >= 500:
        return warn(CHECK, f"{where} has trouble: HTTP {status}", "Try again in some minutes.")
    return ok(CHECK, f"{where} can be reached, {(time.time() - asked_at) * 1000:.0f} ms")


async def _try(credential: Credential, by: str, asking: Awaitable[object]) -> Finding:
    where = f"of {credential.region}" + (", with a workspace" if credential.workspace else "")
    try:
        await asking
    except InvalidApiKey:
        advice = (
            "Check the key and --region: a key of Beijing is none in Singapore, and the other way round. A key of a "
            "workspace may need --workspace."
        )
        return fail(KEY, f"refused by {by} {where}", advice)
    except Throttled:
        return warn(KEY, f"throttled at {by}", "The account's rate is used up at the moment: try again.")
    except (ConnectionLost, UpstreamTimeout) as error:
        found, advice = explain_failure(error)
        return fail(KEY, f"could not be tried by {by}: {found}", advice)
    except UnclearAnswer:
        advice = "Check the address: something else than DashScope stands there, or in between."
        return fail(KEY, f"could not be tried by {by}: what answers does not speak as DashScope does", advice)
    except AppError as error:
        found = f"refused by {by} {where}: {error.message}"
        return fail(KEY, found, "Check workspace, rights and balance of the account in the console of DashScope.")
    return ok(KEY, f"accepted by {by} {where}")


async def _no_turn(_: Credential, __: str) -> None:
    """One call needs no turn."""


async def _no_wait(_: Credential) -> None:
    """One call needs no turn."""
