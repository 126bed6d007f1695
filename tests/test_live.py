"""Live text to speech, spec 1.4: heard while it is written."""

import asyncio
import json
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, sync_playwright
from websockets.exceptions import ConnectionClosed

from tests.conftest import PASSWORD, Account, CreateAccount
from tests.servers import ENDED_GRACEFULLY, Sandbox, Server, run_backend
from tests.skipping import skip_without
from tests.sound import decode, duration, loudness
from tests.talking import (
    LONG_TEXT,
    MODEL,
    SENTENCE,
    VOICE,
    Heard,
    Messages,
    cost,
    kept_audio,
    live_url,
    provider_calls,
    record,
    records,
    talking,
    token_of,
)
from tests.test_docs_pages import FLAGS, PATIENCE_MS

FORMATS = ["pcm", "wav", "mp3", "opus"]
ENDING = {"type", "characters", "duration", "record_id", "bill", "audio_url"}
NOTHING_SAID = {"characters": 0, "duration": 0, "bill": "0"}
SILENT_SECONDS = 0.3


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory, realtime_sandbox: Sandbox) -> Iterator[Server]:
    """A server that closes idle sessions after a second, and takes few characters in an utterance."""
    settings = {**realtime_sandbox.settings, "STREAM_IDLE_SECONDS": "1", "LONG_TEXT_MAX_CHARS": "300"}
    with run_backend(tmp_path_factory.mktemp("impatient"), settings) as running:
        yield running


# Who may talk


@pytest.mark.parametrize(
    ("way", "answer"),
    [("header", None), ("query", None), ("bearer", "bearer"), ("alone", "the token"), ("header and bearer", "bearer")],
)
async def test_a_token_is_taken_in_every_way(backend: Server, account: Account, way: str, answer: str | None) -> None:
    token = token_of(account)
    ways: dict[str, dict[str, Any]] = {
        "header": {"headers": {"Authorization": f"bearer {token}"}},
        "query": {"token": token},
        "bearer": {"subprotocols": ["bearer", token]},
        "alone": {"subprotocols": [token]},
        "header and bearer": {"headers": {"Authorization": f"Bearer {token}"}, "subprotocols": ["bearer"]},
    }
    async with talking(backend, None, **ways[way]) as talk:
        assert talk.socket.subprotocol == (token if answer == "the token" else answer)
        assert (await talk.speak("你好")).message["characters"] == 4


@pytest.mark.parametrize(
    "claim",
    [
        {},
        {"headers": {"Authorization": "Bearer nonsense"}},
        {"headers": {"Authorization": "Basic dXNlcjpwYXNz"}},
        {"token": "a.b.c"},
        {"token": ""},
        {"subprotocols": ["bearer"]},
        {"subprotocols": ["bearer", "a.b.c"]},
        {"subprotocols": ["a.b.c"]},
    ],
)
async def test_who_is_not_logged_in_is_told(backend: Server, claim: dict[str, Any]) -> None:
    async with talking(backend, None, **claim) as talk:
        refusal = await talk.refusal()
    assert refusal.brief == (401, "UNAUTHORIZED", 1008)
    assert "登录" in refusal.message["message"]


async def test_a_token_that_was_tampered_with_is_refused(backend: Server, account: Account) -> None:
    head, body, signature = token_of(account).split(".")
    for forged in (f"{head}.{body}.{signature[::-1]}", f"{head}.{body}."):
        async with talking(backend, None, token=forged) as talk:
            assert (await talk.refusal()).brief == (401, "UNAUTHORIZED", 1008)


async def test_without_a_key_nothing_is_opened(backend: Server, create_account: CreateAccount) -> None:
    keyless = await create_account(backend, api_key=None)
    async with talking(backend, keyless) as talk:
        refusal = await talk.refusal()
    assert refusal.brief == (403, "NO_API_KEY", 1008)
    assert (await keyless.history())["total"] == 0


async def test_the_handshake_names_the_request(backend: Server, account: Account) -> None:
    async with talking(backend, account) as talk:
        assert talk.socket.response
        assert re.fullmatch(r"[0-9a-f]{32}", talk.socket.response.headers["X-Request-Id"])
    async with talking(backend, account, headers={"X-Request-Id": "mine-1"}) as talk:
        assert talk.socket.response
        assert talk.socket.response.headers["X-Request-Id"] == "mine-1"
        await talk.speak("你好")
    settled = [line for line in backend.log.splitlines() if '"mine-1"' in line]
    assert any("record_settled" in line for line in settled)


# How it sounds


