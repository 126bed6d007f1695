"""Work that keeps a core busy leaves the event loop alone, wherever it is done."""

import asyncio
import json
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from anyio import move_on_after

from app.computation import LARGE_BYTES, compute
from app.dashscope import digest_result
from app.errors import InvalidRequest, UpstreamError
from app.subtitling import render_subtitle
from tests.conftest import Account
from tests.hearing import ended, submit
from tests.servers import Sandbox, Server
from tests.test_collection import result_path, told_result

TEXT = "今天天气真好，我们一起去公园散步吧。"
SENTENCES = 5000
TICK_SECONDS = 0.005
LONGEST_GAP_SECONDS = 0.3


def result_file(sentences: int) -> bytes:
    """A result file with word times."""
    spoken = [
        {
            "begin_time": 3000 * number,
            "end_time": 3000 * number + 2900,
            "text": TEXT,
            "sentence_id": number,
            "words": [
                {"begin_time": begin, "end_time": begin + 160, "text": char, "punctuation": ""}
                for begin, char in enumerate(TEXT, 3000 * number)
            ],
        }
        for number in range(sentences)
    ]
    return json.dumps({"transcripts": [{"channel_id": 0, "text": TEXT * sentences, "sentences": spoken}]}).encode()


@dataclass
class Ticking:
    """The longest time that a task had to wait for its turn."""

    longest_gap_seconds: float = 0.0


def own_time() -> float:
    """A clock in seconds that stands still while this thread could run and others have all cores."""
    queued_ns = 0
    with suppress(OSError):  # only Linux tells
        queued_ns = int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    return time.monotonic() - queued_ns / 1e9


@asynccontextmanager
async def ticking() -> AsyncIterator[Ticking]:
    """Measure how responsive the event loop is inside the block."""
    measured = Ticking()

    async def tick() -> None:
        while True:
            before = own_time()
            await asyncio.sleep(TICK_SECONDS)
            measured.longest_gap_seconds = max(measured.longest_gap_seconds, own_time() - before)

    task = asyncio.create_task(tick())
    await asyncio.sleep(0)
    try:
        yield measured
        await asyncio.sleep(4 * TICK_SECONDS)  # to see the end of the last gap
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_small_work_is_done_in_a_thread() -> None:
    assert await compute(LARGE_BYTES - 1, os.getpid) == os.getpid()
    assert await compute(LARGE_BYTES - 1, threading.get_ident) != threading.get_ident()


async def test_large_work_is_done_in_another_process() -> None:
    assert await compute(LARGE_BYTES, os.getpid) != os.getpid()


@pytest.mark.parametrize("size", [0, LARGE_BYTES])
async def test_what_goes_wrong_arrives_as_it_is(size: int) -> None:
    for result in (b"null", b"[" * LARGE_BYTES):
        with pytest.raises(UpstreamError) as upstream:
            await compute(size, digest_result, result)
        assert type(upstream.value) is UpstreamError
        assert upstream.value.message == str(upstream.value) == "转写结果的格式无法识别"
    kept = digest_result(result_file(1))
    with pytest.raises(InvalidRequest) as refused:
        await compute(size, render_subtitle, kept.transcripts, "srt", 7)
    assert (refused.value.message, refused.value.status) == ("channel_id 必须是以下之一：0", 400)
    with pytest.raises(ZeroDivisionError):
        await compute(size, divmod, 1, 0)


@pytest.mark.parametrize("size", [0, LARGE_BYTES])
async def test_the_place_does_not_change_the_result(size: int) -> None:
    content = result_file(3)
    kept = await compute(size, digest_result, content)
    assert kept == digest_result(content)
    assert kept.transcripts_with_words is not None
    cues = await compute(size, render_subtitle, kept.transcripts_with_words, "json", None)
    assert cues == render_subtitle(kept.transcripts_with_words, "json", None)


async def test_large_work_can_be_broken_off() -> None:
    await compute(LARGE_BYTES, os.getpid)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await compute(LARGE_BYTES, time.sleep, 20)
    with move_on_after(0.2) as scope:  # as a process that ends does it
        await compute(LARGE_BYTES, time.sleep, 20)
    assert scope.cancelled_caught
    assert time.monotonic() - started < 10
    assert await compute(LARGE_BYTES, os.getpid) != os.getpid()


async def test_hours_of_speech_do_not_stall_the_event_loop() -> None:
    content = result_file(SENTENCES)
    assert 7_000_000 < len(content) < 11_000_000
    async with ticking() as digesting:
        kept = await compute(len(content), digest_result, content)
    assert kept.text == TEXT * SENTENCES
    assert kept.transcripts_with_words is not None
    async with ticking() as rendering:
        text = await compute(
            len(kept.transcripts_with_words), render_subtitle, kept.transcripts_with_words, "srt", None
        )
    assert text.replace("\n", "").count("公园") == SENTENCES
    assert digesting.longest_gap_seconds < LONGEST_GAP_SECONDS
    assert rendering.longest_gap_seconds < LONGEST_GAP_SECONDS


def processor_seconds(pid: int) -> float:
    """What a process has worked so far, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_hours_of_speech_do_not_stall_the_server(account: Account, backend: Server, sandbox: Sandbox) -> None:
    waits: list[float] = []
    log_before = len(backend.log)

    async def visit() -> None:
        async with httpx.AsyncClient(base_url=backend.url, trust_env=False) as other:
            while True:
                before, worked_before = time.monotonic(), processor_seconds(backend.process.pid)
                assert (await other.get("/health/live")).status_code == 200
                # What other processes take from it is not its fault.
                worked_seconds = processor_seconds(backend.process.pid) - worked_before
                waits.append(min(time.monotonic() - before, worked_seconds))
                await asyncio.sleep(TICK_SECONDS)

    task_id = await submit(account)
    body = result_file(SENTENCES).decode()
    with sandbox.faults(
        requests=[told_result(sandbox, task_id), {"path": result_path(task_id), "status": 200, "body": body}]
    ):
        visiting = asyncio.create_task(visit())
        state = await ended(account, task_id, hurried=backend)
    answer = await account.client.get(f"/api/audio/asr/task/{task_id}/subtitle", params={"format": "txt"})
    visiting.cancel()
    await asyncio.wait([visiting])
    assert visiting.cancelled()
    assert (state["task_status"], len(state["result"]["transcripts"][0]["sentences"])) == ("SUCCEEDED", SENTENCES)
    assert answer.text == f"{TEXT}\n" * SENTENCES
    assert len(waits) > 50
    assert max(waits) < 2 * LONGEST_GAP_SECONDS
    assert "Traceback" not in backend.log[log_before:]
