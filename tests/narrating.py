"""Long text to speech as a client asks for it, and what the provider saw of it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx

from tests.conftest import Account
from tests.hearing import PATIENCE_SECONDS, data_of
from tests.servers import Sandbox, Server

PATH = "/api/audio/tts/synthesize-long"
MODEL, VOICE = "cosyvoice-v3-flash", "longanyang"
SEGMENT_CHARACTERS = 2000
SAMPLE_BYTES = 2
PROGRESS = {"record_id", "status", "segments_done", "segments_total", "characters", "bill"}

Calls = list[dict[str, Any]]
Event = tuple[str, dict[str, Any]]


def padded(segments: int, first: int = 0) -> str:
    """A text of about so many segments that is soon spoken: short sentences, no two alike, far from each other.

    Line ends count and take no time. `first` tells one text from another.
    """
    numbers = range(17 * first, 17 * (first + segments))
    return "".join(f"{chr(0x4E00 + number)}好。" + "\n" * 110 for number in numbers)


def prose(repeats: int) -> str:
    """Chinese and English as people write it, no two paragraphs alike."""
    return "".join(
        f"第{number}段：今天天气真好，我们一起去公园散步吧！“你说什么？”她笑了……\n"
        f"Paragraph {number}: the quick brown fox, which costs 3.14 dollars, jumps over www.example.com. \n\n"
        for number in range(repeats)
    )


def counted(text: str) -> int:
    """What the provider bills for a text of the usual Chinese characters and others."""
    return sum(2 if "\u4e00" <= char <= "\u9fff" else 1 for char in text)


async def ask(account: Account, text: str, **fields: Any) -> httpx.Response:
    """Ask for a long text; raw samples unless told otherwise, since they cost no time."""
    body = {"model": MODEL, "voice": VOICE, "text": text, "format": "pcm", **fields}
    return await account.client.post(PATH, json=body)


async def narrate(account: Account, text: str, **fields: Any) -> dict[str, Any]:
    """Have a long text spoken, and wait for it."""
    return data_of(await ask(account, text, **fields))


async def begin(account: Account, text: str, **fields: Any) -> int:
    """Have a long text spoken in the background; gives its record."""
    record_id: int = data_of(await ask(account, text, **{"async": True, **fields}))["record_id"]
    return record_id


async def record_of(account: Account, record_id: int) -> dict[str, Any]:
    """A record in full."""
    return data_of(await account.client.get(f"/api/audio/records/{record_id}"))


async def cancel(account: Account, record_id: int) -> httpx.Response:
    """Ask for the end of a record."""
    return await account.client.post(f"/api/audio/records/{record_id}/cancel")


async def only_record(account: Account) -> int:
    """The one record that an account has, as soon as it has it."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (items := (await account.history())["items"]):
            await asyncio.sleep(0.02)
    [item] = items
    record_id: int = item["id"]
    return record_id


async def ended(account: Account, record_id: int, seconds: float = PATIENCE_SECONDS) -> dict[str, Any]:
    """A record in full, once it has its end."""
    deadline = time.monotonic() + seconds
    while (record := await record_of(account, record_id))["status"] == "running":
        assert time.monotonic() < deadline, record["progress"]
        await asyncio.sleep(0.05)
    return record


async def spoken(account: Account, record_id: int, segments: int) -> dict[str, Any]:
    """A record that is still running, once so many segments of it are done."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (record := await record_of(account, record_id))["progress"]["segments_done"] < segments:
        assert record["status"] == "running", record
        assert time.monotonic() < deadline, record
        await asyncio.sleep(0.02)
    return record


async def audio_of(account: Account, url: str) -> bytes:
    """A file that anybody may fetch who knows where it is."""
    answer = await account.client.get(url, headers={"Authorization": ""})
    assert answer.status_code == 200, answer.text
    return answer.content


async def follow(account: Account, record_id: int, **options: Any) -> AsyncIterator[Event]:
    """The events of a record, to the end of the stream."""
    path = f"/api/audio/records/{record_id}/events"
    async with account.client.stream("GET", path, **options) as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"].startswith("text/event-stream")
        name, data = "", ""
        async for line in answer.aiter_lines():
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                data += value
            elif not line and data:
                yield name, json.loads(data)
                name, data = "", ""


def in_order(calls: Calls, text: str) -> Calls:
    """Calls by where their text stands in a text whose segments are all different."""
    return sorted(calls, key=lambda call: text.index(call["text"]))


def finished(calls: Calls) -> Calls:
    """Those calls that spoke their text to its end."""
    return [call for call in calls if call["outcome"] == "finished"]


def told(calls: Calls) -> int:
    """What the provider counted in all of its calls."""
    return sum(call["characters"] for call in calls)


def at_once(calls: Calls) -> int:
    """How many calls were under way at the same moment, at most."""
    begins = [(call["submitted_at"], 1) for call in calls]
    ends = [(call["ended_at"], -1) for call in calls]
    most = now = 0
    for _, change in sorted(begins + ends):
        now += change
        most = max(most, now)
    return most


def seconds_of(calls: Calls) -> float:
    """How long the samples of some calls play."""
    return sum(float(call["audio_bytes"] / SAMPLE_BYTES / call["sample_rate"]) for call in calls)


async def under_way(sandbox: Sandbox, account: Account, calls: int = 1) -> Calls:
    """Wait until so many calls have got their text and are not ended."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            running = [call for call in sandbox.calls(account.api_key) if call["text"] and call["ended_at"] is None]
            if len(running) >= calls:
                return running
            await asyncio.sleep(0.02)


async def at_rest(sandbox: Sandbox, account: Account) -> Calls:
    """All calls of an account, once none is under way."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while any(call["ended_at"] is None for call in sandbox.calls(account.api_key)):
            await asyncio.sleep(0.02)
    return sandbox.calls(account.api_key)


def work_of(server: Server) -> list[str]:
    """The names of what lies about on a server's disk while texts are spoken."""
    folder = server.folder / "data" / "media" / "audio" / "work"
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


async def cleared(server: Server) -> None:
    """Wait until nothing of the work lies about."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while work_of(server):
            await asyncio.sleep(0.05)


def grow(values: Sequence[float]) -> bool:
    """Whether no value is less than the one before it."""
    return list(values) == sorted(values)
