"""Long text as work that lasts: its progress, its end on demand, and what becomes of it when processes go away."""

import asyncio
import itertools
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from tests.conftest import PASSWORD, Account, CreateAccount
from tests.databases import rows
from tests.hearing import PATIENCE_SECONDS, data_of, refusal, transcribe
from tests.narrating import (
    PATH,
    PROGRESS,
    SAMPLE_BYTES,
    Calls,
    Event,
    ask,
    at_rest,
    audio_of,
    begin,
    cancel,
    cleared,
    counted,
    ended,
    finished,
    follow,
    grow,
    in_order,
    narrate,
    only_record,
    padded,
    record_of,
    spoken,
    told,
    under_way,
    work_of,
)
from tests.servers import ENDED_GRACEFULLY, Sandbox, Server, run_backend, run_sandbox
from tests.sound import duration

SPEED = "25"
PARALLELISM = 2
RATE = 22050
UNSAID = "天机不可泄露"
"""Said in one test, and nowhere in a log."""


@pytest.fixture(scope="module")
def paced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A provider that takes its time."""
    with run_sandbox(tmp_path_factory.mktemp("paced"), "--speed", SPEED) as running:
        yield running


def settings_for(sandbox: Sandbox, **changes: str) -> dict[str, str]:
    """What all servers here have in common."""
    return {**sandbox.settings, "LONG_TEXT_PARALLELISM": str(PARALLELISM), "LOG_LEVEL": "DEBUG", **changes}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, paced: Sandbox) -> Iterator[Server]:
    """The product with that provider."""
    with run_backend(tmp_path_factory.mktemp("server"), settings_for(paced)) as running:
        yield running


@pytest.fixture
async def reader(server: Server, create_account: CreateAccount) -> Account:
    """A user of it."""
    return await create_account(server)


async def assert_whole(account: Account, sandbox: Sandbox, record: dict[str, Any], text: str) -> None:
    """Check that a record has all of its text as audio, and its segments are cleared away."""
    assert record["status"] == "succeeded", record
    progress = record["progress"]
    assert progress["segments_done"] == progress["segments_total"] > 1
    last = {call["text"]: call for call in finished(sandbox.calls(account.api_key)) if call["text"] in text}
    assert "".join(call["text"] for call in in_order(list(last.values()), text)) == text
    audio = await audio_of(account, record["output_url"])
    assert abs(len(audio) - sum(call["audio_bytes"] for call in last.values())) <= 0.05 * RATE * SAMPLE_BYTES
    assert abs(len(audio) / SAMPLE_BYTES / RATE - record["duration"]) <= 0.05


# ---- In the background


async def test_an_order_for_the_background_is_answered_at_once(reader: Account, paced: Sandbox, server: Server) -> None:
    text = padded(3)
    started = time.monotonic()
    data = data_of(await ask(reader, text, **{"async": True}))
    assert time.monotonic() - started < 1
    assert data.keys() == {"record_id", "status", "segments"}
    assert data["status"] == "running"
    assert isinstance(data["record_id"], int)
    record = await ended(reader, data["record_id"])
    assert record["progress"]["segments_total"] == data["segments"]
    await assert_whole(reader, paced, record, text)
    assert record["progress"]["characters"] == told(paced.calls(reader.api_key)) == counted(text)
    await cleared(server)


async def test_progress_grows_to_the_whole(reader: Account, paced: Sandbox) -> None:
    text = padded(5)
    record_id = await begin(reader, text)
    seen = []
    while (record := await record_of(reader, record_id)).get("status") == "running":
        assert record.keys() >= {"id", "status", "progress", "bill"}
        assert "output_url" not in record
        seen.append(record["progress"])
        await asyncio.sleep(0.05)
    seen.append(record["progress"])
    assert all(progress.keys() == PROGRESS - {"record_id", "status"} for progress in seen)
    for name in ("segments_done", "characters"):
        assert grow([progress[name] for progress in seen]), [progress[name] for progress in seen]
    assert grow([float(progress["bill"]) for progress in seen])
    assert len({progress["segments_done"] for progress in seen}) >= 3
    assert seen[0]["segments_done"] < seen[0]["segments_total"]
    assert {progress["segments_total"] for progress in seen} == {seen[-1]["segments_done"]}
    assert seen[-1]["characters"] == counted(text)
    assert seen[-1]["bill"] == record["bill"]


async def test_work_in_progress_is_nobodys_to_fetch(reader: Account, server: Server) -> None:
    record_id = await begin(reader, padded(3))
    await spoken(reader, record_id, 1)
    names = work_of(server)
    assert names
    for name in names:
        assert (await reader.client.get(f"/media/audio/work/{name}")).status_code == 404
    await ended(reader, record_id)
    await cleared(server)


async def test_a_client_that_hangs_up_loses_nothing(reader: Account, paced: Sandbox, server: Server) -> None:
    text = padded(3)
    asking = asyncio.create_task(ask(reader, text, subtitle="srt"))
    await under_way(paced, reader)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    record = await ended(reader, await only_record(reader))
    await assert_whole(reader, paced, record, text)
    assert record["usage"]["quantity"] == counted(text)
    assert b" --> " in await audio_of(reader, record["subtitle_url"])
    await cleared(server)


async def test_a_user_has_two_texts_spoken_at_once_and_a_third_waits(
    server: Server, paced: Sandbox, create_account: CreateAccount
) -> None:
    busy, other = await create_account(server), await create_account(server)
    texts = [padded(1, first=number) for number in range(3)]
    with paced.faults(hold_tasks=-1):
        records = [await begin(busy, text) for text in texts]
        await under_way(paced, busy, 2)
        theirs = await begin(other, texts[0])
        await under_way(paced, other)
        await asyncio.sleep(0.5)
        assert not [call for call in paced.calls(busy.api_key) if call["text"] in texts[2]]
        assert (await record_of(busy, records[2]))["progress"]["segments_done"] == 0
    for record_id in records:
        assert (await ended(busy, record_id))["status"] == "succeeded"
    assert (await ended(other, theirs))["status"] == "succeeded"
    assert sum(counted(text) for text in texts) == told(paced.calls(busy.api_key))


# ---- Events


async def test_events_tell_of_everything_to_the_end(reader: Account) -> None:
    text = padded(5)
    record_id = await begin(reader, text, subtitle="vtt")
    started = time.monotonic()
    first_after = 0.0
    events: list[Event] = []
    async for event in follow(reader, record_id):
        first_after = first_after or time.monotonic() - started
        events.append(event)
    assert first_after < 1
    assert [name for name, _ in events] == ["progress"] * (len(events) - 1) + ["end"]
    assert len(events) >= 4
    for _, data in events[:-1]:
        assert data.keys() == PROGRESS
        assert (data["record_id"], data["status"]) == (record_id, "running")
    for name in ("segments_done", "characters"):
        assert grow([data[name] for _, data in events])
    end = events[-1][1]
    assert end.keys() == PROGRESS | {"audio_url", "duration", "subtitle_url"}
    record = await record_of(reader, record_id)
    assert end == {
        "record_id": record_id,
        "status": "succeeded",
        **record["progress"],
        "audio_url": record["output_url"],
        "duration": record["duration"],
        "subtitle_url": record["subtitle_url"],
    }
    assert end["segments_done"] == end["segments_total"]
    again = [event async for event in follow(reader, record_id)]
    assert again == [("end", end)]


async def test_events_are_for_their_owner_by_header_or_query(
    server: Server, reader: Account, create_account: CreateAccount
) -> None:
    record_id = (await narrate(reader, "你好。"))["record_id"]
    path = f"/api/audio/records/{record_id}/events"
    other = await create_account(server)
    assert refusal(await other.client.get(path)) == (404, "NOT_FOUND")
    assert refusal(await reader.client.get("/api/audio/records/999999/events")) == (404, "NOT_FOUND")
    token = reader.client.headers.pop("Authorization").removeprefix("Bearer ")
    by_query = [event async for event in follow(reader, record_id, params={"token": token})]
    assert [name for name, _ in by_query] == ["end"]
    assert refusal(await reader.client.get(path)) == (401, "UNAUTHORIZED")
    for wrong in ("x", f"{token}x", ""):
        assert refusal(await reader.client.get(path, params={"token": wrong})) == (401, "UNAUTHORIZED")
    others = other.client.headers["Authorization"].removeprefix("Bearer ")
    assert refusal(await reader.client.get(path, params={"token": others})) == (404, "NOT_FOUND")


async def test_events_of_a_record_that_is_no_long_text(reader: Account, paced: Sandbox) -> None:
    short = data_of(await reader.synthesize("你好。"))
    [(name, end)] = [event async for event in follow(reader, short["record_id"])]
    assert (name, end["status"], end["record_id"]) == ("end", "succeeded", short["record_id"])
    assert (end["bill"], end["audio_url"]) == (short["bill"], short["audio_url"])
    with paced.faults(break_tasks=1):
        assert (await reader.synthesize("你好。")).status_code == 502
    failed = (await reader.history())["items"][0]
    [(name, end)] = [event async for event in follow(reader, failed["id"])]
    assert (name, end["status"]) == ("end", "failed")
    assert end["error_message"] == failed["error_message"]


# ---- Cancelling


async def test_a_cancelled_text_stops_at_once_and_keeps_its_beginning(
    reader: Account, paced: Sandbox, server: Server
) -> None:
    text = padded(6)
    asking = asyncio.create_task(ask(reader, text, format="wav"))
    record_id = await only_record(reader)
    await spoken(reader, record_id, 2)
    await under_way(paced, reader)
    started = time.monotonic()
    stopped = data_of(await cancel(reader, record_id))
    assert time.monotonic() - started < 2
    calls = paced.calls(reader.api_key)
    assert Counter(call["outcome"] for call in calls).keys() <= {"finished", "cancelled"}
    assert stopped.keys() == PROGRESS | {"audio_url", "duration"}
    assert stopped["status"] == "cancelled"
    assert 2 <= stopped["segments_done"] < stopped["segments_total"]
    assert stopped["characters"] == told(calls) < counted(text)
    assert refusal(await asking) == (409, "CANCELLED")
    record = await ended(reader, record_id)
    assert record["status"] == "cancelled"
    assert (record["usage"]["quantity"], record["usage"]["estimated"]) == (told(calls), False)
    assert record["bill"] == stopped["bill"] == record["progress"]["bill"]
    assert record["output_url"] == stopped["audio_url"]
    audio = await audio_of(reader, stopped["audio_url"])
    assert abs(duration(audio, "wav", RATE) - stopped["duration"]) <= 0.05
    assert len(audio) - 44 >= beginning(finished(calls), text)
    assert len(audio) - 44 <= sum(call["audio_bytes"] for call in calls)
    await cleared(server)
    assert data_of(await cancel(reader, record_id)) == stopped
    assert len(paced.calls(reader.api_key)) == len(calls)
    [(name, end)] = [event async for event in follow(reader, record_id)]
    assert (name, end["status"], end["audio_url"]) == ("end", "cancelled", stopped["audio_url"])


def beginning(calls: Calls, text: str) -> int:
    """How many bytes of audio the text has from its start without a hole."""
    size = position = 0
    for call in in_order(calls, text):
        if not text.startswith(call["text"], position):
            break
        position += len(call["text"])
        size += call["audio_bytes"]
    return size


async def test_who_follows_a_text_hears_that_it_was_cancelled(reader: Account, paced: Sandbox) -> None:
    record_id = await begin(reader, padded(3))

    async def names() -> list[tuple[str, str]]:
        return [(name, data["status"]) async for name, data in follow(reader, record_id)]

    following = asyncio.create_task(names())
    await under_way(paced, reader)
    both = await asyncio.gather(cancel(reader, record_id), cancel(reader, record_id))
    assert [data_of(answer)["status"] for answer in both] == ["cancelled", "cancelled"]
    async with asyncio.timeout(3):
        heard = await following
    assert heard[-1] == ("end", "cancelled")
    assert set(heard[:-1]) == {("progress", "running")}


async def test_a_text_that_waits_for_its_turn_is_cancelled_for_nothing(reader: Account, paced: Sandbox) -> None:
    texts = [padded(1, first=number) for number in range(3)]
    with paced.faults(hold_tasks=-1):
        first, second, third = [await begin(reader, text) for text in texts]
        await under_way(paced, reader, 2)
        stopped = data_of(await cancel(reader, third))
        assert stopped.keys() == PROGRESS
        assert (stopped["status"], stopped["segments_done"], stopped["characters"]) == ("cancelled", 0, 0)
        assert stopped["bill"] == "0"
        for record_id in (first, second):
            assert data_of(await cancel(reader, record_id))["status"] == "cancelled"
    calls = await at_rest(paced, reader)
    assert not [call for call in calls if call["text"] in texts[2]]
    assert "output_url" not in await record_of(reader, third)


async def test_only_ones_own_long_texts_are_cancelled(
    server: Server, reader: Account, create_account: CreateAccount
) -> None:
    task = data_of(await transcribe(reader))
    assert refusal(await cancel(reader, task["record_id"])) == (409, "NOT_CANCELLABLE")
    other = await create_account(server)
    record_id = await begin(reader, padded(2))
    assert refusal(await cancel(other, record_id)) == (404, "NOT_FOUND")
    assert refusal(await cancel(reader, 999_999)) == (404, "NOT_FOUND")
    done = await ended(reader, record_id)
    assert done["status"] == "succeeded"
    late = data_of(await cancel(reader, record_id))
    assert (late["status"], late["audio_url"], late["bill"]) == ("succeeded", done["output_url"], done["bill"])
    assert (await record_of(reader, record_id))["status"] == "succeeded"
    short = data_of(await reader.synthesize("你好。"))
    assert data_of(await cancel(reader, short["record_id"]))["status"] == "succeeded"


# ---- Processes that go away


CHECKPOINTS = "SELECT text FROM segments WHERE record_id = ? AND key IS NOT NULL"
STAKES = "SELECT text, at_stake FROM segments WHERE record_id = ? AND attempt IS NOT NULL"
EXPIRE = "UPDATE long_texts SET claimed_until = '2026-01-01 00:00:00.000000' WHERE claimed_until IS NOT NULL"


async def test_a_killed_process_leaves_what_another_goes_on_with(
    tmp_path: Path, paced: Sandbox, create_account: CreateAccount
) -> None:
    text = padded(5)
    with run_backend(tmp_path, settings_for(paced)) as backend:
        account = await create_account(backend)
        record_id = await begin(account, text)
        await spoken(account, record_id, 2)
        await under_way(paced, account)
        backend.kill()
    kept = {each for (each,) in rows(backend, CHECKPOINTS, record_id)}
    stakes: dict[str, int] = dict(rows(backend, STAKES, record_id))
    assert len(kept) >= 2
    assert stakes
    rows(backend, EXPIRE)  # let the time pass that a dead process' claim still lasts
    with run_backend(tmp_path, settings_for(paced)) as restarted:
        account.client.base_url = httpx.URL(restarted.url)
        record = await ended(account, record_id)
        await assert_whole(account, paced, record, text)
        await cleared(restarted)
        assert "Traceback" not in restarted.log
    tries = Counter(call["text"] for call in paced.calls(account.api_key))
    assert {each: tries[each] for each in kept} == dict.fromkeys(kept, 1), "bought twice"
    assert {each for each, count in tries.items() if count > 1} <= stakes.keys()
    assert max(tries.values()) == 2
    usage = record["usage"]
    assert usage["estimated"] is True
    assert usage["quantity"] == record["progress"]["characters"] == counted(text) + sum(stakes.values())
    assert sum(stakes.values()) == sum(map(counted, stakes))


async def test_a_process_that_is_asked_to_end_hands_its_texts_over(
    tmp_path: Path, paced: Sandbox, create_account: CreateAccount
) -> None:
    text = padded(12)
    settings = settings_for(paced, DRAIN_SECONDS="1")
    with run_backend(tmp_path, settings) as backend:
        account, waiting = await create_account(backend), await create_account(backend)
        record_id = await begin(account, text)
        asking = asyncio.create_task(ask(waiting, text))
        await spoken(account, record_id, 1)
        await under_way(paced, waiting)
        backend.process.terminate()
        assert refusal(await asking) == (503, "NOT_READY")
        assert await asyncio.to_thread(backend.stop) in ENDED_GRACEFULLY
        assert "Traceback" not in backend.log
    assert not rows(backend, STAKES, record_id), "a process that ends in order leaves nothing to guess"
    kept = {each for (each,) in rows(backend, CHECKPOINTS, record_id)}
    calls_before = len(paced.calls(account.api_key))
    with run_backend(tmp_path, settings) as restarted:
        account.client.base_url = waiting.client.base_url = httpx.URL(restarted.url)
        started = time.monotonic()
        while len(paced.calls(account.api_key)) == calls_before:
            assert time.monotonic() - started < 3, "it does not go on at once"
            await asyncio.sleep(0.05)
        for each in (account, waiting):
            record = await ended(each, await only_record(each))
            await assert_whole(each, paced, record, text)
            total = told(paced.calls(each.api_key))
            assert (record["usage"]["quantity"], record["usage"]["estimated"]) == (total, False)
        await cleared(restarted)
    tries = Counter(call["text"] for call in paced.calls(account.api_key))
    assert {each: tries[each] for each in kept} == dict.fromkeys(kept, 1), "bought twice"


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_another_server_goes_on_for_one_that_died(
    tmp_path: Path, paced: Sandbox, create_account: CreateAccount, database_url: str
) -> None:
    text = padded(5)
    settings = settings_for(paced, DATABASE_URL=database_url, DATA_DIR=str(tmp_path / "shared"))
    with run_backend(tmp_path / "first", settings) as first, run_backend(tmp_path / "second", settings) as second:
        account = await create_account(first)
        os.kill(second.process.pid, signal.SIGSTOP)  # it would hear of the text, and could be quicker
        record_id = await begin(account, text)
        await spoken(account, record_id, 2)
        os.kill(second.process.pid, signal.SIGCONT)
        account.client.base_url = httpx.URL(second.url)
        following = asyncio.create_task(events_of(account, record_id))
        await under_way(paced, account)
        kept = await rows_of(database_url, "SELECT text FROM segments WHERE key IS NOT NULL")
        first.kill()
        await rows_of(database_url, EXPIRE)
        await begin(account, "唤醒。")  # which has the second server look around now
        record = await ended(account, record_id)
        heard = await following
        await assert_whole(account, paced, record, text)
        assert "Traceback" not in second.log
    assert heard[0][1]["status"] == "running"
    assert (heard[-1][0], heard[-1][1]["status"]) == ("end", "succeeded")
    assert grow([data["segments_done"] for _, data in heard])
    assert record["usage"]["estimated"] is True
    assert record["usage"]["quantity"] > counted(text)
    tries = Counter(call["text"] for call in paced.calls(account.api_key))
    assert kept
    assert all(tries[each] == 1 for (each,) in kept), "bought twice"


async def events_of(account: Account, record_id: int) -> list[Event]:
    """All that is told of a record."""
    return [event async for event in follow(account, record_id)]


async def rows_of(database_url: str, sql: str) -> list[Any]:
    """Ask a PostgreSQL database, or change it."""
    database = await asyncpg.connect(database_url.replace("+asyncpg", ""))
    try:
        return list(await database.fetch(sql))
    finally:
        await database.close()


async def test_another_server_can_cancel(
    tmp_path: Path, paced: Sandbox, server: Server, create_account: CreateAccount
) -> None:
    settings = settings_for(paced, DATA_DIR=str(server.folder / "data"), PUBLIC_BASE_URL=server.url)
    account = await create_account(server)
    text = padded(6)
    asking = asyncio.create_task(ask(account, text))
    record_id = await only_record(account)
    await under_way(paced, account)
    with paced.faults(hold_tasks=-1), run_backend(tmp_path, settings) as second:
        token = account.client.headers["Authorization"]
        path = f"{second.url}/api/audio/records/{record_id}/cancel"
        async with httpx.AsyncClient(headers={"Authorization": token}, timeout=30, trust_env=False) as elsewhere:
            started = time.monotonic()
            stopped = data_of(await elsewhere.post(path))
            assert time.monotonic() - started < 5
    assert refusal(await asking) == (409, "CANCELLED")
    calls = await at_rest(paced, account)
    assert (stopped["status"], stopped["characters"]) == ("cancelled", told(calls))


# ---- A store that is away


async def test_a_store_that_is_away_is_waited_for(reader: Account, paced: Sandbox, server: Server) -> None:
    text = padded(4)
    record_id = await begin(reader, text)
    await spoken(reader, record_id, 1)
    work = server.folder / "data" / "media" / "audio" / "work"
    away = await asyncio.to_thread(take_away, work)
    await asyncio.sleep(1)
    record = await record_of(reader, record_id)
    assert record["status"] == "running"
    bring_back(work, away)
    hurrying = asyncio.create_task(hurry(server, record_id))
    record = await ended(reader, record_id)
    hurrying.cancel()
    await assert_whole(reader, paced, record, text)
    tries = Counter(call["text"] for call in finished(paced.calls(reader.api_key)))
    assert max(tries.values()) == 1, "bought twice"
    assert record["usage"]["quantity"] == counted(text)
    await cleared(server)


def take_away(folder: Path) -> Path:
    """Put a file in the place of a folder right when another segment is kept there, which nobody has read yet."""
    before = set(folder.glob("*.pcm"))
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not set(folder.glob("*.pcm")) - before:
        assert time.monotonic() < deadline
    away = folder.with_name("away")
    away.mkdir()
    for number in itertools.count():
        folder.rename(away / str(number))
        with suppress(IsADirectoryError):  # the server has made it anew meanwhile
            folder.write_bytes(b"")
            return away
    raise AssertionError


def bring_back(folder: Path, away: Path) -> None:
    """Undo that, with a server beside that may make the folder anew."""
    folder.unlink()
    folder.mkdir(exist_ok=True)
    for file in away.glob("*/*.pcm"):  # and not the draft that was just being written: the server has given it up
        file.rename(folder / file.name)
    shutil.rmtree(away)


async def hurry(server: Server, record_id: int) -> None:
    """Let the time pass that lies before the next attempt at a text."""
    while True:
        rows(
            server,
            "UPDATE long_texts SET next_check_at = '2026-01-01 00:00:00.000000'"
            " WHERE record_id = ? AND next_check_at IS NOT NULL AND claimed_by IS NULL",
            record_id,
        )
        await asyncio.sleep(0.2)


# ---- What is written down


async def test_no_text_key_or_token_is_logged(server: Server, reader: Account, paced: Sandbox) -> None:
    token = reader.client.headers["Authorization"].removeprefix("Bearer ")
    with paced.faults(break_tasks=1, break_after_frames=2):
        record_id = await begin(reader, UNSAID + padded(2), subtitle="srt")
        await under_way(paced, reader)
    reader.client.headers.pop("Authorization")
    assert [event async for event in follow(reader, record_id, params={"token": token})][-1][0] == "end"
    assert (await reader.client.post(PATH, params={"token": token}, json={"text": UNSAID})).status_code == 401
    reader.client.headers["Authorization"] = f"Bearer {token}"
    assert refusal(await ask(reader, UNSAID, voice=reader.api_key)) == (400, "INVALID_VOICE")
    assert any(UNSAID in call["text"] for call in paced.calls(reader.api_key))
    log = server.log
    assert '"event": "record_settled"' in log
    escaped = UNSAID.encode("unicode_escape").decode()
    for secret in (UNSAID, escaped, padded(1)[:3], reader.api_key, token, PASSWORD):
        assert secret not in log
    assert "Traceback" not in log