async def test_the_defaults_are_those_of_the_spec(backend: Server, account: Account, sandbox: Sandbox) -> None:
    async with talking(backend, account) as talk:
        await talk.speak("你好")
    [call] = await provider_calls(sandbox, account)
    assert call["model"] == MODEL
    assert call["parameters"] == {
        "text_type": "PlainText",
        "voice": VOICE,
        "format": "pcm",
        "sample_rate": 22050,
        "volume": 50,
        "rate": 1.0,
        "pitch": 1.0,
        "enable_ssml": False,
    }


@pytest.mark.parametrize("edge", [0, 1])
async def test_parameters_reach_the_provider_up_to_their_bounds(
    backend: Server, account: Account, sandbox: Sandbox, edge: int
) -> None:
    asked: dict[str, Any] = {
        "format": "wav",
        "sample_rate": [8000, 48000][edge],
        "volume": [0, 100][edge],
        "speech_rate": ["0.5", "2.0"][edge],
        "pitch_rate": ["0.5", "2"][edge],
        "instruction": "你说话的情感是happy。",
    }
    async with talking(backend, account, **asked) as talk:
        assert (await talk.speak("你好")).message["type"] == "complete"
    [call] = await provider_calls(sandbox, account)
    sent = call["parameters"]
    assert {name: sent[name] for name in ("format", "sample_rate", "volume", "rate", "pitch", "instruction")} == {
        **{name: asked[name] for name in ("format", "sample_rate", "volume", "instruction")},
        "rate": float(asked["speech_rate"]),
        "pitch": float(asked["pitch_rate"]),
    }


BAD_PARAMETERS: list[tuple[dict[str, Any], str, str]] = [
    ({"model": None}, "INVALID_REQUEST", "model"),
    ({"voice": None}, "INVALID_REQUEST", "voice"),
    ({"model": "cosyvoice-v9"}, "INVALID_MODEL", "cosyvoice-v9"),
    ({"model": "m" * 65}, "INVALID_REQUEST", "model"),
    ({"model": ""}, "INVALID_MODEL", "模型"),
    ({"voice": "nobody"}, "INVALID_VOICE", "音色"),
    ({"voice": "v" * 129}, "INVALID_REQUEST", "voice"),
    ({"voice": "a\x00b"}, "INVALID_REQUEST", "voice"),
    ({"voice": "longxiaochun_v2"}, "MODEL_VOICE_MISMATCH", "cosyvoice-v2"),
    ({"model": "cosyvoice-v2"}, "MODEL_VOICE_MISMATCH", "longanyang"),
    ({"voice": "cosyvoice-v3-plus-mine-0123abcd"}, "MODEL_VOICE_MISMATCH", "target_model"),
    ({"format": "flac"}, "INVALID_REQUEST", "format"),
    ({"format": "PCM"}, "INVALID_REQUEST", "format"),
    ({"format": ""}, "INVALID_REQUEST", "format"),
    ({"sample_rate": 11025}, "INVALID_REQUEST", "sample_rate"),
    ({"sample_rate": "22050.0"}, "INVALID_REQUEST", "sample_rate"),
    ({"sample_rate": "fast"}, "INVALID_REQUEST", "sample_rate"),
    ({"sample_rate": "9" * 5000}, "INVALID_REQUEST", "sample_rate"),
    ({"volume": 101}, "INVALID_REQUEST", "volume 必须小于等于 100"),
    ({"volume": -1}, "INVALID_REQUEST", "volume 必须大于等于 0"),
    ({"volume": "50.5"}, "INVALID_REQUEST", "volume"),
    ({"speech_rate": 0.49}, "INVALID_REQUEST", "speech_rate 必须大于等于 0.5"),
    ({"speech_rate": 2.01}, "INVALID_REQUEST", "speech_rate 必须小于等于 2"),
    ({"speech_rate": "nan"}, "INVALID_REQUEST", "speech_rate"),
    ({"pitch_rate": 0.49}, "INVALID_REQUEST", "pitch_rate 必须大于等于 0.5"),
    ({"pitch_rate": 2.01}, "INVALID_REQUEST", "pitch_rate 必须小于等于 2"),
    ({"pitch_rate": "inf"}, "INVALID_REQUEST", "pitch_rate"),
    ({"instruction": "好" * 51}, "INVALID_REQUEST", "instruction"),
    ({"instruction": "a\x00b"}, "INVALID_REQUEST", "instruction"),
    ({"voice": "longyingjing_v3", "instruction": "你说话的情感是happy。"}, "INVALID_REQUEST", "instruction"),
]


