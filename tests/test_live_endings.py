"""How live speech ends when something goes wrong: the provider, the client, or our own process."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import Account, CreateAccount
from tests.servers import ENDED_GRACEFULLY, Sandbox, Server, run_backend
from tests.talking import (
    LONG_TEXT,
    SENTENCE,
    Talk,
    bills,
    cost,
    kept_audio,
    provider_calls,
    record,
    records,
    statuses,
    talking,
)
from tests.test_crashes import expire_leases
from tests.test_deployments import oss_settings

SENTENCE_CHARACTERS = 13
MEGABYTE = 1024 * 1024


# The provider fails


async def test_a_provider_that_throttles_once_is_asked_again(
    backend: Server, sandbox: Sandbox, account: Account
) -> None:
    with sandbox.faults(throttle_tasks=1):
        async with talking(backend, account) as talk:
            heard = await talk.speak(SENTENCE, SENTENCE)
    assert (heard.message["type"], heard.message["characters"]) == ("complete", 2 * SENTENCE_CHARACTERS)
    calls = await provider_calls(sandbox, account, 2)
    assert [call["outcome"] for call in calls] == ["failed", "finished"]
    assert [call["text"] for call in calls] == ["", SENTENCE * 2]
    assert (await record(account))["bill"] == cost(2 * SENTENCE_CHARACTERS)


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory, sandbox: Sandbox) -> Iterator[Server]:
    """A server that does not wait long for its provider, and keeps audio in a bucket."""
    settings = oss_settings(sandbox, UPSTREAM_TIMEOUT="1")
    with run_backend(tmp_path_factory.mktemp("hasty"), settings) as running:
        yield running


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("fail", (502, "UPSTREAM_ERROR", 1011)),
        ("close", (502, "UPSTREAM_ERROR", 1011)),
        ("silent", (504, "TIMEOUT", 1011)),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
async def test_a_provider_that_breaks_in_the_middle_is_told_and_billed_as_counted(
    hasty: Server,
    sandbox: Sandbox,
    create_account: CreateAccount,
    how: str,
    expected: tuple[int, str, int],
    finished: bool,
) -> None:
    account = await create_account(hasty)
    frames = await frames_of_a_sentence(hasty, sandbox, create_account)
    with sandbox.faults(break_tasks=1, break_after_frames=frames + 1, break_how=how):
        async with talking(hasty, account) as talk:
            await talk.say(SENTENCE, SENTENCE, SENTENCE)
            if finished or how == "silent":
                await talk.end()
            refusal = await talk.refusal()
    assert refusal.brief == expected
    item = await record(account)
    [call] = await provider_calls(sandbox, account)
    assert call["outcome"] in {"failed", "disconnected"}
    assert item["status"] == "failed"
    assert item["error_message"] == refusal.message["message"]
    assert item["bill"] == cost(SENTENCE_CHARACTERS)  # counts come with the end of a sentence
    assert json.loads(item["input_data"])["text"] == SENTENCE * 3
    assert refusal.audio == await kept_audio(account, item)
    assert len(refusal.audio) >= frames * 4000
    async with talking(hasty, account) as talk:
        assert (await talk.speak("你好")).message["type"] == "complete"


async def frames_of_a_sentence(server: Server, sandbox: Sandbox, create_account: CreateAccount) -> int:
    """How many frames the provider needs for the sentence when another one follows."""
    account = await create_account(server)
    async with talking(server, account) as talk:
        await talk.speak(SENTENCE)
    [call] = await provider_calls(sandbox, account)
    return int(call["audio_frames"])


async def test_a_provider_that_never_answers_the_end_times_out(
    hasty: Server, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(hasty)
    with sandbox.faults(break_tasks=1, break_how="silent"):
        async with talking(hasty, account) as talk:
            asked_at = time.monotonic()
            await talk.say(SENTENCE)
            await talk.end()
            assert (await talk.refusal(5)).brief == (504, "TIMEOUT", 1011)
            assert 0.8 < time.monotonic() - asked_at < 4
    item = await record(account)
    assert (item["status"], item["bill"]) == ("failed", "0")


async def test_a_pause_is_no_silence_of_the_provider(
    hasty: Server, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(hasty)
    async with talking(hasty, account) as talk:
        await talk.say(SENTENCE, "这句话")
        await talk.hear_some()
        await asyncio.sleep(1.5)
        heard = await talk.speak("说完了。")
    assert (heard.message["type"], heard.message["characters"]) == ("complete", SENTENCE_CHARACTERS + 13)
    assert len(await provider_calls(sandbox, account)) == 1


async def test_a_provider_that_takes_no_work_is_told_and_costs_nothing(
    backend: Server,
    sandbox: Sandbox,
    realtime_backend: Server,
    realtime_sandbox: Sandbox,
    create_account: CreateAccount,
) -> None:
    async def refused(server: Server) -> tuple[int, str, int | None]:
        account = await create_account(server)
        async with talking(server, account) as talk:
            await talk.say(SENTENCE)
            refusal = await talk.refusal()
        item = await record(account)
        assert (item["status"], item["bill"]) == ("failed", "0")
        assert item["error_message"] == refusal.message["message"]
        return refusal.brief

    with sandbox.faults(throttle_tasks=-1), realtime_sandbox.faults(refuse_handshakes=-1, refuse_status=503):
        told = tuple(await asyncio.gather(refused(backend), refused(realtime_backend)))
    assert told == ((429, "RATE_LIMITED", 1008), (502, "UPSTREAM_ERROR", 1011))


async def test_a_store_that_is_gone_costs_no_audio_and_the_bill_stays_right(
    hasty: Server, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(hasty)
    with sandbox.faults(oss_unavailable=-1):
        async with talking(hasty, account) as talk:
            heard = await talk.speak(SENTENCE)
        assert heard.message["type"] == "complete"
        kept = (await account.client.get(heard.message["audio_url"])).content
    assert kept == heard.audio
    item = await record(account)
    assert "status" not in item
    assert item["bill"] == cost(SENTENCE_CHARACTERS)


async def test_a_key_that_the_provider_refuses_is_told(
    backend: Server, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(backend, api_key="sk-bad-0123456789abcdef")
    async with talking(backend, account) as talk:
        await talk.say(SENTENCE)
        refusal = await talk.refusal()
    assert refusal.brief == (401, "UNAUTHORIZED", 1008)
    assert "API Key" in refusal.message["message"]
    item = await record(account)
    assert (item["status"], item["bill"]) == ("failed", "0")
    assert sandbox.calls("sk-bad-0123456789abcdef") == []


# The client leaves


async def leave(talk: Talk, rudely: bool) -> None:
    """Hang up, or be gone."""
    if rudely:
        talk.vanish()
    else:
        await talk.socket.close()


@pytest.mark.parametrize(
    ("rudely", "said_all", "heard_bytes"),
    [(False, False, 1), (True, False, 30_000), (False, True, 30_000), (True, True, 1)],
)
async def test_who_leaves_while_it_speaks_pays_what_was_spoken(
    realtime_backend: Server,
    realtime_sandbox: Sandbox,
    create_account: CreateAccount,
    rudely: bool,
    said_all: bool,
    heard_bytes: int,
) -> None:
    account = await create_account(realtime_backend)
    async with talking(realtime_backend, account) as talk:
        await talk.say(LONG_TEXT)
        if said_all:
            await talk.end()
        await talk.hear_some(heard_bytes)
        await leave(talk, rudely)
        left_at = time.time()
    item = await record(account)
    [call] = await provider_calls(realtime_sandbox, account)
    assert (item["status"], call["outcome"]) == ("abandoned", "cancelled")
    assert call["ended_at"] - left_at < 1
    assert 0 < call["characters"] < 100
    assert item["bill"] == cost(call["characters"])
    kept = await kept_audio(account, item)
    assert len(kept) == call["audio_bytes"] >= heard_bytes
    assert item["duration"] == pytest.approx(len(kept) / 2 / 22050, abs=0.01)
    async with talking(realtime_backend, account) as talk:
        assert (await talk.speak("好。")).message["type"] == "complete"
    assert len({each["connection"] for each in realtime_sandbox.calls(account.api_key)}) == 1


@pytest.mark.parametrize("rudely", [False, True])
async def test_who_leaves_before_a_word_leaves_nothing(
    backend: Server, sandbox: Sandbox, account: Account, rudely: bool
) -> None:
    async with talking(backend, account) as talk:
        await talk.say(" ", "，")
        await talk.hear_for(0.1)
        await leave(talk, rudely)
    await asyncio.sleep(0.3)
    assert (await account.history())["total"] == 0
    assert sandbox.calls(account.api_key) == []


@pytest.mark.parametrize("finished", [False, True])
async def test_who_leaves_before_the_first_audio_pays_what_was_counted(
    backend: Server, sandbox: Sandbox, account: Account, finished: bool
) -> None:
    with sandbox.faults(hold_tasks=1):
        async with talking(backend, account) as talk:
            await talk.say(SENTENCE)
            if finished:
                await talk.end()
            await until_the_provider_has(sandbox, account, SENTENCE)
            await leave(talk, rudely=True)
        item = await record(account)
    [call] = await provider_calls(sandbox, account)
    assert (item["status"], call["outcome"]) == ("abandoned", "cancelled")
    assert item["bill"] == cost(call["characters"])


async def until_the_provider_has(sandbox: Sandbox, account: Account, text: str) -> None:
    """Wait until the text has arrived."""
    async with asyncio.timeout(5):
        while not any(call["text"] == text for call in await asyncio.to_thread(sandbox.calls, account.api_key)):
            await asyncio.sleep(0.02)


async def test_who_leaves_at_the_same_moment_as_he_speaks_is_settled(
    backend: Server, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    async def come_and_go(number: int) -> None:
        account = await create_account(backend)
        async with talking(backend, account) as talk:
            await talk.say(SENTENCE)
            await asyncio.sleep(number * 0.003)
            await leave(talk, rudely=number % 2 == 0)
        deadline = time.monotonic() + 10
        while (items := (await account.history())["items"]) and items[0].get("status") == "running":
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        calls = [call for call in await asyncio.to_thread(sandbox.calls, account.api_key) if call["text"]]
        if items:
            assert items[0]["status"] == "abandoned", number
        assert [call["outcome"] for call in calls] in ([], ["cancelled"]), number
        counted = sum(call["characters"] for call in calls)
        assert [item["bill"] for item in items] in ([], [cost(counted)]), number

    for number in range(12):
        await come_and_go(number)


async def test_what_was_complete_stays_so_when_the_client_leaves(
    realtime_backend: Server, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(realtime_backend)
    async with talking(realtime_backend, account) as talk:
        heard = await talk.speak("好。")
        await talk.say(LONG_TEXT)
        await talk.hear_some()
        talk.vanish()
    items = await records(account, 2)
    assert [item.get("status") for item in items] == [None, "abandoned"]
    assert items[0]["id"] == heard.message["record_id"]
    calls = await provider_calls(realtime_sandbox, account, 2)
    assert [item["bill"] for item in items] == [cost(call["characters"]) for call in calls]


async def test_no_session_leaves_anything_open(hasty: Server, create_account: CreateAccount) -> None:
    account = await create_account(hasty)
    for number in range(15):
        async with talking(hasty, account) as talk:
            await talk.say(SENTENCE)
            await talk.hear_some()
            if number % 3:
                await talk.send(type="sing")
                await talk.close_code_after_messages()
    for _ in range(15):
        async with talking(hasty, account) as talk:
            assert (await talk.speak("好。")).message["type"] == "complete"
    assert "ResourceWarning" not in hasty.log
    assert "Traceback" not in hasty.log
    assert "exc_type" not in hasty.log


# The client does not read


async def test_a_client_who_does_not_read_slows_the_provider_down_and_nobody_else(
    backend: Server, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account, other = await create_account(backend), await create_account(backend)
    async with talking(backend, other) as talk:
        await talk.speak(SENTENCE)  # what is loaded once is loaded
    async with talking(backend, account, sample_rate=48000, max_queue=1) as talk:
        before = resident_bytes(backend)
        await talk.say(LONG_TEXT * 4)
        await talk.end()
        sent = 0
        async with asyncio.timeout(20):
            while (more := await sent_after(sandbox, account, 0.6) - sent) >= 200_000 or not sent:
                sent += more
        assert sent < 12 * MEGABYTE
        assert resident_bytes(backend) - before < 16 * MEGABYTE
        asked_at = time.monotonic()
        async with talking(backend, other) as quick:
            assert (await quick.speak(SENTENCE)).message["type"] == "complete"
        assert time.monotonic() - asked_at < 1
        heard = await talk.hear(20)
    [call] = await provider_calls(sandbox, account)
    assert len(heard.audio) == call["audio_bytes"] > 15_000_000
    assert (heard.message["type"], heard.message["characters"]) == ("complete", 4 * 408)
    assert resident_bytes(backend) - before < 32 * MEGABYTE


async def sent_after(sandbox: Sandbox, account: Account, seconds: float) -> int:
    """How much audio the provider has sent a user after a while."""
    await asyncio.sleep(seconds)
    [call] = await asyncio.to_thread(sandbox.calls, account.api_key)
    return int(call["audio_bytes"])


def resident_bytes(server: Server) -> int:
    """How much memory a process has."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


