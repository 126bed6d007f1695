from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from app.sandbox import SandboxOptions
from app.sandbox.voice import SPEECH_RATE

from .conftest import RunningSandbox
from .dialogue import Answer, dial

pytestmark = pytest.mark.anyio

Start = Callable[[SandboxOptions], RunningSandbox]
QUIET = 0.06
"""What is silence next to the loudest sample: a passage may itself be half as loud as the loudest."""


def words_of(answer: Answer) -> list[list[dict[str, Any]]]:
    return [event["payload"]["output"]["sentence"]["words"] for event in answer.of("sentence-end")]


@pytest.mark.parametrize("rate", [0.5, 1.0])
async def test_words_are_where_they_are_heard(sandbox: RunningSandbox, rate: float) -> None:
    text = '<speak>你好<break time="2s"/>世界。</speak><speak>See you tomorrow, 再见</speak>'
    async with dial(sandbox.ws_url) as dialogue:
        answer = await dialogue.say(text, enable_ssml=True, word_timestamp_enabled=True, rate=rate)
    samples = memoryview(answer.audio).cast("h")
    words = [word for words in words_of(answer) for word in words]
    assert [word["text"] for word in words] == [*"你好世界", "See", "you", "tomorrow", *"再见"]
    assert words[2]["begin_time"] - words[1]["end_time"] >= 2000
    silent = QUIET * loudest(samples)
    step = SPEECH_RATE // 100
    heard_until = 0
    for word in words:
        begin, end = (round(word[time] * SPEECH_RATE / 1000) for time in ("begin_time", "end_time"))
        assert loudest(samples[heard_until:begin]) < silent
        assert loudest(samples[max(0, begin - step) : begin + 2 * step]) > silent / 4
        assert loudest(samples[end - 2 * step : end + step]) > silent / 4
        assert loudest(samples[begin:end]) > 2 * silent
        heard_until = end
    assert loudest(samples[heard_until:]) < silent


def loudest(samples: memoryview) -> int:
    return max((abs(sample) for sample in samples.tolist()), default=0)


async def test_all_words_can_come_with_the_end_of_the_task(start_sandbox: Start, sandbox: RunningSandbox) -> None:
    server = start_sandbox(SandboxOptions(words_in="task-finished"))
    texts = "我用 iPhone。", "第二句"
    async with dial(sandbox.ws_url) as usual, dial(server.ws_url) as dialogue:
        expected = [word for words in words_of(await usual.say(*texts, word_timestamp_enabled=True)) for word in words]
        answer = await dialogue.say(*texts, word_timestamp_enabled=True)
        without = await dialogue.say(*texts)
    assert words_of(answer) == [[], []]
    finished = answer.events[-1]["payload"]
    assert finished == {
        "usage": {"characters": answer.characters},
        "output": {"sentence": {"words": finished_words(answer)}},
    }
    assert [(word["text"], word["begin_index"]) for word in finished_words(answer)] == [
        ("我", 0),
        ("用", 1),
        ("iPhone", 3),
        ("第", 0),
        ("二", 1),
        ("句", 2),
    ]
    assert finished_words(answer) == expected
    assert without.events[-1]["payload"] == {"usage": {"characters": answer.characters}}


async def test_a_cancelled_task_ends_with_the_words_so_far(start_sandbox: Start) -> None:
    server = start_sandbox(SandboxOptions(words_in="task-finished"))
    async with dial(server.ws_url) as dialogue:
        await dialogue.start(word_timestamp_enabled=True)
        await dialogue.text("好。没完")
        await dialogue.listen("sentence-end")
        await dialogue.cancel()
        assert [word["text"] for word in finished_words(await dialogue.listen())] == ["好"]


def finished_words(answer: Answer) -> list[dict[str, Any]]:
    words: list[dict[str, Any]] = answer.events[-1]["payload"]["output"]["sentence"]["words"]
    return words


async def test_the_last_sentence_may_come_without_its_text(start_sandbox: Start) -> None:
    server = start_sandbox(SandboxOptions(last_original_text=False))
    async with dial(server.ws_url) as dialogue:
        await dialogue.start()
        await dialogue.text("第一句。第二句")
        first = await dialogue.listen("sentence-end")
        await dialogue.finish()
        last = await dialogue.listen()
    for kind in ("sentence-begin", "sentence-end"):
        assert first.of(kind)[0]["payload"]["output"]["original_text"] == "第一句。"
        assert "original_text" not in last.of(kind)[0]["payload"]["output"]