async def test_what_is_wrong_is_told_before_anything_is_said(
    backend: Server, account: Account, sandbox: Sandbox
) -> None:
    async def refused(asked: dict[str, Any], error: str, part: str) -> str | None:
        async with talking(backend, account, **asked) as talk:
            refusal = await talk.refusal()
        fine = refusal.brief == (400, error, 1008) and part in refusal.message["message"]
        return None if fine else f"{str(asked)[:80]}: {refusal}"

    wrong = await asyncio.gather(*(refused(*each) for each in BAD_PARAMETERS))
    assert [each for each in wrong if each] == []
    assert sandbox.calls(account.api_key) == []
    assert (await account.history())["total"] == 0


async def test_a_cloned_voice_speaks_and_an_unknown_one_does_not(
    backend: Server, account: Account, sandbox: Sandbox
) -> None:
    [voice_id] = sandbox.add_voices(account.api_key)
    async with talking(backend, account, voice=voice_id) as talk:
        assert (await talk.speak("你好")).message["type"] == "complete"
    [call] = await provider_calls(sandbox, account)
    assert call["parameters"]["voice"] == voice_id
    async with talking(backend, account, voice=f"{MODEL}-mine-0123abcd") as talk:
        await talk.say(SENTENCE)
        refusal = await talk.refusal()
    assert refusal.message["code"] in {400, 404}
    assert refusal.close_code == 1008


# Speaking


async def test_typing_is_heard_before_it_ends(backend: Server, account: Account, sandbox: Sandbox) -> None:
    text = "春天来了，小河解冻了。The birds sing, 花儿开了！还有 3.14 和“引号”。\n再见…"
    async with talking(backend, account) as talk:
        hearing = asyncio.create_task(talk.hear())
        for token in text:
            await talk.say(token)
            await asyncio.sleep(0.03)
        typed_at = time.monotonic()
        await talk.end()
        heard = await hearing
    assert heard.message["type"] == "complete"
    assert heard.arrivals[0] < typed_at - 0.5
    [call] = await provider_calls(sandbox, account)
    assert call["text"] == text
    assert call["messages"] > len(text) / 2
    assert call["characters"] == heard.message["characters"]
    assert json.loads((await record(account))["input_data"])["text"] == text


@pytest.mark.parametrize("audio_format", FORMATS)
@pytest.mark.parametrize("sample_rate", [16000, 22050])
async def test_complete_tells_what_was_spoken_and_the_same_is_kept(
    backend: Server, account: Account, sandbox: Sandbox, audio_format: str, sample_rate: int
) -> None:
    async with talking(backend, account, format=audio_format, sample_rate=sample_rate) as talk:
        heard = await talk.speak("今天天气", "真好。我们去", "公园吧！")
    [call] = await provider_calls(sandbox, account)
    item = await record(account)
    told = heard.message
    assert told == {
        "type": "complete",
        "characters": call["characters"],
        "duration": item["duration"],
        "record_id": item["id"],
        "bill": cost(call["characters"]),
        "audio_url": item["output_url"],
    }
    assert call["characters"] == 26
    assert (type(told["characters"]), type(told["duration"]), type(told["record_id"])) == (int, float, int)
    assert re.search(rf"/audio/tts/\d{{8}}/[0-9a-f-]{{36}}\.{audio_format}$", told["audio_url"])
    kept = await kept_audio(account, item)
    assert len(heard.audio) == len(kept) == call["audio_bytes"]
    head = 44 if audio_format == "wav" else 0
    assert heard.audio[head:] == kept[head:]
    samples, rate = decode(kept, audio_format, sample_rate)
    assert rate == (48000 if audio_format == "opus" else sample_rate)
    assert loudness(samples) > 100
    assert abs(len(samples) / rate - told["duration"]) <= 0.05
    assert abs(duration(heard.audio, audio_format, sample_rate) - told["duration"]) <= 0.05


async def test_the_record_is_like_that_of_any_synthesis(backend: Server, account: Account) -> None:
    async with talking(backend, account, format="mp3", volume=70) as talk:
        heard = await talk.speak("你好，", "世界。")
    item = await record(account)
    assert (item["type"], item["model_name"], item["bill"]) == ("tts", MODEL, cost(10))
    assert item["id"] == heard.message["record_id"]
    assert "status" not in item
    assert json.loads(item["input_data"]) == {
        "text": "你好，世界。",
        "voice": VOICE,
        "format": "mp3",
        "sample_rate": 22050,
        "volume": 70,
        "speech_rate": 1.0,
        "pitch_rate": 1.0,
    }
    shown = (await account.client.get(f"/api/audio/records/{item['id']}")).json()["data"]
    assert (shown["output_url"], shown["duration"]) == (item["output_url"], item["duration"])
    assert shown["status"] == "succeeded"


