"""A voice is made once and its record tells it: answers that are lost, orders that are repeated, clients that leave."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx
import pytest

from tests.cloning import (
    CREATE,
    FLASH,
    asked,
    clone,
    clone_file,
    fault,
    hurry,
    ids,
    item_with,
    look,
    made,
    no_more_than,
    path_of,
    removed,
    sample,
    sample_of,
    samples_of,
    struck,
)
from tests.conftest import PASSWORD, Account, CreateAccount
from tests.databases import rows
from tests.hearing import PATIENCE_SECONDS, data_of, refusal
from tests.servers import Sandbox, Server, run_backend

TIMEOUT_SECONDS = 2


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory, sandbox: Sandbox) -> Iterator[Server]:
    """A backend that waits only a moment for the provider."""
    settings = {**sandbox.settings, "UPSTREAM_TIMEOUT": str(TIMEOUT_SECONDS)}
    with run_backend(tmp_path_factory.mktemp("impatient"), settings) as running:
        yield running


class Outcome(NamedTuple):
    """What became of a create, as seen by the client, at the provider, and in the record."""

    status: int
    error: str | None
    voices: int
    creates: int
    ended: str
    tells_its_voice: bool


DONE = Outcome(200, None, 1, 1, "OK", True)
LATER = Outcome(504, "TIMEOUT", 1, 1, "OK", True)
NEVER = Outcome(504, "TIMEOUT", 0, 1, "failed", False)
BROKEN = Outcome(502, "UPSTREAM_ERROR", 0, 1, "failed", False)

TROUBLE: dict[str, tuple[dict[str, Any], Outcome]] = {
    "an answer that comes too late": ({"how": "delay", "seconds": 5}, DONE),
    "a voice that is made after the time-out": ({"how": "late", "seconds": 4}, DONE),
    "a voice that is made after our answer": ({"how": "late", "seconds": 11}, LATER),
    "silence": ({"how": "silent"}, NEVER),
    "a connection that breaks after the work": ({"how": "close_after"}, DONE),
    "a connection that breaks before the work": ({"how": "close"}, BROKEN),
    "500 with a code": ({"status": 500, "code": "InternalError"}, BROKEN),
    "502 with a code": ({"status": 502, "code": "ModelServingError"}, BROKEN),
    "503 with a code": ({"status": 503, "code": "ServiceUnavailable"}, BROKEN),
    "502 with garbage": ({"status": 502, "body": "<html>Bad Gateway</html>"}, BROKEN),
    "503 with nothing": ({"status": 503, "body": ""}, BROKEN),
    "200 with garbage": ({"status": 200, "body": "<html>"}, BROKEN),
    "200 without a voice": ({"status": 200, "body": '{"output": {}}'}, BROKEN),
    "a work space that is gone": ({"status": 404, "code": "WorkSpaceNotFound"}, BROKEN),
    # The last, because it is asked again, and that must not take the trouble of another.
    "throttling for a moment": ({"status": 429, "code": "Throttling.RateQuota"}, DONE._replace(creates=2)),
}  # fmt: skip


def age(server: Server, record_id: int) -> None:
    """Let so much time pass that a lost voice is looked for no more."""
    rows(server, "UPDATE enrollments SET lost_at = '2026-01-01 00:00:00.000000' WHERE record_id = ?", record_id)
    hurry(server, record_id)


async def begin(
    sandbox: Sandbox, account: Account, trouble: dict[str, Any], audio: bytes | None = None
) -> "asyncio.Task[httpx.Response]":
    """Ask for a voice, and have the trouble strike this order only."""
    with sandbox.faults(**fault("create_voice", count=1, **trouble)):
        asking = asyncio.create_task(clone_file(account, audio))
        await struck(sandbox, account, "create_voice")
    return asking


async def outcome(sandbox: Sandbox, server: Server, account: Account, answer: httpx.Response, comes: bool) -> Outcome:
    """What became of an account's only create, once its voice has come or is given up."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while comes and not sandbox.voices(account.api_key):
            await asyncio.sleep(0.1)
    [item] = (await account.history())["items"]
    if not comes and item["status"] == "running":
        assert sample_of(server, account) is not None
        age(server, item["id"])
    item = await item_with(account, "OK" if comes else "failed")
    assert item["bill"] == "0"
    voices = [voice["voice_id"] for voice in sandbox.voices(account.api_key)]
    return Outcome(
        answer.status_code,
        answer.json().get("error"),
        len(voices),
        len(asked(sandbox, account, "create_voice")),
        item["status"],
        [item.get("voice_id")] == voices,
    )


@dataclass
class Aftermath:
    """Whom trouble met, how he was answered, and what became of it in the end."""

    account: Account
    answer: httpx.Response
    outcome: Outcome


