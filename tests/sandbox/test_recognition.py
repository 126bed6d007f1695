from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import orjson
import oss2
import pytest

from app.sandbox import SandboxOptions

from .conftest import RunningSandbox
from .services import (
    FILETRANS,
    FLASH,
    RECOGNITION,
    STRANGE,
    Services,
    calling,
    data_uri,
    error,
    speak,
    system,
    tone,
    user,
)

AUDIO = "qwen-audio-asr"
ELSEWHERE = "https://media.example.com/a.mp3"
INVALID_URL = "The provided URL does not appear to be valid."


@pytest.fixture
def services(sandbox: RunningSandbox) -> Iterator[Services]:
    with calling(sandbox) as services:
        yield services


def invalid(name: str) -> tuple[int, str, str]:
    message = f"Required parameter({name}) missing or invalid, please check the request parameters."
    return 400, "InvalidParameter", message


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["output"]["choices"][0]["message"]["content"][0]["text"])


def test_an_answer_has_the_documented_shape(services: Services) -> None:
    response = services.recognise(data_uri(tone(1.2)), context="专有名词")
    body = response.json()
    assert response.headers["x-request-id"] == body.pop("request_id")
    message = {
        "annotations": [{"language": "zh", "type": "audio_info", "emotion": "neutral"}],
        "content": [{"text": STRANGE}],
        "role": "assistant",
    }
    assert body == {
        "output": {"choices": [{"finish_reason": "stop", "message": message}]},
        "usage": {
            "input_tokens_details": {"text_tokens": 4},
            "output_tokens_details": {"text_tokens": 11},
            "seconds": 2,
        },
    }


def test_qwen_audio_asr_answers_with_tokens(services: Services) -> None:
    body = services.recognise(data_uri(tone(2.0)), AUDIO).json()
    (choice,) = body["output"]["choices"]
    assert choice["message"] == {"role": "assistant", "content": [{"text": STRANGE}]}
    assert body["usage"] == {"input_tokens": 50, "output_tokens": 11, "audio_tokens": 50}


@pytest.mark.parametrize("audio_format", ["wav", "mp3", "opus", "pcm"])
async def test_its_own_voice_is_recognised(sandbox: RunningSandbox, services: Services, audio_format: str) -> None:
    said = f"今天天气怎么样？{audio_format}真好，"
    audio = await speak(sandbox, said[:5], said[5:], format=audio_format, sample_rate=16000)
    media_type = "audio/pcm" if audio_format == "pcm" else f"audio/{audio_format}"
    assert text(services.recognise(data_uri(audio, media_type))) == said


async def test_a_corrected_wav_header_changes_nothing(sandbox: RunningSandbox, services: Services) -> None:
    audio = await speak(sandbox, "Hello, world! How are you?", format="wav", voice="longanyang")
    samples = audio[44:]
    note = b"junk" + struct.pack("<I", 3) + b"abc\0"
    body = audio[12:36] + note + b"data" + struct.pack("<I", len(samples)) + samples
    corrected = b"RIFF" + struct.pack("<I", len(body) + 4) + b"WAVE" + body
    response = services.recognise(data_uri(corrected))
    assert text(response) == "Hello, world! How are you?"
    assert response.json()["output"]["choices"][0]["message"]["annotations"][0]["language"] == "en"
    assert text(services.recognise(data_uri(corrected[:-2]))) == STRANGE


async def test_markup_is_not_heard(sandbox: RunningSandbox, services: Services) -> None:
    markup = '<speak>你好<break time="1s"/>世界，<sub alias="再见">bye</sub>。</speak>'
    audio = await speak(sandbox, markup, format="mp3", enable_ssml=True)
    assert text(services.recognise(data_uri(audio))) == "你好世界，再见。"


def test_silence_has_no_content(services: Services) -> None:
    body = services.recognise(data_uri(tone(1.5, channels="s"))).json()
    assert body["output"]["choices"][0]["message"]["content"] == []
    assert body["usage"]["seconds"] == 2


def test_the_language_is_echoed(services: Services) -> None:
    response = services.recognise(ELSEWHERE, parameters={"asr_options": {"language": "yue", "enable_itn": True}})
    assert response.json()["output"]["choices"][0]["message"]["annotations"][0]["language"] == "yue"
    assert response.json()["usage"]["seconds"] == 4


