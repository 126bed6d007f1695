"""Short audio to text: spec 2.0 and 2.1."""

import asyncio
import base64
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Account, CreateAccount
from tests.databases import money, rows
from tests.hearing import (
    AUDIO_ASR,
    FILETRANS,
    FLASH,
    PARAFORMER,
    PUBLIC_URL,
    RECOGNITION,
    STRANGE_SPEECH,
    data_of,
    recognize,
    recognize_file,
    refusal,
    settled,
    speak,
    tone,
)
from tests.servers import Sandbox, Server, run_backend
from tests.sound import duration

SENTENCE = "今天天气真好，我们一起去公园散步吧。"


def fault(**changes: Any) -> list[dict[str, Any]]:
    """What `Sandbox.faults` takes for something that goes wrong with recognitions."""
    return [{"path": RECOGNITION, **changes}]


def encoded(audio: bytes) -> str:
    """Audio in Base64."""
    return base64.b64encode(audio).decode()


async def only_item(account: Account) -> dict[str, Any]:
    """The only record of a user who only listened."""
    [item] = (await account.history(type="asr"))["items"]
    return dict(item)


@pytest.mark.parametrize("model", [FLASH, AUDIO_ASR])
@pytest.mark.parametrize("audio_format", ["mp3", "wav", "opus"])
async def test_what_was_spoken_comes_back_as_text(account: Account, audio_format: str, model: str) -> None:
    url, audio = await speak(account, SENTENCE, format=audio_format)
    text = encoded(audio)
    lines = "\r\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    answers = await asyncio.gather(
        recognize_file(account, audio, f"speech.{audio_format}", model=model),
        recognize_file(account, audio, "nothing.txt", model=model),
        recognize(account, audio_url=url, model=model),
        recognize(account, audio_base64=text, model=model),
        recognize(account, audio_base64=lines, model=model),
        recognize(account, audio_base64=f"data:audio/mpeg;base64,{text}", model=model),
        recognize(account, audio_base64=f"DATA:;base64,\n{lines}\n", model=model),
    )
    seconds = duration(audio, audio_format, 22050)
    for answer in answers:
        data = data_of(answer)
        assert data["text"] == SENTENCE
        assert seconds <= data["duration"] < seconds + 1.1


async def test_the_answer_is_what_the_spec_says(account: Account, backend: Server) -> None:
    answer = await recognize_file(account, tone(3.2), "说明 \u202e.wav", language="zh", enable_itn="true")
    assert (answer.json()["code"], answer.json()["message"]) == (200, "success")
    data = data_of(answer)
    record_id = data.pop("record_id")
    assert type(record_id) is int
    assert data == {
        "text": STRANGE_SPEECH,
        "language": "zh",
        "emotion": "neutral",
        "duration": 4,
        "usage": {"input_tokens": 0, "output_tokens": 11, "seconds": 4},
        "bill": "0.0016",
    }
    assert type(data["duration"]) is type(data["usage"]["seconds"]) is int
    item = await only_item(account)
    assert item.keys() == {"id", "type", "model_name", "input_data", "output_text", "duration", "bill", "created_at"}
    assert (item["id"], item["type"], item["model_name"]) == (record_id, "asr", FLASH)
    assert (item["output_text"], item["duration"], item["bill"]) == (STRANGE_SPEECH, 4, "0.0016")
    asked = json.loads(item["input_data"])
    assert (asked["file"], asked["language"], asked["enable_itn"]) == ("说明 _.wav", "zh", True)
    [line] = rows(
        backend,
        "SELECT model, unit, quantity, unit_price, amount, currency, estimated FROM bills WHERE record_id = ?",
        record_id,
    )
    assert line[:3] == (FLASH, "second", 4)
    assert money(line[3]) == Decimal("0.0004")
    assert money(line[4]) == Decimal("0.0016")
    assert line[5:] == ("CNY", 0)