@pytest.fixture(scope="module")
async def aftermath(impatient: Server, sandbox: Sandbox) -> AsyncIterator[dict[str, Aftermath]]:
    """All trouble at once, because each takes its time."""
    async with AsyncExitStack() as clients:
        accounts = {name: await register(impatient, clients) for name in TROUBLE}
        asking = {name: await begin(sandbox, accounts[name], trouble) for name, (trouble, _) in TROUBLE.items()}
        answers = dict(zip(asking, await asyncio.gather(*asking.values()), strict=True))
        waiting = [
            outcome(sandbox, impatient, accounts[name], answer, comes=TROUBLE[name][1].voices > 0)
            for name, answer in answers.items()
        ]
        outcomes = dict(zip(answers, await asyncio.gather(*waiting), strict=True))
        yield {name: Aftermath(accounts[name], answers[name], outcomes[name]) for name in TROUBLE}


async def register(server: Server, clients: AsyncExitStack) -> Account:
    """A new user with a key, for longer than one test."""
    client = await clients.enter_async_context(httpx.AsyncClient(base_url=server.url, timeout=30, trust_env=False))
    login = {"username": f"user-{uuid.uuid4().hex}", "password": PASSWORD}
    user_id = data_of(await client.post("/api/auth/register", json=login))["user_id"]
    token = data_of(await client.post("/api/auth/login", json=login))["access_token"]
    client.headers["Authorization"] = f"Bearer {token}"
    key = f"sk-test-{uuid.uuid4().hex[:20]}"
    data_of(await client.put("/api/user/apikey", json={"api_key": key}))
    return Account(client, login["username"], user_id, key)


async def test_whatever_goes_wrong_there_is_one_voice_or_none_and_the_record_tells(
    aftermath: dict[str, Aftermath], impatient: Server
) -> None:
    assert {name: each.outcome for name, each in aftermath.items()} == {
        name: expected for name, (_, expected) in TROUBLE.items()
    }
    for each in aftermath.values():
        if each.answer.status_code == 200:
            assert each.answer.json()["data"].keys() == {"voice_id", "status", "target_model", "record_id"}
        else:
            assert any("一" <= letter <= "鿿" for letter in each.answer.json()["message"])
    assert "Traceback" not in impatient.log


async def test_the_sample_stays_with_the_voice_and_goes_where_there_is_none(
    aftermath: dict[str, Aftermath], impatient: Server
) -> None:
    deleting = aftermath["a connection that breaks after the work"].account  # which has what is due removed at once
    data_of(await deleting.client.delete(path_of((await ids(deleting))[0])))
    for each in aftermath.values():
        async with asyncio.timeout(PATIENCE_SECONDS):
            is_kept = each.outcome.voices > 0 and each.account is not deleting
            while (sample_of(impatient, each.account) is not None) != is_kept:
                await asyncio.sleep(0.05)


async def test_the_same_order_after_a_time_out_makes_no_second_voice(
    aftermath: dict[str, Aftermath], sandbox: Sandbox
) -> None:
    met = aftermath["a voice that is made after our answer"]
    assert refusal(met.answer) == (504, "TIMEOUT")
    [item] = (await met.account.history())["items"]  # has found its voice, but nobody was told
    answers = await asyncio.gather(*(clone_file(met.account) for _ in range(2)))
    for data in map(data_of, answers):
        assert (data["voice_id"], data["record_id"]) == (item["voice_id"], item["id"])
    assert len(sandbox.voices(met.account.api_key)) == 1
    assert len(asked(sandbox, met.account, "create_voice")) == 1


