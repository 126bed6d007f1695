from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import httpx
import pytest

from app.sandbox import SandboxOptions
from app.sandbox.characters import count_characters
from app.sandbox.sentences import SentenceCutter
from tests.servers import NO_AUTHORITIES

from .conftest import RunningSandbox
from .dialogue import dial

pytestmark = pytest.mark.anyio

Start = Callable[[SandboxOptions], RunningSandbox]
STORY = "他说：“走吧！”然后 3.14 个 example.com 的人 left. Really?! 好的……😀再见，\n第二天。 " * 3


async def test_text_may_come_character_by_character(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        answer = await dialogue.say(*STORY)
    call = sandbox.call_that_ended(dialogue.task_id)
    assert (call["text"], call["messages"], call["flushes"]) == (STORY, len(STORY), 0)
    assert answer.characters == call["characters"] == count_characters(STORY)
    spoken = "".join(answer.sentences)
    assert STORY.startswith(spoken)
    assert STORY.removeprefix(spoken).strip() == ""
    assert [event["payload"]["usage"]["characters"] for event in answer.of("sentence-end")] == list(
        accumulate(map(count_characters, answer.sentences))
    )


@pytest.mark.parametrize("seed", range(20))
def test_no_way_to_split_a_text_loses_any_of_it(seed: int) -> None:
    chance = random.Random(seed)
    cutter = SentenceCutter()
    sentences: list[str] = []
    position = 0
    while position < len(STORY):
        length = chance.randint(1, 9)
        cutter.add(STORY[position : position + length])
        position += length
        if chance.random() < 0.2:
            cutter.flush()
        if chance.random() < 0.6:
            sentences += iter(cutter.take, None)
    assert cutter.holds_speech() == any(map(str.isalnum, STORY[len("".join(sentences)) :]))
    cutter.flush()
    sentences += iter(cutter.take, None)
    assert "".join(sentences) + cutter.take_silent_rest() == STORY


async def test_the_gap_is_the_silence_since_the_last_text(start_sandbox: Start) -> None:
    """Audio doesn't count, but it doesn't start the count over either, and a flush is no text."""
    server = start_sandbox(SandboxOptions(gap_timeout_seconds=0.6, speed=1.0))
    async with dial(server.ws_url) as dialogue:
        await dialogue.start()
        texted = time.monotonic()
        await dialogue.text("没完没了")
        await asyncio.sleep(0.4)
        await dialogue.flush()
        await dialogue.listen("sentence-end")
        spoken = time.monotonic()
        assert (await dialogue.failure())[1] == "request timeout after 0.6 seconds."
        failed = time.monotonic()
    assert failed - spoken < 0.4
    assert failed - texted > 0.9


async def test_a_task_takes_so_many_characters_and_no_more(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        await dialogue.start()
        for _ in range(10):
            await dialogue.text("a" * 20_000)
        await dialogue.text("a")
        assert (await dialogue.listen("task-failed")).error[0] == "InvalidParameter"
    call = sandbox.call_that_ended(dialogue.task_id)
    assert (len(str(call["text"])), call["messages"]) == (200_000, 11)


async def test_the_log_tells_how_tasks_ran_beside_each_other(start_sandbox: Start) -> None:
    server = start_sandbox(SandboxOptions())
    began = time.time()
    async with dial(server.ws_url) as one, dial(server.ws_url) as two:
        await one.start(format="Default", sample_rate=0)
        await one.text("一")
        await one.flush()
        await one.listen("sentence-end")
        await two.say("二。", format="wav", sample_rate=16000)
        await one.text("三。")
        await one.finish()
        await one.listen()
    refused = await refused_task(server)
    calls: list[dict[str, Any]] = httpx.get(f"{server.http_url}/_sandbox/calls", verify=NO_AUTHORITIES).json()
    assert [call["task_id"] for call in calls] == [one.task_id, two.task_id, refused]
    shown = ("connection", "text", "messages", "flushes", "characters", "outcome", "format", "sample_rate")
    assert [tuple(call[name] for name in shown) for call in calls] == [
        (1, "一三。", 3, 1, 5, "finished", "mp3", 22050),
        (2, "二。", 1, 0, 3, "finished", "wav", 16000),
        (3, "", 0, 0, 0, "failed", None, None),
    ]
    first, second, third = calls
    times = [began, first["submitted_at"], second["submitted_at"], second["ended_at"], first["ended_at"]]
    assert times == sorted(times)
    assert first["ended_at"] <= third["submitted_at"] <= third["ended_at"] <= time.time()


async def refused_task(server: RunningSandbox) -> str:
    async with dial(server.ws_url) as dialogue:
        await dialogue.run(voice="nobody")
        await dialogue.failure()
        return dialogue.task_id


async def test_tasks_can_hang_until_the_faults_are_replaced(start_sandbox: Start) -> None:
    server = start_sandbox(SandboxOptions())
    faults = f"{server.http_url}/_sandbox/faults"
    httpx.put(faults, json={"hold_tasks": 2}).raise_for_status()
    async with dial(server.ws_url) as hung, dial(server.ws_url) as cancelled, dial(server.ws_url) as lucky:
        for dialogue in (hung, cancelled):
            await dialogue.start()
            await dialogue.text("好。")
            await dialogue.finish()
            await dialogue.listen("sentence-begin")
        assert (await lucky.say("好。")).frames
        assert httpx.get(faults).json()["hold_tasks"] == 0
        for dialogue in (hung, cancelled):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(dialogue.connection.recv(), 0.1)
        await cancelled.cancel()
        assert (await cancelled.listen()).characters == 0
        httpx.delete(faults).raise_for_status()
        answer = await hung.listen()
    assert answer.frames
    assert answer.characters == 3


async def test_a_held_task_whose_text_stops_fails_after_the_gap(start_sandbox: Start) -> None:
    server = start_sandbox(SandboxOptions(gap_timeout_seconds=0.3))
    httpx.put(f"{server.http_url}/_sandbox/faults", json={"hold_tasks": 1}).raise_for_status()
    async with dial(server.ws_url) as dialogue:
        await dialogue.start()
        await dialogue.text("好。没完")
        assert (await dialogue.failure())[1] == "request timeout after 0.3 seconds."


async def test_a_task_told_to_be_silent_does_not_even_time_out(start_sandbox: Start) -> None:
    server = start_sandbox(SandboxOptions(gap_timeout_seconds=0.2))
    fault = {"break_tasks": 1, "break_how": "silent"}
    httpx.put(f"{server.http_url}/_sandbox/faults", json=fault).raise_for_status()
    async with dial(server.ws_url) as dialogue:
        await dialogue.start()
        await dialogue.text("好。没完")
        await dialogue.listen("sentence-begin")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(dialogue.connection.recv(), 0.4)