async def test_a_model_that_counts_no_seconds_is_billed_by_its_tokens(account: Account) -> None:
    data = data_of(await recognize_file(account, tone(2.5), model=AUDIO_ASR))
    assert data.keys() == {"text", "language", "emotion", "duration", "usage", "bill", "record_id"}
    assert (data["language"], data["emotion"]) == ("", "")
    assert data["usage"] == {"input_tokens": 63, "output_tokens": 11, "seconds": 3}
    assert (data["duration"], data["bill"]) == (3, "0.0012")


async def test_every_field_reaches_the_provider(account: Account, sandbox: Sandbox) -> None:
    data_of(await recognize(account, audio_url=PUBLIC_URL, language="en", enable_itn=True, context="百炼、DashScope"))
    data_of(await recognize(account, audio_url=PUBLIC_URL))
    data_of(await recognize(account, audio_url=PUBLIC_URL, model=AUDIO_ASR, language="en", enable_itn=True))
    full, plain, without_options = sandbox.requests(account.api_key)
    user = {"role": "user", "content": [{"audio": PUBLIC_URL}]}
    assert full["input"]["messages"] == [{"role": "system", "content": [{"text": "百炼、DashScope"}]}, user]
    assert full["parameters"] == {"asr_options": {"enable_itn": True, "language": "en"}}
    assert (plain["input"]["messages"], plain["parameters"]) == ([user], {"asr_options": {"enable_itn": False}})
    assert (without_options["model"], without_options["parameters"]) == (AUDIO_ASR, None)


async def test_the_form_takes_the_same_fields(account: Account, sandbox: Sandbox) -> None:
    form = {"model": FLASH, "audio_url": PUBLIC_URL, "language": "ja", "enable_itn": "true", "context": "百炼"}
    answer = await account.client.post(
        "/api/audio/asr/recognize", files={name: (None, value) for name, value in form.items()}
    )
    assert data_of(answer)["language"] == "ja"
    [request] = sandbox.requests(account.api_key)
    assert request["input"]["messages"][0] == {"role": "system", "content": [{"text": "百炼"}]}
    assert request["parameters"] == {"asr_options": {"enable_itn": True, "language": "ja"}}


async def test_a_public_url_is_passed_on_byte_for_byte(account: Account, backend: Server, sandbox: Sandbox) -> None:
    url = "https://b.oss-cn-beijing.aliyuncs.com/audio/%E4%BD%A0%20x+y.mp3?Expires=1&Signature=a%2Bb%3D&x=1;2&y=%7e"
    data = data_of(await recognize(account, audio_url=url))
    assert (data["text"], data["duration"], data["bill"]) == (STRANGE_SPEECH, 4, "0.0016")
    [request] = sandbox.requests(account.api_key)
    assert request["input"]["messages"][0]["content"] == [{"audio": url}]
    assert json.loads((await only_item(account))["input_data"])["audio_url"] == url
    assert "Signature" not in backend.log


async def test_silence_is_an_empty_text_with_a_bill(account: Account) -> None:
    for model in (FLASH, AUDIO_ASR):
        data = data_of(await recognize_file(account, tone(3, channels="s"), model=model))
        assert (data["text"], data["duration"], data["bill"]) == ("", 3, "0.0012")
    for item in (await account.history())["items"]:
        assert (item["output_text"], item["bill"]) == ("", "0.0012")
        assert "status" not in item