async def test_utterances_follow_each_other_and_may_be_said_ahead(
    backend: Server, account: Account, sandbox: Sandbox
) -> None:
    texts = ["第一句话。", "第二句话，长一点。", "第三句话，又更长了一点点。"]
    async with talking(backend, account) as talk:
        first = await talk.speak(texts[0])
        for text in texts[1:]:
            await talk.say(text[:3], text[3:])
            await talk.end()
        heard = [first, await talk.hear(), await talk.hear()]
    items = await records(account, 3)
    calls = await provider_calls(sandbox, account, 3)
    assert [call["text"] for call in calls] == texts
    assert len({call["connection"] for call in calls}) == 1
    assert [each.message["record_id"] for each in heard] == [item["id"] for item in items]
    assert [each.message["characters"] for each in heard] == [call["characters"] for call in calls]
    assert [json.loads(item["input_data"])["text"] for item in items] == texts
    assert [each.audio for each in heard] == [await kept_audio(account, item) for item in items]


async def test_flush_speaks_the_unfinished_sentence(backend: Server, account: Account, sandbox: Sandbox) -> None:
    async with talking(backend, account) as talk:
        await talk.flush()
        await talk.say("你好世界")
        assert await talk.hear_for(SILENT_SECONDS) == 0
        await talk.flush()
        await talk.hear_some()
        await talk.say("再见朋友")
        await talk.end()
        heard = await talk.hear()
    [call] = await provider_calls(sandbox, account)
    assert (call["text"], call["flushes"]) == ("你好世界再见朋友", 1)
    assert (heard.message["type"], heard.message["characters"]) == ("complete", 16)
    assert heard.audio == await kept_audio(account, await record(account))


async def test_blanks_and_signs_before_the_first_word_are_kept_for_it(
    backend: Server, account: Account, sandbox: Sandbox
) -> None:
    async with talking(backend, account) as talk:
        await talk.say("  ", "\n", "“", "…，", "")
        await talk.flush()
        assert await talk.hear_for(SILENT_SECONDS) == 0
        assert sandbox.calls(account.api_key) == []
        heard = await talk.speak("你好", "”。")
    [call] = await provider_calls(sandbox, account)
    assert call["text"] == "  \n“…，你好”。"
    assert heard.message["characters"] == call["characters"] == 12
    assert json.loads((await record(account))["input_data"])["text"] == call["text"]


@pytest.mark.parametrize("texts", [[], [""], [" ", "\n\t"], ["，。", "…！"]])
async def test_an_end_without_words_costs_nothing(
    backend: Server, account: Account, sandbox: Sandbox, texts: list[str]
) -> None:
    async with talking(backend, account) as talk:
        for _ in range(2):
            heard = await talk.speak(*texts)
            assert heard.message == {"type": "complete", **NOTHING_SAID}
            assert heard.audio == b""
        assert sandbox.calls(account.api_key) == []
        assert (await account.history())["total"] == 0
        assert (await talk.speak("你好")).message["characters"] == 4
    assert (await provider_calls(sandbox, account))[0]["text"] == "你好"


async def test_thirty_talk_at_once(backend: Server, create_account: CreateAccount, sandbox: Sandbox) -> None:
    accounts = [await create_account(backend) for _ in range(3)]

    async def converse(number: int) -> tuple[Heard, Account]:
        account = accounts[number % 3]
        async with talking(backend, account) as talk:
            hearing = asyncio.create_task(talk.hear())
            for token in f"这是第{number}个人。":
                await talk.say(token)
                await asyncio.sleep(0.01)
            await talk.end()
            return await hearing, account

    for number, (heard, account) in enumerate(await asyncio.gather(*(converse(number) for number in range(30)))):
        told = heard.message
        assert told["type"] == "complete"
        shown = (await account.client.get(f"/api/audio/records/{told['record_id']}")).json()["data"]
        assert json.loads(shown["input_data"])["text"] == f"这是第{number}个人。"
        assert heard.audio == (await account.client.get(told["audio_url"])).content != b""
    for account in accounts:
        spoken = {call["text"] for call in await provider_calls(sandbox, account, 10)}
        assert len(spoken) == 10


# Stopping