@pytest.mark.parametrize("incremental", [False, True])
def test_answers_can_be_streamed(services: Services, incremental: bool) -> None:
    response = services.recognise(
        ELSEWHERE, headers={"X-DashScope-SSE": "enable"}, parameters={"incremental_output": incremental}
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")[:-1]
    assert [block.split("\n")[:3] for block in blocks] == [
        [f"id:{number}", "event:result", ":HTTP_STATUS/200"] for number in range(1, len(blocks) + 1)
    ]
    events = [orjson.loads(block.partition("\ndata:")[2]) for block in blocks]
    choices = [event["output"]["choices"][0] for event in events]
    assert [choice["finish_reason"] for choice in choices] == ["null", "null", "stop"]
    texts = [choice["message"]["content"][0]["text"] for choice in choices]
    assert "".join(texts) == STRANGE if incremental else texts[-1] == STRANGE and STRANGE.startswith(texts[0])


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"Authorization": ""}, "No API-key provided."),
        ({"Authorization": "Basic abc"}, "No API-key provided."),
        ({"Authorization": "bearer sk-bad-2"}, "Invalid API-key provided."),
    ],
)
@pytest.mark.parametrize("path", [RECOGNITION, "/api/v1/tasks/x", "/api/v1/uploads"])
def test_bad_keys_are_refused(services: Services, path: str, headers: dict[str, str], message: str) -> None:
    assert error(services.http.get(path, headers=headers)) == (401, "InvalidApiKey", message)


def test_a_lower_case_bearer_is_accepted(services: Services) -> None:
    assert services.recognise(ELSEWHERE, headers={"Authorization": "bearer sk-any"}).status_code == 200


def test_asynchronous_calls_are_refused(services: Services) -> None:
    refused = services.recognise(ELSEWHERE, headers={"X-DashScope-Async": "enable"})
    assert error(refused) == (403, "AccessDenied", "current user api does not support asynchronous calls.")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": None}, (400, "BadRequest.EmptyModel")),
        ({"model": "qwen-unknown"}, (404, "ModelNotFound")),
        ({"model": ["x"]}, (404, "ModelNotFound")),
        ({"model": "qwen-audio-asr-2024-12-04"}, (404, "ModelNotFound")),
        ({"model": FILETRANS}, (400, "InvalidParameter")),
        ({"input": None}, (400, "BadRequest.EmptyInput")),
        ({"input": {"messages": []}}, (400, "InvalidParameter")),
        ({"input": {"messages": [system("x")]}}, (400, "InvalidParameter")),
        ({"input": {"messages": [user(ELSEWHERE), system("x")]}}, (400, "InvalidParameter")),
        ({"input": {"messages": [user(ELSEWHERE), user(ELSEWHERE)]}}, (400, "InvalidParameter")),
        ({"input": {"messages": [{"role": "user", "content": "x"}]}}, (400, "InvalidParameter")),
        ({"input": {"messages": [{"role": "user", "content": [{"text": "x"}]}]}}, (400, "InvalidParameter")),
        (
            {"input": {"messages": [{"role": "user", "content": [{"audio": ELSEWHERE}, {"text": "x"}]}]}},
            (400, "InvalidParameter"),
        ),
        ({"input": {"messages": [system("字" * 10_001), user(ELSEWHERE)]}}, (400, "InvalidParameter")),
        ({"parameters": {"asr_options": {"language": "xx"}}}, (400, "InvalidParameter")),
        ({"parameters": {"asr_options": {"language": ["zh"]}}}, (400, "InvalidParameter")),
        ({"parameters": {"asr_options": {"enable_itn": "false"}}}, (400, "InvalidParameter")),
        ({"parameters": {"asr_options": []}}, (400, "InvalidParameter")),
        ({"model": AUDIO, "input": {"messages": [system("x"), user(ELSEWHERE)]}}, (400, "InvalidParameter")),
        ({"model": AUDIO, "parameters": {"asr_options": {}}}, (400, "InvalidParameter")),
    ],
)
def test_malformed_requests_are_refused(services: Services, change: dict[str, Any], expected: tuple[int, str]) -> None:
    body = {"model": FLASH, "input": {"messages": [user(ELSEWHERE)]}, "parameters": {}}
    assert services.http.post(RECOGNITION, json=body).status_code == 200
    refused = services.http.post(RECOGNITION, json={k: v for k, v in (body | change).items() if v is not None})
    assert error(refused)[:2] == expected
    assert services.requests()[-1]["error_code"] == expected[1]


@pytest.mark.parametrize(
    ("content", "media_type"), [(b"{", "application/json"), (b"[]", "application/json"), (b"{}", "text/plain")]
)
def test_only_json_is_understood(services: Services, content: bytes, media_type: str) -> None:
    refused = services.http.post(RECOGNITION, content=content, headers={"Content-Type": media_type})
    assert error(refused)[:2] == (400, "BadRequest.IllegalInput")