@pytest.mark.parametrize(
    ("fields", "error", "part"),
    [
        ({"model": "whisper-1"}, "INVALID_MODEL", "whisper-1"),
        ({"model": "cosyvoice-v2"}, "INVALID_MODEL", "cosyvoice-v2"),
        ({"model": FILETRANS}, "INVALID_MODEL", "transcribe"),
        ({"model": PARAFORMER}, "INVALID_MODEL", "transcribe"),
        ({"model": AUDIO_ASR, "context": "百炼"}, "INVALID_REQUEST", "context"),
        ({"context": "词" * 30_000}, "INVALID_REQUEST", "10000"),
        ({"context": "a\x00b"}, "INVALID_REQUEST", "context"),
        ({"language": "klingon"}, "INVALID_REQUEST", "language"),
        ({"language": ["zh"]}, "INVALID_REQUEST", "language"),
        ({"enable_itn": "true"}, "INVALID_REQUEST", "enable_itn"),
        ({"enable_itn": None}, "INVALID_REQUEST", "enable_itn"),
        ({"model": None}, "INVALID_REQUEST", "model"),
        ({"audio_url": 5}, "INVALID_REQUEST", "audio_url"),
    ],
)
async def test_what_is_wrong_is_refused_before_the_provider_is_asked(
    account: Account, sandbox: Sandbox, fields: dict[str, Any], error: str, part: str
) -> None:
    answer = await recognize(account, **{"audio_url": PUBLIC_URL, **fields})
    assert refusal(answer) == (400, error)
    assert part in answer.json()["message"]
    assert sandbox.requests(account.api_key) == []
    assert (await account.history())["total"] == 0


async def test_without_a_key_nothing_happens(backend: Server, create_account: CreateAccount) -> None:
    account = await create_account(backend, api_key=None)
    for answer in (await recognize(account, audio_url=PUBLIC_URL), await recognize_file(account, tone(1))):
        assert refusal(answer) == (403, "NO_API_KEY")
        assert answer.json()["message"] == "未配置API密钥，请在用户设置中配置apikey"
    assert (await account.history())["total"] == 0


async def test_a_login_is_needed_and_comes_before_all_else(account: Account) -> None:
    del account.client.headers["Authorization"]
    for answer in (
        await recognize(account, audio_url=PUBLIC_URL),
        await account.client.post("/api/audio/asr/recognize", content=b"x"),
        await account.client.get("/api/audio/asr/models"),
    ):
        assert refusal(answer) == (401, "UNAUTHORIZED")


async def test_the_models_are_listed_as_in_the_spec(account: Account) -> None:
    models = (await account.client.get("/api/audio/asr/models")).json()["data"]
    assert [(model["model_id"], model["call_type"]) for model in models] == [
        (FLASH, "sync"),
        (AUDIO_ASR, "sync"),
        (FILETRANS, "async"),
        (PARAFORMER, "async"),
    ]
    assert models[0] == {
        "model_id": FLASH,
        "model_name": "通义千问3-ASR-Flash",
        "description": "快速识别,支持上下文增强",
        "call_type": "sync",
        "features": ["上下文增强", "情感识别", "多语种"],
    }
    assert models[2]["features"] == ["长音频", "多音轨", "时间戳"]


async def test_a_provider_that_throttles_for_a_moment_is_asked_again_and_billed_once(
    account: Account, backend: Server, sandbox: Sandbox
) -> None:
    throttled = fault(status=429, code="Throttling.RateQuota", message="Requests rate limit exceeded.", count=2)
    with sandbox.faults(requests=throttled):
        data = data_of(await recognize_file(account, tone(2)))
    assert (data["text"], data["bill"]) == (STRANGE_SPEECH, "0.0008")
    assert [request["status"] for request in sandbox.requests(account.api_key)] == [429, 429, 200]
    assert rows(backend, "SELECT quantity FROM bills WHERE record_id = ?", data["record_id"]) == [(2,)]
    assert (await account.history())["total"] == 1