async def test_cancel_is_silence_at_once_and_the_session_goes_on(
    realtime_backend: Server, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(realtime_backend)
    async with talking(realtime_backend, account) as talk:
        await talk.say(LONG_TEXT)
        await talk.hear_some(30_000)
        cancelled_at = time.monotonic()
        await talk.cancel()
        heard = await talk.hear()
        assert heard.at - cancelled_at <= 0.3
        assert await talk.hear_for(SILENT_SECONDS) == 0
        [call] = await provider_calls(realtime_sandbox, account)
        item = await record(account)
        assert heard.message.keys() == ENDING
        assert (heard.message["type"], heard.message["record_id"]) == ("cancelled", item["id"])
        assert (item["status"], call["outcome"]) == ("cancelled", "cancelled")
        assert heard.message["characters"] == call["characters"]
        assert 0 < call["characters"] < 100
        assert heard.message["bill"] == item["bill"] == cost(call["characters"])
        assert heard.message["duration"] == item["duration"]
        assert heard.message["audio_url"] == item["output_url"]
        kept = await kept_audio(account, item)
        assert len(kept) == call["audio_bytes"]
        assert kept.startswith(heard.audio)
        assert json.loads(item["input_data"])["text"] == LONG_TEXT
        again = await talk.speak("你好。")
    items = await records(account, 2)
    calls = await provider_calls(realtime_sandbox, account, 2)
    assert again.message["type"] == "complete"
    assert again.audio == await kept_audio(account, items[1])
    assert [call["text"] for call in calls] == [LONG_TEXT, "你好。"]
    assert calls[0]["connection"] == calls[1]["connection"]


async def test_cancel_forgets_what_waits_but_not_what_comes_after(
    realtime_backend: Server, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(realtime_backend)
    async with talking(realtime_backend, account) as talk:
        await talk.say(LONG_TEXT)
        await talk.hear_some()
        await talk.end()
        await talk.say("这句话不说了。")
        await talk.end()
        await talk.cancel()
        await talk.say("你好。")
        await talk.end()
        heard = [await talk.hear(), await talk.hear()]
    assert [each.message["type"] for each in heard] == ["cancelled", "complete"]
    calls = await provider_calls(realtime_sandbox, account, 2)
    assert [call["text"] for call in calls] == [LONG_TEXT, "你好。"]
    items = await records(account, 2)
    assert heard[1].audio == await kept_audio(account, items[1])


async def test_cancel_with_nothing_to_cancel_is_answered(backend: Server, account: Account, sandbox: Sandbox) -> None:
    async with talking(backend, account) as talk:
        await talk.cancel()
        assert (await talk.hear()).message == {"type": "cancelled", **NOTHING_SAID}
        await talk.say("，", " ")
        await talk.cancel()
        assert (await talk.hear()).message == {"type": "cancelled", **NOTHING_SAID}
        await talk.speak("你好")
        await talk.cancel()
        assert (await talk.hear()).message == {"type": "cancelled", **NOTHING_SAID}
        assert (await talk.speak("再见")).message["characters"] == 4
    assert [call["text"] for call in await provider_calls(sandbox, account, 2)] == ["你好", "再见"]


async def test_cancel_before_the_first_audio_is_billed_as_counted(
    backend: Server, account: Account, sandbox: Sandbox
) -> None:
    async with talking(backend, account) as talk:
        await talk.say("这句话没有说完")
        while not any(call["text"] for call in sandbox.calls(account.api_key)):
            await asyncio.sleep(0.02)
        await talk.cancel()
        heard = await talk.hear()
    [call] = await provider_calls(sandbox, account)
    item = await record(account)
    assert (item["status"], call["outcome"], heard.audio) == ("cancelled", "cancelled", b"")
    assert heard.message["record_id"] == item["id"]
    assert heard.message["characters"] == call["characters"]
    assert (heard.message["bill"], heard.message["duration"]) == (cost(call["characters"]), 0)
    assert "audio_url" not in heard.message


async def test_every_cancel_is_answered_whenever_it_comes(backend: Server, account: Account) -> None:
    async def race(wait: float) -> Messages:
        """A cancel that may cross the end: the messages up to the next utterance's."""
        async with talking(backend, account) as talk:
            await talk.say("你好。")
            await talk.end()
            await talk.hear_some()
            await asyncio.sleep(wait)
            await talk.cancel()
            await talk.say("再见朋友。")
            await talk.end()
            heard = [await talk.hear()]
            while heard[-1].message["characters"] != 9:
                heard.append(await talk.hear())
            for each in heard:
                if each.audio and each.message["type"] == "complete":
                    assert each.audio == (await account.client.get(each.message["audio_url"])).content
            return [each.message for each in heard]

    for number in range(12):
        told = [message["type"] for message in await race(number * 0.004)]
        assert told in (["cancelled", "complete"], ["complete", "cancelled", "complete"]), number


# What makes no sense


BAD_MESSAGES: dict[str, str | bytes] = {
    "not JSON": "{",
    "empty": "",
    "deep": "[" * 100_000,
    "a list": "[]",
    "a number": "1",
    "null": "null",
    "no type": "{}",
    "type is a list": '{"type": ["text"]}',
    "unknown type": '{"type": "sing"}',
    "no content": '{"type": "text"}',
    "content is null": '{"type": "text", "content": null}',
    "content is a number": '{"type": "text", "content": 1}',
    "content is a list": '{"type": "text", "content": ["好"]}',
    "a control character": '{"type": "text", "content": "a\\u0000b"}',
    "a lone surrogate": '{"type": "text", "content": "a\\ud800"}',
    "a binary frame": b'{"type": "end"}',
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
async def test_a_message_that_makes_no_sense_ends_the_session(
    realtime_backend: Server, realtime_sandbox: Sandbox, create_account: CreateAccount, name: str
) -> None:
    account = await create_account(realtime_backend)
    async with talking(realtime_backend, account) as silent:
        await silent.socket.send(BAD_MESSAGES[name])
        assert (await silent.refusal()).brief == (400, "INVALID_REQUEST", 1008)
    async with talking(realtime_backend, account) as talk:
        await talk.say(LONG_TEXT)
        await talk.hear_some()
        await talk.socket.send(BAD_MESSAGES[name])
        heard = await talk.hear(2)
        if heard.message["type"] != "error":
            heard = await talk.hear(2)
        assert await talk.close_code() == 1008
    assert (heard.message["code"], heard.message["error"]) == (400, "INVALID_REQUEST")
    assert re.search("[一-龥]", heard.message["message"])
    await assert_what_was_spoken_is_settled(realtime_sandbox, account)


async def test_nobody_is_told_of_a_cancel_that_was_not_asked_for(
    realtime_backend: Server, create_account: CreateAccount
) -> None:
    account = await create_account(realtime_backend)
    async with talking(realtime_backend, account) as talk:
        await talk.say(LONG_TEXT)
        await talk.hear_some()
        await talk.send(type="sing")
        assert (await talk.hear()).message["type"] == "error"


async def assert_what_was_spoken_is_settled(sandbox: Sandbox, account: Account) -> None:
    """The provider was stopped, and what it counted is billed; what it said is kept."""
    [call] = await provider_calls(sandbox, account)
    item = await record(account)
    assert call["outcome"] == "cancelled"
    assert item["status"] in {"abandoned", "cancelled", "failed"}
    assert 0 < call["characters"] < 408
    assert item["bill"] == cost(call["characters"])
    assert len(await kept_audio(account, item)) == call["audio_bytes"]


@pytest.mark.parametrize("name", ["5 MB", "not UTF-8"])
async def test_a_frame_that_is_no_message_closes_the_session(
    realtime_backend: Server, realtime_sandbox: Sandbox, create_account: CreateAccount, name: str
) -> None:
    account = await create_account(realtime_backend)
    async with talking(realtime_backend, account) as talk:
        await talk.say(LONG_TEXT)
        await talk.hear_some()
        if name == "5 MB":
            with suppress(ConnectionClosed):
                await talk.say("a" * 5 * 1024 * 1024)
        else:
            await talk.socket.send(b'{"type": "\xff"}', text=True)
        assert await talk.close_code() == (1009 if name == "5 MB" else 1007)
    await assert_what_was_spoken_is_settled(realtime_sandbox, account)


async def test_a_message_of_nearly_a_megabyte_is_read(backend: Server, account: Account) -> None:
    async with talking(backend, account) as talk:
        await talk.send(type="text", content="你好", more="x" * 1_000_000)
        await talk.end()
        assert (await talk.hear()).message["characters"] == 4


async def test_too_much_text_that_waits_is_refused(
    realtime_backend: Server, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(realtime_backend)
    async with talking(realtime_backend, account) as talk:
        await talk.say("今天天气真好。")
        await talk.end()
        await talk.hear_some()
        for _ in range(21):
            await talk.say("好" * 10_000)
        heard = await talk.hear()
        if heard.message["type"] != "error":
            heard = await talk.hear()
        assert await talk.close_code() == 1008
    assert (heard.message["code"], heard.message["error"]) == (400, "TEXT_TOO_LONG")
    [call] = await provider_calls(realtime_sandbox, account)
    assert call["text"] == "今天天气真好。"
    assert (await record(account))["bill"] == cost(call["characters"])


async def test_an_utterance_that_grows_too_long_ends_there(
    impatient: Server, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(impatient)
    async with talking(impatient, account) as talk:
        await talk.say(LONG_TEXT)
        await talk.hear_some()
        await talk.say(LONG_TEXT)
        heard = await talk.hear(2)
        if heard.message["type"] != "error":
            heard = await talk.hear(2)
        assert await talk.close_code() == 1008
    assert (heard.message["code"], heard.message["error"]) == (400, "TEXT_TOO_LONG")
    await assert_what_was_spoken_is_settled(realtime_sandbox, account)


async def test_blanks_without_end_are_no_way_to_fill_the_memory(backend: Server, account: Account) -> None:
    other = asyncio.create_task(longest_wait(account, 1.5))
    async with talking(backend, account) as talk:
        with suppress(ConnectionClosed):
            for _ in range(40):
                await talk.say("，" * 25_000)
                await asyncio.sleep(0.01)
            await talk.end()
        heard = await talk.hear()
    assert await other < 1.0
    assert (heard.message["type"], heard.message.get("error")) == ("error", "TEXT_TOO_LONG")


async def longest_wait(account: Account, seconds: float) -> float:
    """The longest time that the server leaves others waiting meanwhile."""
    longest, began = 0.0, time.monotonic()
    while time.monotonic() - began < seconds:
        asked = time.monotonic()
        assert (await account.client.get("/health/live")).status_code == 200
        longest = max(longest, time.monotonic() - asked)
        await asyncio.sleep(0.02)
    return longest


# Limits


async def test_who_says_nothing_is_shown_out(impatient: Server, create_account: CreateAccount) -> None:
    account = await create_account(impatient)
    opened_at = time.monotonic()
    async with talking(impatient, account) as talk:
        assert (await talk.refusal(4)).brief == (408, "IDLE_TIMEOUT", 1008)
    assert 0.9 < time.monotonic() - opened_at < 3
    assert (await account.history())["total"] == 0


async def test_an_open_utterance_is_completed_when_its_speaker_falls_silent(
    impatient: Server, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(impatient)
    async with talking(impatient, account) as talk:
        await talk.say("你好世界")
        said_at = time.monotonic()
        heard = await talk.hear(6)
        assert heard.arrivals[0] - said_at > 0.9
        assert (await talk.refusal(4)).brief == (408, "IDLE_TIMEOUT", 1008)
    [call] = await provider_calls(realtime_sandbox, account)
    item = await record(account)
    assert (heard.message["type"], heard.message["characters"]) == ("complete", 8)
    assert "status" not in item
    assert call["outcome"] == "finished"
    assert heard.audio == await kept_audio(account, item)


async def test_who_types_slowly_or_listens_for_long_is_not_idle(
    impatient: Server, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(impatient)

    async def listen() -> Heard:
        async with talking(impatient, account) as talk:
            return await talk.speak("今天天气真好，我们一起去公园散步吧。")

    async def type_slowly() -> Heard:
        async with talking(impatient, account) as talk:
            hearing = asyncio.create_task(talk.hear())
            for token in "一二三四五":
                await talk.say(token)
                await asyncio.sleep(0.6)
            await talk.end()
            return await hearing

    listened, typed = await asyncio.gather(listen(), type_slowly())
    assert listened.arrivals[-1] - listened.arrivals[0] > 1.5
    assert (listened.message["type"], listened.message["characters"]) == ("complete", 34)
    assert (typed.message["type"], typed.message["characters"]) == ("complete", 10)
    assert len(await provider_calls(realtime_sandbox, account, 2)) == 2


async def test_utterances_count_in_the_rate_limit(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    with run_backend(tmp_path, {**sandbox.settings, "RATE_LIMIT": "6/hour"}) as backend:
        account = await create_account(backend)  # storing the key counts once
        async with talking(backend, account) as talk:
            spoken = 0
            while (heard := await talk.speak("你好")).message["type"] == "complete" and spoken < 10:
                spoken += 1
            assert (heard.message.get("code"), heard.message.get("error")) == (429, "RATE_LIMITED")
            assert await talk.close_code() == 1008
        assert spoken in {4, 5}  # opening the session may count too
        assert len(await provider_calls(sandbox, account, spoken)) == spoken
        async with talking(backend, account) as talk:
            assert (await talk.refusal()).brief == (429, "RATE_LIMITED", 1008)


# What is written down


async def test_the_log_tells_neither_token_nor_text_nor_key(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    text, instruction = "这句话不该出现在日志里", "你说话的情感是happy。"
    with run_backend(tmp_path, {**sandbox.settings, "LOG_LEVEL": "DEBUG"}) as backend:
        account = await create_account(backend)
        token = token_of(account)
        ways: list[dict[str, Any]] = [
            {"headers": {"Authorization": f"Bearer {token}"}},
            {"token": token},
            {"subprotocols": ["bearer", token]},
            {"subprotocols": [token]},
        ]
        for way in ways:
            async with talking(backend, None, instruction=instruction, **way) as talk:
                assert (await talk.speak(text)).message["type"] == "complete"
            async with talking(backend, None, **way) as talk:
                await talk.say(f"{text}。")
                await talk.hear_some()
                await talk.send(type=text)
                await talk.hear()
            async with talking(backend, None, **way) as talk:
                await talk.say(f"{text}。")
                await talk.hear_some()
                talk.vanish()
            async with talking(backend, None, **way) as talk:
                with suppress(ConnectionClosed):
                    await talk.say(text * 80_000)
                assert await talk.close_code() == 1009
            with sandbox.faults(break_tasks=1, break_how="fail"):
                async with talking(backend, None, **way) as talk:
                    await talk.say(f"{text}。")
                    await talk.refusal()
        async with talking(backend, None, token=f"{token}x") as talk:
            await talk.refusal()
        await records(account, 16)
        plain = httpx.get(live_url(backend, token=token).replace("ws", "http", 1), trust_env=False)
        assert plain.status_code == 404
        assert backend.stop() in ENDED_GRACEFULLY
        log = backend.log
    assert log.count('"event": "record_settled"') == 16
    for secret in (token, account.api_key, text, text.encode("unicode_escape").decode(), instruction):
        assert secret not in log


# A browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, without a window."""
    chromium = shutil.which("chromium")
    if chromium is None:
        skip_without("chromium in PATH")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield running
        running.close()


TALK_IN_A_PAGE = """
([url, subprotocols]) => new Promise((resolve, reject) => {
    const socket = subprotocols ? new WebSocket(url, subprotocols) : new WebSocket(url);
    const heard = {protocol: null, bytes: 0, message: null};
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
        heard.protocol = socket.protocol;
        for (const content of ["今天天气", "真好。"]) socket.send(JSON.stringify({type: "text", content}));
        socket.send(JSON.stringify({type: "end"}));
    };
    socket.onmessage = ({data}) => {
        if (data instanceof ArrayBuffer) { heard.bytes += data.byteLength; return; }
        heard.message = JSON.parse(data);
        if (heard.message.type === "complete") socket.close();
    };
    socket.onerror = () => reject(new Error("the socket failed"));
    socket.onclose = ({code}) => resolve({...heard, code});
})
"""
PLAY_IN_A_PAGE = """
(url) => new Promise((resolve, reject) => {
    const audio = new Audio(url);
    audio.oncanplaythrough = () => resolve(audio.duration);
    audio.onerror = () => reject(new Error("the audio cannot be played"));
})
"""


def test_a_page_in_a_browser_talks(backend: Server, browser: Browser) -> None:
    with httpx.Client(base_url=backend.url, trust_env=False, timeout=10) as client:
        login = {"username": f"page-{uuid.uuid4().hex[:8]}", "password": PASSWORD}
        assert client.post("/api/auth/register", json=login).status_code == 200
        token = client.post("/api/auth/login", json=login).json()["data"]["access_token"]
        client.headers["Authorization"] = f"Bearer {token}"
        assert client.put("/api/user/apikey", json={"api_key": f"sk-test-{uuid.uuid4().hex}"}).status_code == 200
    with browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(f"{backend.url}/docs")
        for subprotocols, protocol in ([["bearer", token], "bearer"], [[token], token], [None, ""]):
            url = live_url(backend, format="mp3", **({} if subprotocols else {"token": token}))
            heard = page.evaluate(TALK_IN_A_PAGE, [url, subprotocols])
            assert (heard["protocol"], heard["message"]["type"]) == (protocol, "complete")
            assert heard["message"]["characters"] == 13
            assert heard["bytes"] > 3000
            seconds = page.evaluate(PLAY_IN_A_PAGE, heard["message"]["audio_url"])
            assert seconds == pytest.approx(heard["message"]["duration"], abs=0.1)
        refused = page.evaluate(TALK_IN_A_PAGE, [live_url(backend), ["bearer", "a.b.c"]])
        assert (refused["code"], refused["message"]["error"]) == (1008, "UNAUTHORIZED")