def test_other_methods_are_refused(services: Services) -> None:
    refused = services.http.get(RECOGNITION)
    assert error(refused) == (400, "InvalidParameter", "Request method 'GET' is not supported.")


@pytest.mark.parametrize(
    ("audio", "expected"),
    [
        ("", "The audio is empty"),
        ("data:audio/wav;base64,", "The audio is empty"),
        ("data:audio/wav;base64,%%%%", "Decoder audio file failed."),
        ("data:audio/wav,abc", INVALID_URL),
        ("ftp://media.example.com/a.mp3", INVALID_URL),
        ("https://media.example.com/a b.mp3", INVALID_URL),
        ("file:///a.mp3", INVALID_URL),
        ("a.mp3", INVALID_URL),
        (data_uri(b"no audio at all" * 500), "Decoder audio file failed."),
        (data_uri(b"#EXTM3U\nhttp://127.0.0.1/a.mp3\n", "audio/mpeg"), "Decoder audio file failed."),
        ("https://media.example.com/x/broken.mp3", "Decoder audio file failed."),
        ("https://media.example.com/missing.mp3?x=1", "The audio file cannot be downloaded."),
        ("https://media.example.com/forbidden.wav", "The audio file cannot be downloaded."),
        (data_uri(tone(0.9)), "Audio length must be between 1s and 300s."),
        ("https://media.example.com/long.mp3", "Audio length must be between 1s and 300s."),
    ],
)
def test_audio_that_cannot_be_heard(services: Services, audio: str, expected: str) -> None:
    status, _, message = error(services.recognise(audio))
    assert status == 400
    assert expected in message


def test_the_length_is_limited_to_the_second(services: Services) -> None:
    assert services.recognise(data_uri(tone(300, rate=4000))).json()["usage"]["seconds"] == 300
    assert error(services.recognise(data_uri(tone(300.1, rate=4000))))[1] == "InvalidFile.AudioLengthError"
    assert "input length" in error(services.recognise(data_uri(tone(246, rate=4000)), AUDIO))[2]


def test_a_data_uri_is_measured_as_it_is_encoded(services: Services) -> None:
    head = "data:audio/wav;base64,"
    fits = head + "A" * (10_485_760 - len(head) - 2)
    assert error(services.recognise(fits))[1] == "Audio.DecoderError"
    refused = error(services.recognise(fits + "AAA"))
    assert refused == (400, "InvalidParameter", "Exceeded limit on max bytes per data-uri item : 10485760")


async def test_stored_audio_is_read_by_those_who_may(sandbox: RunningSandbox, services: Services) -> None:
    audio = await speak(sandbox, "存起来的声音。", format="mp3")

    def bucket(name: str) -> oss2.Bucket:
        return oss2.Bucket(oss2.AuthV4("sandbox-id", "sandbox-secret"), sandbox.http_url, name, region="cn-hangzhou")

    bucket("heard").put_object("中文 1.mp3", audio)
    open_url = f"{sandbox.http_url}/heard/%E4%B8%AD%E6%96%87%201.mp3"
    assert text(services.recognise(open_url)) == "存起来的声音。"
    assert text(services.recognise(open_url.replace("127.0.0.1", "localhost"))) == "存起来的声音。"
    assert services.requests()[-1]["audio_bytes"] == len(audio)
    bucket("heard-private").put_object("b.mp3", audio)
    signed = bucket("heard-private").sign_url("GET", "b.mp3", 60)
    assert text(services.recognise(signed)) == "存起来的声音。"
    for url in (signed.partition("?")[0], f"{sandbox.http_url}/heard/unknown", f"{signed}0"):
        assert error(services.recognise(url))[1] == "InvalidFile.DownloadFailed"


def test_recognitions_can_be_limited(start_sandbox: Callable[[SandboxOptions], RunningSandbox]) -> None:
    with calling(start_sandbox(SandboxOptions(recognitions_per_minute=2))) as services:
        assert [services.recognise(ELSEWHERE).status_code for _ in range(3)] == [200, 200, 429]
        assert error(services.recognise(ELSEWHERE))[1] == "Throttling.RateQuota"
        assert services.recognise(ELSEWHERE, f"{FLASH}-2026-02-10").status_code == 200
        assert services.recognise(ELSEWHERE, headers={"Authorization": "Bearer sk-other"}).status_code == 200
        answers = [services.submit(FILETRANS, ELSEWHERE).status_code for _ in range(3)]
        assert answers == [200, 200, 429]