async def test_an_order_that_was_lost_without_a_voice_is_made_anew_once_that_was_looked_for(
    impatient: Server, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(impatient)
    assert refusal(await (await begin(sandbox, account, {"how": "silent"}))) == (504, "TIMEOUT")
    looked_before = len(asked(sandbox, account, "list_voice"))
    data = data_of(await clone_file(account))
    assert [voice["voice_id"] for voice in sandbox.voices(account.api_key)] == [data["voice_id"]]
    assert len(asked(sandbox, account, "create_voice")) == 2
    assert len(asked(sandbox, account, "list_voice")) >= looked_before + 4
    [anew, _] = (await account.history())["items"]
    assert anew["id"] == data["record_id"]


@pytest.mark.parametrize("first", [{"how": "delay", "seconds": 5}, {"how": "late", "seconds": 3.5}])
async def test_two_orders_with_the_same_prefix_are_not_mixed_up(
    impatient: Server, sandbox: Sandbox, create_account: CreateAccount, first: dict[str, Any]
) -> None:
    account = await create_account(impatient)
    lost = await begin(sandbox, account, first, sample(6))
    with sandbox.faults(**fault("create_voice", how="delay", seconds=0.8)):
        answers = await asyncio.gather(lost, clone_file(account, sample(7)))
    await each_has_his_own(sandbox, account, answers)


async def test_two_lost_orders_get_their_voices_in_the_order_of_asking(
    impatient: Server, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(impatient)
    while not 0.3 < time.time() % 1 < 0.4:  # so that both voices are made in the same second: the list tells no more
        await asyncio.sleep(0.02)
    late = [{"how": "late", "seconds": seconds, "count": 1} for seconds in (2.8, 2.9)]
    with sandbox.faults(requests=[trouble for each in late for trouble in fault("create_voice", **each)["requests"]]):
        asking = [asyncio.create_task(clone_file(account, sample(6)))]
        await struck(sandbox, account, "create_voice")
        asking.append(asyncio.create_task(clone_file(account, sample(7))))
        answers = await asyncio.gather(*asking)
    await each_has_his_own(sandbox, account, answers)


async def each_has_his_own(sandbox: Sandbox, account: Account, answers: Sequence[httpx.Response]) -> None:
    """Two orders have each the voice that was made of its own sample, in the answers and in the records."""
    voices = {voice["voice_id"]: voice["sample"]["bytes"] for voice in sandbox.voices(account.api_key)}
    told = [data_of(answer) for answer in answers]
    assert [voices.get(data["voice_id"]) for data in told] == [len(sample(6)), len(sample(7))]
    assert len(voices) == len(asked(sandbox, account, "create_voice")) == 2
    items = (await account.history())["items"]
    assert {item["id"]: item["voice_id"] for item in items} == {data["record_id"]: data["voice_id"] for data in told}


async def test_a_lost_voice_is_not_taken_from_those_that_were_made_elsewhere(
    impatient: Server, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(impatient)
    [old] = sandbox.add_voices(account.api_key, FLASH, "mine")
    asking = await begin(sandbox, account, {"how": "close_after"})
    data = data_of(await asking)
    assert data["voice_id"] != old
    assert {voice["voice_id"] for voice in sandbox.voices(account.api_key)} == {old, data["voice_id"]}


async def test_a_client_that_hangs_up_gets_its_voice_all_the_same(
    account: Account, sandbox: Sandbox, backend: Server
) -> None:
    log_before = len(backend.log)
    with sandbox.faults(**fault("create_voice", how="delay", seconds=0.8)):
        form = {"target_model": FLASH, "prefix": "mine"}
        with pytest.raises(httpx.ReadTimeout):
            await account.client.post(CREATE, data=form, files={"file": ("a.wav", sample())}, timeout=0.4)
        await struck(sandbox, account, "create_voice")
    item = await item_with(account, "OK")
    [voice] = sandbox.voices(account.api_key)
    assert (item["voice_id"], len(asked(sandbox, account, "create_voice"))) == (voice["voice_id"], 1)
    assert sample_of(backend, account) is not None
    assert "Traceback" not in backend.log[log_before:]


async def test_records_follow_their_voices_although_nobody_asks(
    account: Account, sandbox: Sandbox, backend: Server
) -> None:
    created = data_of(await clone(account))
    assert (await item_with(account, "DEPLOYING"))["id"] == created["record_id"]
    assert (await item_with(account, "OK"))["voice_id"] == created["voice_id"]
    assert 1 <= len(asked(sandbox, account, "query_voice")) <= 3
    query = "SELECT next_check_at FROM enrollments WHERE record_id = ?"
    async with asyncio.timeout(PATIENCE_SECONDS):  # what was found is shown a moment before the search is over
        while rows(backend, query, created["record_id"]) != [(None,)]:
            await asyncio.sleep(0.05)
    [next_check] = rows(backend, query, created["record_id"])
    assert next_check == (None,)


async def test_a_voice_is_followed_through_trouble_and_without_a_key(
    account: Account, sandbox: Sandbox, backend: Server, create_account: CreateAccount
) -> None:
    other = await create_account(backend)
    record_id = data_of(await clone(account))["record_id"]
    log_before = len(backend.log)

    async def check_until(is_done: Callable[[], bool]) -> None:
        """Have looks now: a new voice begins a round, and the check of this one is due."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not is_done():
                hurry(backend, record_id)
                await made(other)
                await asyncio.sleep(0.1)

    def queries() -> int:
        return len(asked(sandbox, account, "query_voice"))

    with sandbox.faults(**fault("query_voice", status=500, body="oops")):
        data_of(await account.client.delete("/api/user/apikey"))
        await check_until(lambda: '"error": "NoApiKey"' in backend.log[log_before:])
        data_of(await account.client.put("/api/user/apikey", json={"api_key": account.api_key}))
        before = queries()
        await check_until(lambda: queries() > before)
        with sandbox.faults(**fault("query_voice", status=400, code="BadRequest.ResourceNotExist")):
            before = queries()
            await check_until(lambda: queries() > before)
            assert (await item_with(account, "DEPLOYING"))["id"] == record_id
    before = queries()
    await check_until(lambda: queries() > before)
    await item_with(account, "OK")


async def test_a_voice_that_is_deleted_at_the_providers_takes_its_sample_along(
    account: Account, sandbox: Sandbox, backend: Server
) -> None:
    before = samples_of(backend)
    voice = data_of(await clone_file(account))["voice_id"]
    kept = sample_of(backend, account)
    assert (await look(account, voice, wait=20))["status"] == "OK"
    with sandbox.faults(**fault("query_voice", status=400, code="BadRequest.ResourceNotExist")):
        assert refusal(await account.client.get(path_of(voice))) == (404, "VOICE_NOT_FOUND")
    assert await ids(account) == []
    await made(account, prefix="another")
    deleting = data_of(await clone_file(account, sample(8)))["voice_id"]
    data_of(await account.client.delete(path_of(deleting)))
    await removed(backend, kept)
    await no_more_than(backend, before)
