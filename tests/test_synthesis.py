"""Text to speech that is kept: spec 1.1 without stream, and 1.2."""

import asyncio
import io
import json
import re
import wave
from decimal import Decimal
from typing import Any

import pytest

from tests.conftest import Account, CreateAccount
from tests.databases import money, rows
from tests.servers import Sandbox, Server
from tests.sound import decode, duration, loudness

FORMATS = {"mp3": "audio/mpeg", "wav": "audio/wav", "pcm": "audio/pcm", "opus": "audio/ogg"}
SENTENCE = "你好，欢迎使用语音合成服务！"


async def test_the_answer_is_what_the_spec_says(account: Account, sandbox: Sandbox) -> None:
    answer = await account.synthesize(SENTENCE)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["code"], body["message"]) == (200, "success")
    data = body["data"]
    assert data.keys() == {"audio_url", "duration", "format", "sample_rate", "characters", "bill", "record_id"}
    assert (data["format"], data["sample_rate"]) == ("mp3", 22050)
    assert data["characters"] == 26
    assert data["bill"] == "0.0004"
    assert isinstance(data["record_id"], int)
    assert re.search(r"/audio/tts/\d{8}/[0-9a-f-]{36}\.mp3$", data["audio_url"])
    audio = await account.client.get(data["audio_url"])
    assert audio.headers["content-type"] == "audio/mpeg"
    assert abs(duration(audio.content, "mp3", 22050) - data["duration"]) <= 0.05
    [call] = sandbox.calls(account.api_key)
    assert call["text"] == SENTENCE
    assert call["audio_bytes"] == len(audio.content)
    assert call["parameters"] == {
        "text_type": "PlainText",
        "voice": "longanyang",
        "format": "mp3",
        "sample_rate": 22050,
        "volume": 50,
        "rate": 1.0,
        "pitch": 1.0,
        "enable_ssml": False,
    }


async def test_every_field_reaches_the_provider_under_its_wire_name(account: Account, sandbox: Sandbox) -> None:
    answer = await account.synthesize(
        "今天天气怎么样？",
        format="wav",
        sample_rate=16000,
        volume=80,
        speech_rate=1.5,
        pitch_rate=0.8,
        instruction="你说话的情感是happy。",
    )
    assert answer.status_code == 200, answer.text
    [call] = sandbox.calls(account.api_key)
    sent = call["parameters"]
    assert (sent["format"], sent["sample_rate"], sent["volume"]) == ("wav", 16000, 80)
    assert (sent["rate"], sent["pitch"], sent["instruction"]) == (1.5, 0.8, "你说话的情感是happy。")


@pytest.mark.parametrize("audio_format", FORMATS)
@pytest.mark.parametrize("sample_rate", [8000, 16000, 22050, 24000, 44100, 48000])
async def test_every_format_and_rate_plays(account: Account, audio_format: str, sample_rate: int) -> None:
    answer = await account.synthesize("今天天气真好。", format=audio_format, sample_rate=sample_rate)
    data = answer.json()["data"]
    audio = await account.client.get(data["audio_url"])
    assert audio.headers["content-type"] == FORMATS[audio_format]
    assert data["audio_url"].endswith(f".{audio_format}")
    samples, rate = decode(audio.content, audio_format, sample_rate)
    assert rate == (sample_rate if audio_format != "opus" else 48000)
    assert abs(len(samples) / rate - data["duration"]) <= 0.05
    assert 0.5 < data["duration"] < 5
    assert loudness(samples) > 100


async def test_a_stored_wav_tells_its_true_size(account: Account) -> None:
    data = (await account.synthesize("今天天气真好。", format="wav")).json()["data"]
    audio = (await account.client.get(data["audio_url"])).content
    with wave.open(io.BytesIO(audio)) as reader:
        assert reader.getnframes() * 2 == len(audio) - 44
        assert abs(reader.getnframes() / reader.getframerate() - data["duration"]) <= 0.05


async def test_ssml_is_recognised_and_its_tags_cost_nothing(account: Account, sandbox: Sandbox) -> None:
    answer = await account.synthesize('<speak>你好<break time="500ms"/>世界</speak>')
    assert answer.json()["data"]["characters"] == 8
    [call] = sandbox.calls(account.api_key)
    assert call["parameters"]["enable_ssml"] is True