@pytest.mark.parametrize(
    ("struck", "status", "error", "part"),
    [
        ({"status": 500, "code": "InternalError"}, 502, "UPSTREAM_ERROR", "InternalError"),
        ({"status": 500, "body": "<html>oops</html>"}, 502, "UPSTREAM_ERROR", "500"),
        ({"status": 200, "body": "[]"}, 502, "UPSTREAM_ERROR", "200"),
        ({"status": 400, "code": "Arrearage", "message": "Access denied."}, 502, "UPSTREAM_ERROR", "欠费"),
        ({"status": 404, "code": "ModelNotFound", "message": "Model not found."}, 400, "INVALID_MODEL", "模型"),
        ({"status": 400, "code": "InvalidFile.AudioLengthError"}, 400, "AUDIO_TOO_LONG", "时长"),
        ({"status": 400, "code": "InvalidFile.DownloadFailed"}, 400, "INVALID_AUDIO", "下载"),
        ({"how": "close"}, 502, "UPSTREAM_ERROR", "连接"),
        ({"how": "close_after"}, 502, "UPSTREAM_ERROR", "连接"),
    ],
)
async def test_a_failure_of_the_provider_is_explained_and_never_repeated(
    account: Account, sandbox: Sandbox, struck: dict[str, Any], status: int, error: str, part: str
) -> None:
    with sandbox.faults(requests=fault(**struck)):
        answer = await recognize(account, audio_url=PUBLIC_URL)
    assert refusal(answer) == (status, error)
    assert part in answer.json()["message"]
    assert len(sandbox.requests(account.api_key)) == 1
    item = await only_item(account)
    assert item["status"] == "failed"
    assert item["error_message"] == answer.json()["message"]
    assert "output_text" not in item
    if "how" not in struck:
        assert item["bill"] == "0"


async def test_a_silent_provider_times_out(tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount) -> None:
    with run_backend(tmp_path, {**sandbox.settings, "UPSTREAM_TIMEOUT": "0.5"}) as backend:
        account = await create_account(backend)
        with sandbox.faults(requests=fault(how="silent", count=1)):
            answer = await recognize(account, audio_url=PUBLIC_URL)
        assert refusal(answer) == (504, "TIMEOUT")
        assert len(sandbox.requests(account.api_key)) == 1
        assert (await only_item(account))["status"] == "failed"
        assert data_of(await recognize(account, audio_url=PUBLIC_URL))["text"] == STRANGE_SPEECH


async def test_a_refused_key_is_told(backend: Server, sandbox: Sandbox, create_account: CreateAccount) -> None:
    account = await create_account(backend)
    refused = fault(status=401, code="InvalidApiKey", message="Invalid API-key provided.")
    with sandbox.faults(requests=refused):
        answer = await recognize(account, audio_url=PUBLIC_URL)
    assert refusal(answer) == (401, "UNAUTHORIZED")
    assert "API Key" in answer.json()["message"]
    item = await only_item(account)
    assert (item["status"], item["bill"]) == ("failed", "0")


async def test_a_client_that_hangs_up_has_the_work_finished_and_billed_once(
    account: Account, backend: Server, sandbox: Sandbox
) -> None:
    with sandbox.faults(requests=fault(how="delay", seconds=0.6)):
        with pytest.raises(httpx.ReadTimeout):
            await account.client.post(
                "/api/audio/asr/recognize", json={"model": FLASH, "audio_url": PUBLIC_URL}, timeout=0.3
            )
        record_id = (await only_item(account))["id"]
        item = await settled(account, record_id)
    assert (item["output_text"], item["bill"]) == (STRANGE_SPEECH, "0.0016")
    assert rows(backend, "SELECT quantity, estimated FROM bills WHERE record_id = ?", record_id) == [(4, 0)]
    assert len(sandbox.requests(account.api_key)) == 1


async def test_twenty_at_once_each_get_their_own(account: Account, backend: Server) -> None:
    texts = [f"这是第{number}句话。" for number in range(20)]
    spoken = await asyncio.gather(*(speak(account, text, format="opus") for text in texts))
    answers = await asyncio.gather(*(recognize_file(account, audio) for _, audio in spoken))
    assert [data_of(answer)["text"] for answer in answers] == texts
    for answer in answers:
        data = answer.json()["data"]
        assert rows(backend, "SELECT quantity FROM bills WHERE record_id = ?", data["record_id"]) == [
            (data["usage"]["seconds"],)
        ]
