from __future__ import annotations

import json
import uuid
from itertools import pairwise
from typing import Any

import pytest

from .conftest import RunningSandbox
from .dialogue import decode, dial, height, kind, likeness, run_payload

pytestmark = pytest.mark.anyio

POEM = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"


async def test_a_task_from_start_to_finish(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        answer = await dialogue.say("今天天气怎么样？", "Hello world.")
        call = sandbox.call_that_ended(dialogue.task_id)

    assert answer.sentences == ["今天天气怎么样？", "Hello world."]
    assert [event["payload"]["usage"]["characters"] for event in answer.of("sentence-end")] == [15, 27]
    assert answer.characters == 27
    uuid.UUID(answer.events[-1]["header"]["attributes"]["request_uuid"])
    assert answer.events[-1]["payload"] == {"usage": {"characters": 27}}
    begun: list[int] = []
    for event in answer.events[:-1]:
        output = event["payload"]["output"]
        if kind(event) == "sentence-begin":
            begun.append(output["sentence"]["index"])
        assert output["sentence"]["index"] == begun[-1]
        assert output["sentence"]["words"] == []
    assert begun == [0, 1]
    assert all(len(frame) <= 8000 for frame in answer.frames)
    assert len(answer.frames) > 4
    assert call["outcome"] == "finished"
    assert call["text"] == "今天天气怎么样？Hello world."
    assert (call["characters"], call["audio_frames"], call["audio_bytes"]) == (
        27,
        len(answer.frames),
        len(answer.audio),
    )


@pytest.mark.parametrize("trailing", ["", "/"])
@pytest.mark.parametrize("key", ["sk-test-1", "  sk-test-1"])
async def test_both_paths_and_any_key_are_served(sandbox: RunningSandbox, trailing: str, key: str) -> None:
    async with dial(sandbox.ws_url + trailing, key) as dialogue:
        assert (await dialogue.say("好")).characters == 2


async def test_complete_sentences_are_spoken_at_once_and_the_tail_on_flush(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        await dialogue.start()
        await dialogue.text("第一句。第二")
        assert (await dialogue.listen("sentence-end")).sentences == ["第一句。"]
        await dialogue.flush()
        assert (await dialogue.listen("sentence-end")).sentences == ["第二"]
        await dialogue.text("第三")
        await dialogue.finish()
        answer = await dialogue.listen()
    assert answer.sentences == ["第三"]
    assert answer.characters == 7 + 4 + 4


@pytest.mark.parametrize("audio_format", ["pcm", "mp3", "opus"])
async def test_a_stream_is_whole_when_the_finish_comes_after_the_last_sentence(
    sandbox: RunningSandbox, audio_format: str
) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        at_once = await dialogue.say("今天天气怎么样？", format=audio_format)
        await dialogue.start(format=audio_format)
        await dialogue.text("今天天气怎么样？")
        first = await dialogue.listen("sentence-end")
        await dialogue.finish()
        rest = await dialogue.listen()
    assert rest.sentences == []
    assert rest.characters == 15
    late = decode(first.audio + rest.audio, audio_format, 22050)[1]
    assert late == pytest.approx(decode(at_once.audio, audio_format, 22050)[1], abs=0.05)


async def test_several_tasks_on_one_socket(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        for text in ("一。", "二二。", "三三三。"):
            answer = await dialogue.say(text)
            assert answer.characters == 2 * len(text) - 1
            assert answer.events[0]["payload"]["output"]["sentence"]["index"] == 0


async def test_a_new_task_replaces_a_running_one(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        await dialogue.start()
        await dialogue.text("第一句。没完")
        await dialogue.listen("sentence-end")
        first = dialogue.task_id
        await dialogue.send("run-task", run_payload(), task_id="second-" + first)
        replaced = await dialogue.listen()
        dialogue.task_id = "second-" + first
        assert kind(await dialogue.event()) == "task-started"
        await dialogue.text("新的。")
        await dialogue.finish()
        answer = await dialogue.listen()
    assert replaced.characters == 7
    assert answer.sentences == ["新的。"]
    assert sandbox.call_that_ended(first)["outcome"] == "replaced"
    assert sandbox.call_that_ended(dialogue.task_id)["outcome"] == "finished"


async def test_trailing_punctuation_is_counted_but_not_spoken(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        answer = await dialogue.say("好。", " ", "……")
    assert answer.characters == 6
    assert len(answer.sentences) == 1


async def test_the_official_sdk_is_understood(sandbox: RunningSandbox) -> None:
    """§1.4: DEFAULT format with rate 0, a `type`, a seed, SSML switched on for plain text, model fields repeated."""
    async with dial(sandbox.ws_url) as dialogue:
        await dialogue.start(
            format="Default", sample_rate=0, type=0, seed=0, volume=50, rate=1.0, pitch=1.0, enable_ssml=True
        )
        repeated = {key: run_payload()[key] for key in ("model", "task_group", "task", "function")}
        await dialogue.send("continue-task", {**repeated, "input": {"text": "你好，世界。"}})
        await dialogue.finish()
        answer = await dialogue.listen()
    assert answer.characters == 10
    assert decode(answer.audio, "mp3", 22050)[1] > 0.8


async def test_word_timestamps_cover_the_sentence(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        answer = await dialogue.say("我用 iPhone。第二句。", word_timestamp_enabled=True)
        silent = await dialogue.say("好。", word_timestamp_enabled=True, voice="loongandy_v3")
    ends = [event["payload"]["output"]["sentence"]["words"] for event in answer.of("sentence-end")]
    assert [[word["text"] for word in words] for words in ends] == [["我", "用", "iPhone"], ["第", "二", "句"]]
    assert (ends[0][2]["begin_index"], ends[0][2]["end_index"]) == (3, 9)
    words = ends[0] + ends[1]
    assert all(word["begin_time"] < word["end_time"] for word in words)
    assert all(word["end_time"] <= after["begin_time"] for word, after in pairwise(words))
    assert words[-1]["end_time"] / 1000 <= decode(answer.audio, "pcm", 22050)[1]
    assert silent.of("sentence-end")[0]["payload"]["output"]["sentence"]["words"] == []


async def test_ssml_is_spoken_with_its_pauses_and_rate(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        plain = await dialogue.say("<speak>你好世界。</speak>", enable_ssml=True)
        paused = await dialogue.say('<speak>你好<break time="2s"/>世界。</speak>', enable_ssml=True)
        slow = await dialogue.say('<speak rate="0.5">你好世界。</speak>', enable_ssml=True)
    assert plain.characters == paused.characters == slow.characters == 9
    plain_seconds = decode(plain.audio, "pcm", 22050)[1]
    assert decode(paused.audio, "pcm", 22050)[1] > plain_seconds + 1.8
    assert decode(slow.audio, "pcm", 22050)[1] > plain_seconds * 1.4


async def test_tags_are_plain_text_unless_ssml_is_on(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        assert (await dialogue.say("<speak>你好</speak>")).characters == 19


async def test_volume_rate_pitch_and_voice_can_be_heard(sandbox: RunningSandbox) -> None:
    async def heard(**parameters: Any) -> tuple[list[int], float]:
        return decode((await dialogue.say(POEM, **parameters)).audio, "pcm", 22050)

    async with dial(sandbox.ws_url) as dialogue:
        normal, seconds = await heard()
        silent, _ = await heard(volume=0)
        loud, _ = await heard(volume=100)
        slow = (await heard(rate=0.5))[1]
        fast = (await heard(rate=2.0))[1]
        low, low_seconds = await heard(pitch=0.7)
        high, _ = await heard(pitch=1.6)
        other, _ = await heard(voice="longanhuan")
    assert max(map(abs, silent)) == 0
    assert 3000 < max(map(abs, normal)) < max(map(abs, loud))
    assert slow > 1.5 * seconds > 2.2 * fast
    assert low_seconds == pytest.approx(seconds, rel=0.05)
    assert height(low) < 0.85 * height(normal) < height(normal) < 0.8 * height(high)
    assert abs(height(other) / height(normal) - 1) > 0.05


@pytest.mark.parametrize("audio_format", ["pcm", "wav", "mp3", "opus"])
@pytest.mark.parametrize("sample_rate", [8000, 16000, 22050, 24000, 44100, 48000])
async def test_every_format_and_rate_holds_the_same_speech(
    sandbox: RunningSandbox, audio_format: str, sample_rate: int
) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        reference = await dialogue.say(POEM)
        answer = await dialogue.say(POEM, format=audio_format, sample_rate=sample_rate)
    expected, expected_seconds = decode(reference.audio, "pcm", 22050)
    samples, seconds = decode(answer.audio, audio_format, sample_rate)
    assert seconds == pytest.approx(expected_seconds, abs=0.2)
    assert likeness(expected, samples) > 0.9
    headers = {"wav": b"RIFF\xff\xff\xff\xffWAVE", "opus": b"OggS", "mp3": b"\xff"}
    assert answer.frames[0].startswith(headers.get(audio_format, b""))
    if audio_format == "wav":
        assert answer.audio.count(b"RIFF") == 1


@pytest.mark.parametrize(
    "text", ["中", "Hello", "2025年", "我爱 Python 和 Go", "こんにちは", "안녕하세요", "Привет", "★"]
)
async def test_no_sentence_is_silent(sandbox: RunningSandbox, text: str) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        samples, seconds = decode((await dialogue.say(text)).audio, "pcm", 22050)
    assert seconds > 0.3
    assert max(map(abs, samples)) > 1000


async def test_the_socket_hears_a_cancel_sent_as_raw_json(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        await dialogue.start()
        await dialogue.connection.send(
            json.dumps(
                {
                    "header": {"action": "finish-task", "task_id": dialogue.task_id},
                    "payload": {"input": {"directive": "cancel"}},
                }
            )
        )
        assert (await dialogue.listen()).characters == 0
        assert (await dialogue.say("好")).characters == 2
