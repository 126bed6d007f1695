from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from app.sandbox import SandboxOptions

from .conftest import RunningSandbox
from .dialogue import Dialogue, dial, kind, run_payload

pytestmark = pytest.mark.anyio

LONG_TEXT = "床前明月光，疑是地上霜。举头望明月，低头思故乡。" * 40
Start = Callable[[SandboxOptions], RunningSandbox]


async def receive_frames(dialogue: Dialogue, count: int) -> None:
    received = 0
    while received < count:
        received += isinstance(await dialogue.frame(), bytes)


@pytest.mark.parametrize("finished", [False, True])
async def test_a_cancel_stops_the_audio_and_keeps_the_socket(start_sandbox: Start, finished: bool) -> None:
    server = start_sandbox(SandboxOptions(speed=1.0))
    async with dial(server.ws_url) as dialogue:
        await dialogue.start()
        await dialogue.text("今天天气怎么样？" * 20)
        if finished:
            await dialogue.finish()
        await receive_frames(dialogue, 3)
        before = time.monotonic()
        await dialogue.cancel()
        answer = await dialogue.listen()
        assert time.monotonic() - before < 1.0
        assert len(answer.frames) <= 2
        assert 0 < answer.characters < 40
        assert answer.of("sentence-end") == []
        call = server.call_that_ended(dialogue.task_id)
        assert (call["outcome"], call["characters"]) == ("cancelled", answer.characters)
        assert (await dialogue.say("好。")).characters == 3


async def test_a_cancel_that_comes_too_late_is_no_error(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        await dialogue.say("好。")
        await dialogue.cancel()
        assert (await dialogue.say("好。")).characters == 3


async def test_an_idle_socket_is_closed(start_sandbox: Start) -> None:
    server = start_sandbox(SandboxOptions(idle_timeout_seconds=0.3))
    async with dial(server.ws_url) as dialogue:
        assert (await dialogue.say("好。")).characters == 3
        finished = time.monotonic()
        assert await dialogue.closed() == 1000
        assert 0.2 < time.monotonic() - finished < 3.0


async def test_a_task_without_text_fails_after_the_gap(start_sandbox: Start) -> None:
    server = start_sandbox(SandboxOptions(gap_timeout_seconds=0.6, idle_timeout_seconds=0.1))
    async with dial(server.ws_url) as dialogue:
        await dialogue.start()
        for _ in range(3):
            await asyncio.sleep(0.25)
            await dialogue.text("没完")
        waiting = time.monotonic()
        assert await dialogue.failure() == ("InvalidParameter", "request timeout after 0.6 seconds.")
        assert time.monotonic() - waiting > 0.4


async def test_the_gap_counts_only_while_no_audio_is_sent(start_sandbox: Start) -> None:
    server = start_sandbox(SandboxOptions(gap_timeout_seconds=0.3, speed=1.0))
    async with dial(server.ws_url) as dialogue:
        await dialogue.start()
        await dialogue.text("天气？")
        speaking = time.monotonic()
        answer = await dialogue.listen("sentence-end")
        assert time.monotonic() - speaking > 0.35
        assert answer.frames
        assert (await dialogue.failure())[1] == "request timeout after 0.3 seconds."


async def test_realtime_audio_comes_as_fast_as_it_plays(start_sandbox: Start) -> None:
    server = start_sandbox(SandboxOptions(speed=1.0))
    async with dial(server.ws_url) as dialogue:
        started = time.monotonic()
        answer = await dialogue.say("天气怎么样？")
        elapsed = time.monotonic() - started
    last_frame = len(answer.frames[-1]) / 44100
    assert elapsed == pytest.approx(len(answer.audio) / 44100 - last_frame, abs=0.3)


async def test_a_slow_reader_holds_the_speech_up(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        await dialogue.start(sample_rate=48000)
        await dialogue.text(LONG_TEXT)
        await dialogue.finish()
        sent = -1
        while (now := int(str(sandbox.calls(dialogue.task_id)["audio_frames"]))) != sent:
            sent = now
            await asyncio.sleep(0.25)
        answer = await dialogue.listen()
    assert 0 < sent < len(answer.frames)
    assert sandbox.call_that_ended(dialogue.task_id)["audio_frames"] == len(answer.frames)


async def test_a_client_that_leaves_ends_its_task(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        await dialogue.start(sample_rate=48000)
        await dialogue.text(LONG_TEXT)
        await receive_frames(dialogue, 3)
        dialogue.connection.transport.abort()
    call = sandbox.call_that_ended(dialogue.task_id)
    assert call["outcome"] == "disconnected"
    assert 0 < int(str(call["characters"])) < 1000


async def test_submissions_are_limited_per_key_and_model(start_sandbox: Start) -> None:
    server = start_sandbox(SandboxOptions(rate_limit_per_second=2))
    throttled = ("Throttling.RateQuota", "Requests rate limit exceeded, please try again later.")
    async with dial(server.ws_url) as one, dial(server.ws_url) as two, dial(server.ws_url, "sk-test-2") as other:
        await one.start()
        await one.send("run-task", run_payload(), task_id="replacement")
        await one.listen()
        await two.run()
        assert await two.failure() == throttled
        await other.start()
        async with dial(server.ws_url) as another_model:
            await another_model.start("cosyvoice-v3-plus")
        await asyncio.sleep(1.0)
        async with dial(server.ws_url) as later:
            await later.start()


async def test_many_sockets_speak_at_once(sandbox: RunningSandbox) -> None:
    async def one(number: int) -> int:
        async with dial(sandbox.ws_url) as dialogue:
            answer = await dialogue.say("字" * (number + 1) + "。")
            assert kind(answer.events[-1]) == "task-finished"
            return answer.characters

    counts = await asyncio.gather(*(one(number) for number in range(20)))
    assert counts == [2 * number + 3 for number in range(20)]