# Our process ends


async def test_a_killed_process_leaves_an_estimate_of_what_was_said(
    tmp_path: Path, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    text = LONG_TEXT[:40]
    with run_backend(tmp_path, realtime_sandbox.settings) as backend:
        whole, typing = await create_account(backend), await create_account(backend)
        async with talking(backend, whole) as first, talking(backend, typing) as second:
            await first.say(LONG_TEXT)
            for token in text:
                await second.say(token)
                await asyncio.sleep(0.01)
            await first.hear_some()
            await second.hear_some()
            await asyncio.sleep(2.0)
            backend.kill()
            assert await first.close_code() is None
        expire_leases(backend)
    with run_backend(tmp_path, realtime_sandbox.settings) as restarted:
        for account, said in ((whole, LONG_TEXT), (typing, text)):
            account.client.base_url = httpx.URL(restarted.url)
            item = await record(account)
            assert item["status"] == "interrupted"
            assert json.loads(item["input_data"])["text"] == said
            [call] = await provider_calls(realtime_sandbox, account)
            assert call["text"] == said
            assert call["outcome"] == "disconnected"
        assert sorted(bills(restarted)) == [(counted(text), 1), (408, 1)]


def counted(text: str) -> int:
    """The characters of a text as they are billed."""
    return len(text) + sum("一" <= char <= "龥" for char in text)


async def test_a_terminated_process_settles_what_it_speaks_and_closes(
    tmp_path: Path, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    with run_backend(tmp_path, realtime_sandbox.settings) as backend:
        account, idle = await create_account(backend), await create_account(backend)
        async with talking(backend, account) as talk, talking(backend, idle) as silent:
            await talk.say(LONG_TEXT)
            await talk.hear_some(20_000)
            backend.process.terminate()
            started = time.monotonic()
            codes = await talk.close_code_after_messages(), await silent.close_code()
            assert await asyncio.to_thread(backend.stop) in ENDED_GRACEFULLY
            assert time.monotonic() - started < 8
        assert codes == (1012, 1012)
        assert "Traceback" not in backend.log
        assert "exc_type" not in backend.log
        [call] = await provider_calls(realtime_sandbox, account)
        assert call["outcome"] == "cancelled"
        assert statuses(backend) == ["interrupted"]
        assert bills(backend) == [(call["characters"], 0)]
        [kept] = (tmp_path / "data" / "media").rglob("*.pcm")
        assert kept.stat().st_size == call["audio_bytes"] >= 20_000


async def test_what_was_said_completely_is_spoken_before_the_process_ends(
    tmp_path: Path, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    with run_backend(tmp_path, realtime_sandbox.settings) as backend:
        account, cut_off = await create_account(backend), await create_account(backend)
        async with talking(backend, account) as talk, talking(backend, cut_off) as unfinished:
            await talk.say(SENTENCE)
            await talk.end()
            await unfinished.say(LONG_TEXT)
            await talk.hear_some()
            await unfinished.hear_some()
            backend.process.terminate()
            heard, refusal = await asyncio.gather(talk.hear(), unfinished.refusal())
            assert heard.message["type"] == "complete"
            assert await talk.close_code() == 1012
        assert refusal.brief == (503, "NOT_READY", 1012)
        assert await asyncio.to_thread(backend.stop) in ENDED_GRACEFULLY
        assert "Traceback" not in backend.log
        assert sorted(statuses(backend)) == ["interrupted", "succeeded"]
        assert all(estimated == 0 for _, estimated in bills(backend))