@pytest.mark.parametrize(
    ("fields", "error", "part"),
    [
        ({"model": "cosyvoice-v9"}, "INVALID_MODEL", "cosyvoice-v9"),
        ({"voice": "nobody"}, "INVALID_VOICE", "音色"),
        ({"voice": "longxiaochun_v2"}, "MODEL_VOICE_MISMATCH", "cosyvoice-v2"),
        ({"model": "cosyvoice-v2"}, "MODEL_VOICE_MISMATCH", "longanyang"),
        ({"voice": "cosyvoice-v3-plus-mine-0123abcd"}, "MODEL_VOICE_MISMATCH", "target_model"),
        ({"text": "好" * 2001}, "TEXT_TOO_LONG", "2000"),
        ({"text": ""}, "INVALID_REQUEST", "text"),
        ({"text": " \n"}, "INVALID_REQUEST", "text"),
        ({"text": "a\x00b"}, "INVALID_REQUEST", "text"),
        ({"text": 5}, "INVALID_REQUEST", "text"),
        ({"text": None}, "INVALID_REQUEST", "text"),
        ({"format": "flac"}, "INVALID_REQUEST", "format"),
        ({"sample_rate": 11025}, "INVALID_REQUEST", "sample_rate"),
        ({"volume": 101}, "INVALID_REQUEST", "volume 必须小于等于 100"),
        ({"volume": -1}, "INVALID_REQUEST", "volume 必须大于等于 0"),
        ({"volume": True}, "INVALID_REQUEST", "volume"),
        ({"speech_rate": 0.49}, "INVALID_REQUEST", "speech_rate 必须大于等于 0.5"),
        ({"speech_rate": 2.01}, "INVALID_REQUEST", "speech_rate 必须小于等于 2"),
        ({"pitch_rate": "fast"}, "INVALID_REQUEST", "pitch_rate"),
        ({"stream": "yes"}, "INVALID_REQUEST", "stream"),
        ({"instruction": "好" * 51}, "INVALID_REQUEST", "instruction"),
        ({"voice": "longyingjing_v3", "instruction": "你说话的情感是happy。"}, "INVALID_REQUEST", "instruction"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_wrong_is_refused_before_the_provider_is_asked(
    account: Account, sandbox: Sandbox, fields: dict[str, Any], error: str, part: str, stream: bool
) -> None:
    answer = await account.synthesize(**{"text": "你好", "stream": stream, **fields})
    assert (answer.status_code, answer.json()["error"]) == (400, error), answer.text
    assert part in answer.json()["message"]
    assert answer.json()["data"] is None
    assert sandbox.calls(account.api_key) == []
    assert (await account.history())["total"] == 0


async def test_a_lone_surrogate_is_refused(account: Account) -> None:
    body = '{"model": "cosyvoice-v3-flash", "voice": "longanyang", "text": "a\\ud800"}'
    answer = await account.client.post(
        "/api/audio/tts/synthesize", content=body, headers={"Content-Type": "application/json"}
    )
    assert (answer.status_code, answer.json()["error"]) == (400, "INVALID_REQUEST")


async def test_a_missing_field_and_malformed_json_are_named(account: Account) -> None:
    missing = await account.client.post("/api/audio/tts/synthesize", json={"model": "cosyvoice-v3-flash"})
    assert missing.json()["message"] == "缺少必填字段 voice；缺少必填字段 text"
    for content in ("{", "[" * 100_000, "[]", "null", ""):
        answer = await account.client.post(
            "/api/audio/tts/synthesize", content=content, headers={"Content-Type": "application/json"}
        )
        assert (answer.status_code, answer.json()["error"]) == (400, "INVALID_REQUEST"), content[:10]


async def test_2000_characters_are_taken_and_billed_as_counted(account: Account) -> None:
    data = (await account.synthesize("好。" * 1000, format="mp3", sample_rate=8000)).json()["data"]
    assert data["characters"] == 3000
    assert data["bill"] == "0.0430"


async def test_a_voice_that_looks_cloned_goes_to_the_provider(account: Account, sandbox: Sandbox) -> None:
    [voice_id] = sandbox.add_voices(account.api_key)
    answer = await account.synthesize("你好", voice=voice_id)
    assert answer.status_code == 200, answer.text
    assert sandbox.calls(account.api_key)[0]["parameters"]["voice"] == voice_id


async def test_what_the_provider_refuses_is_explained_and_recorded_without_bill(account: Account) -> None:
    answer = await account.synthesize("你好", model="cosyvoice-v3-plus", voice="longyingjing_v3")
    assert (answer.status_code, answer.json()["error"]) == (400, "INVALID_VOICE")
    [item] = (await account.history())["items"]
    assert (item["status"], item["bill"]) == ("failed", "0")
    assert "output_url" not in item


async def test_without_a_key_nothing_happens(backend: Server, create_account: CreateAccount) -> None:
    account = await create_account(backend, api_key=None)
    for stream in (False, True):
        answer = await account.synthesize("你好", stream=stream)
        assert answer.status_code == 403
        assert answer.json() == {
            "code": 403,
            "message": "未配置API密钥，请在用户设置中配置apikey",
            "data": None,
            "error": "NO_API_KEY",
        }
    assert (await account.history())["total"] == 0


async def test_the_bill_is_an_exact_line_with_the_price_of_its_time(account: Account, backend: Server) -> None:
    data = (await account.synthesize(SENTENCE)).json()["data"]
    [line] = rows(
        backend,
        "SELECT model, unit, quantity, unit_price, amount, currency, estimated, provider_request_id"
        " FROM bills WHERE record_id = ?",
        data["record_id"],
    )
    assert line[:3] == ("cosyvoice-v3-flash", "character", 26)
    assert money(line[3]) == Decimal("0.000014335")
    assert money(line[4]) == Decimal("0.000014335") * 26
    assert line[5:7] == ("CNY", 0)
    assert line[7]


async def test_fifty_at_once_by_ten_users_each_get_their_own(
    backend: Server, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    accounts = [await create_account(backend) for _ in range(10)]
    texts = {
        account.username: [f"这是第{number}句，属于{account.username}。" for number in range(5)] for account in accounts
    }

    async def speak(account: Account, text: str) -> None:
        answer = await account.synthesize(text)
        assert answer.status_code == 200, answer.text
        data = answer.json()["data"]
        audio = (await account.client.get(data["audio_url"])).content
        [call] = [call for call in sandbox.calls(account.api_key) if call["text"] == text]
        assert call["audio_bytes"] == len(audio)
        [item] = [item for item in (await account.history())["items"] if item["id"] == data["record_id"]]
        assert json.loads(item["input_data"])["text"] == text
        assert item["output_url"] == data["audio_url"]

    await asyncio.gather(*(speak(account, text) for account in accounts for text in texts[account.username]))
    for account in accounts:
        calls = sandbox.calls(account.api_key)
        assert sorted(call["text"] for call in calls) == sorted(texts[account.username])
        again = await account.synthesize("再说一句。")
        assert again.status_code == 200
        assert sandbox.calls(account.api_key)[-1]["connection"] in {call["connection"] for call in calls}


async def test_the_models_are_listed_as_in_the_spec(account: Account) -> None:
    data = (await account.client.get("/api/audio/tts/models")).json()["data"]
    assert [(model["model_id"], model["price_per_10k_chars"]) for model in data] == [
        ("cosyvoice-v3-flash", "0.14335"),
        ("cosyvoice-v3-plus", "0.286706"),
        ("cosyvoice-v2", "0.286706"),
    ]
    assert data[0] == {
        "model_id": "cosyvoice-v3-flash",
        "model_name": "CosyVoice V3 Flash",
        "description": "平衡效果与成本,性价比高",
        "price_per_10k_chars": "0.14335",
        "features": ["快速合成", "支持SSML", "支持Instruct"],
    }


@pytest.mark.parametrize("path", ["/api/audio/tts/models", "/api/audio/history", "/api/user/me", "/api/user/apikey"])
async def test_every_route_needs_a_login(account: Account, path: str) -> None:
    del account.client.headers["Authorization"]
    answer = await account.client.get(path)
    assert (answer.status_code, answer.json()["error"]) == (401, "UNAUTHORIZED")
    assert answer.headers["x-request-id"]
