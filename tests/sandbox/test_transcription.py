from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any
from urllib.parse import parse_qs, urlsplit

import oss2
import pytest
import time_machine

from app.sandbox import SandboxOptions

from .conftest import RunningSandbox, running
from .services import (
    ANYBODY,
    FILETRANS,
    FLASH,
    PARAFORMER,
    RECOGNITION,
    STRANGE,
    TRANSCRIPTION,
    Json,
    Services,
    calling,
    error,
    oss_error,
    speak,
    tone,
)

ELSEWHERE = "https://media.example.com/a.mp3?Expires=1"
BEIJING = datetime.timezone(datetime.timedelta(hours=8))
TIME = "%Y-%m-%d %H:%M:%S.%f"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningSandbox]:
    with running(SandboxOptions(task_seconds=0.1)) as server:
        yield server


@pytest.fixture
def services(server: RunningSandbox) -> Iterator[Services]:
    with calling(server) as services:
        yield services


@pytest.fixture
def slow(start_sandbox: Callable[[SandboxOptions], RunningSandbox]) -> Iterator[Services]:
    with calling(start_sandbox(SandboxOptions(task_seconds=1.2))) as services:
        yield services


def store(services: Services, name: str, audio: bytes) -> str:
    bucket = oss2.Bucket(
        oss2.AuthV4("sandbox-id", "sandbox-secret"), services.server.http_url, "tasks", region="cn-hangzhou"
    )
    bucket.put_object(name, audio)
    return f"{services.server.http_url}/tasks/{name}"


def fetch(url: str) -> Json:
    response = ANYBODY.get(url)
    assert response.status_code == 200, response.text
    return dict(response.json())


def result_of(task: Json) -> Json:
    output = task["output"]
    assert output["task_status"] == "SUCCEEDED"
    return fetch((output.get("result") or output["results"][0])["transcription_url"])


def moment(text: str) -> datetime.datetime:
    return datetime.datetime.strptime(text, TIME).replace(tzinfo=BEIJING)


def test_a_task_is_pending_then_running_then_done(slow: Services) -> None:
    before = datetime.datetime.now(BEIJING)
    submitted = slow.submit(FILETRANS, ELSEWHERE).json()
    assert submitted["output"].keys() == {"task_id", "task_status"}
    task_id = submitted["output"]["task_id"]
    seen: list[Json] = []
    deadline = time.monotonic() + 5
    while (answer := slow.query(task_id))["output"]["task_status"] != "SUCCEEDED" and time.monotonic() < deadline:
        seen.append(answer)
        time.sleep(0.02)
    states = [entry["output"]["task_status"] for entry in seen]
    assert list(dict.fromkeys(states)) == ["PENDING", "RUNNING"]
    assert states == sorted(states)
    running_output = seen[-1]["output"]
    assert running_output.keys() == {"task_id", "task_status", "submit_time", "scheduled_time", "task_metrics"}
    assert running_output["task_metrics"] == {"TOTAL": 1, "SUCCEEDED": 0, "FAILED": 0}
    output = answer["output"]
    assert output.keys() == {"task_id", "task_status", "submit_time", "scheduled_time", "end_time", "result"}
    times = [moment(output[name]) for name in ("submit_time", "scheduled_time", "end_time")]
    assert before - datetime.timedelta(milliseconds=1) <= times[0] < times[1] < times[2]
    assert len(output["submit_time"]) == len("2025-10-27 14:19:31.150")
    assert (times[2] - times[0]).total_seconds() == pytest.approx(1.2, abs=0.3)
    assert answer["usage"] == {"seconds": 4}


async def test_a_filetrans_result_has_the_documented_shape(server: RunningSandbox, services: Services) -> None:
    said = "你好，world peace。今天2.5度！"
    url = store(services, "spoken.mp3", await speak(server, said, format="mp3"))
    task = services.transcribe(FILETRANS, url)
    result = result_of(task)
    (transcript,) = result.pop("transcripts")
    assert result == {"file_url": url, "audio_info": {"format": "mp3", "sample_rate": 22050}}
    sentences = transcript.pop("sentences")
    assert transcript == {"channel_id": 0, "text": said}
    assert [sentence["text"] for sentence in sentences] == ["你好，world peace。", "今天2.5度！"]
    assert [sentence["sentence_id"] for sentence in sentences] == [0, 1]
    assert all(
        sentence.keys() == {"sentence_id", "begin_time", "end_time", "language", "emotion", "text"}
        for sentence in sentences
    )
    assert {(sentence["language"], sentence["emotion"]) for sentence in sentences} == {("zh", "neutral")}
    times = [sentence[name] for sentence in sentences for name in ("begin_time", "end_time")]
    assert times == sorted(times)
    assert 0 <= times[0] < times[-1] <= task["usage"]["seconds"] * 1000


async def test_words_are_spread_over_the_speech(server: RunningSandbox, services: Services) -> None:
    said = "你好，world peace。今天2.5度！"
    url = store(services, "words.mp3", await speak(server, said, format="mp3"))
    (transcript,) = result_of(services.transcribe(FILETRANS, url, enable_words=True, language="ja"))["transcripts"]
    sentences = transcript["sentences"]
    assert [sentence["text"] for sentence in sentences] == ["你好，", "world peace。", "今天2.5度！"]
    assert sentences[0]["language"] == "ja"
    words = [word for sentence in sentences for word in sentence["words"]]
    assert [(word["text"], word["punctuation"]) for word in words] == [
        ("你", ""),
        ("好", "，"),
        ("world", ""),
        ("peace", "。"),
        ("今", ""),
        ("天", ""),
        ("2.5", ""),
        ("度", "！"),
    ]
    assert all(word["begin_time"] < word["end_time"] for word in words)
    assert all(one["end_time"] == other["begin_time"] for one, other in pairwise(words))
    assert words[0]["begin_time"] == sentences[0]["begin_time"]
    assert words[-1]["end_time"] == sentences[-1]["end_time"]


async def test_a_paraformer_result_has_the_captured_shape(server: RunningSandbox, services: Services) -> None:
    said = "听好了，从今儿起。别再把自己当软柿子捏。"
    url = store(services, "paraformer.wav", await speak(server, said, format="wav", sample_rate=24000))
    task = services.transcribe(PARAFORMER, url, channel_id=[0], language_hints=["zh"], timestamp_alignment_enabled=True)
    output = task["output"]
    (subtask,) = output["results"]
    assert subtask.keys() == {"file_url", "transcription_url", "subtask_status"}
    assert output["task_metrics"] == {"TOTAL": 1, "SUCCEEDED": 1, "FAILED": 0}
    assert "result" not in output
    result = result_of(task)
    (transcript,) = result["transcripts"]
    properties = result["properties"]
    assert result.keys() == {"file_url", "properties", "transcripts"}
    length = properties.pop("original_duration_in_milliseconds")
    assert properties == {"audio_format": "pcm_s16le", "channels": [0], "original_sampling_rate": 24000}
    assert transcript.keys() == {"channel_id", "content_duration_in_milliseconds", "text", "sentences"}
    assert transcript["text"] == said
    sentences = transcript["sentences"]
    assert [sentence["sentence_id"] for sentence in sentences] == [1, 2]
    assert all(s.keys() == {"begin_time", "end_time", "text", "sentence_id", "words"} for s in sentences)
    spoken = sentences[-1]["end_time"] - sentences[0]["begin_time"]
    assert transcript["content_duration_in_milliseconds"] == spoken < length
    assert task["usage"] == {"duration": math.ceil(spoken / 1000)}


def test_every_track_has_its_transcript_and_its_price(services: Services) -> None:
    url = store(services, "tracks.wav", tone(1.5, channels="tst"))
    task = services.transcribe(FILETRANS, url, channel_id=[0, 1])
    assert task["usage"] == {"seconds": 4}
    spoken, silent = result_of(task)["transcripts"]
    assert (spoken["channel_id"], spoken["text"]) == (0, STRANGE)
    assert silent == {"channel_id": 1, "text": "", "sentences": []}
    task = services.transcribe(PARAFORMER, url, channel_id=[2, 1, 0])
    assert task["usage"] == {"duration": 4}
    assert [entry["channel_id"] for entry in result_of(task)["transcripts"]] == [2, 0]
    task = services.transcribe(FILETRANS, url, channel_id=[7])
    assert task["output"]["code"] == "FILE_PARSE_FAILED"


def test_paraformer_tells_of_each_file(services: Services) -> None:
    names = {
        "missing": "FILE_404_NOT_FOUND",
        "forbidden": "FILE_403_FORBIDDEN",
        "unreachable": "FILE_DOWNLOAD_FAILED",
        "broken": "DECODE_ERROR",
        "silent": "SUCCESS_WITH_NO_VALID_FRAGMENT",
        "long": "AUDIO_DURATION_TOO_LONG",
    }
    urls = [f"https://media.example.com/{name}.mp3" for name in names] + ["not a url", "data:audio/wav;base64,AA"]
    task = services.transcribe(PARAFORMER, *urls, ELSEWHERE)
    *failed, succeeded = task["output"]["results"]
    codes = [*names.values(), "REQUEST_INVALID_FILE_URL_VALUE", "REQUEST_INVALID_FILE_URL_VALUE"]
    assert failed == [
        {"file_url": url, "code": code, "message": code, "subtask_status": "FAILED"}
        for url, code in zip(urls, codes, strict=True)
    ]
    assert succeeded["subtask_status"] == "SUCCEEDED"
    assert task["output"]["task_metrics"] == {"TOTAL": 9, "SUCCEEDED": 1, "FAILED": 8}
    assert task["usage"] == {"duration": 4}


def test_a_task_fails_when_all_of_its_files_do(services: Services) -> None:
    url = store(services, "silence.wav", tone(1.5, channels="s"))
    task = services.transcribe(PARAFORMER, url)
    output = task["output"]
    assert (output["task_status"], output["code"]) == ("FAILED", "SUCCESS_WITH_NO_VALID_FRAGMENT")
    assert output["results"][0]["subtask_status"] == "FAILED"
    assert "usage" not in task
    broken = store(services, "broken.wav", b"RIFF no audio" * 100)
    task = services.transcribe(FILETRANS, broken)
    output = task["output"]
    assert output.keys() == {
        "task_id",
        "task_status",
        "submit_time",
        "scheduled_time",
        "end_time",
        "code",
        "message",
    }
    assert (output["task_status"], output["code"], output["message"]) == ("FAILED", "DECODE_ERROR", "DECODE_ERROR")
    assert "usage" not in task


def test_filetrans_bills_silence_too(services: Services) -> None:
    task = services.transcribe(FILETRANS, store(services, "silent-too.wav", tone(1.5, channels="s")))
    assert result_of(task)["transcripts"] == [{"channel_id": 0, "text": "", "sentences": []}]
    assert task["usage"] == {"seconds": 2}


@pytest.mark.parametrize("headers", [{}, {"X-DashScope-Async": "disable"}])
def test_synchronous_calls_are_refused(services: Services, headers: dict[str, str]) -> None:
    body = {"model": FILETRANS, "input": {"file_url": ELSEWHERE}}
    refused = services.http.post(TRANSCRIPTION, json=body, headers=headers)
    assert error(refused) == (403, "AccessDenied", "current user api does not support synchronous calls.")


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (FILETRANS, {"input": {"file_urls": [ELSEWHERE]}}, "input must contain file_url"),
        (FILETRANS, {"parameters": {"channel_id": 0}}, "(channel_id)"),
        (FILETRANS, {"parameters": {"channel_id": []}}, "(channel_id)"),
        (FILETRANS, {"parameters": {"channel_id": [0, 0]}}, "(channel_id)"),
        (FILETRANS, {"parameters": {"channel_id": [-1]}}, "(channel_id)"),
        (FILETRANS, {"parameters": {"language": "xx"}}, "(language)"),
        (FILETRANS, {"parameters": {"enable_words": 1}}, "(enable_words)"),
        (FILETRANS, {"parameters": {"corpus": "text"}}, "(corpus)"),
        (PARAFORMER, {"input": {"file_url": ELSEWHERE}}, "input must contain file_urls"),
        (PARAFORMER, {"input": {"file_urls": []}}, "input must contain file_urls"),
        (PARAFORMER, {"input": {"file_urls": [ELSEWHERE] * 101}}, "(file_urls)"),
        (PARAFORMER, {"parameters": {"languages": ["zh"]}}, "missing status name"),
        (PARAFORMER, {"parameters": {"language_hints": ["it"]}}, "(language_hints)"),
        (PARAFORMER, {"parameters": {"language_hints": "zh"}}, "(language_hints)"),
        (PARAFORMER, {"parameters": {"speaker_count": 1}}, "(speaker_count)"),
        (PARAFORMER, {"parameters": {"special_word_filter": {}}}, "(special_word_filter)"),
        (PARAFORMER, {"parameters": {"diarization_enabled": "true"}}, "(diarization_enabled)"),
        (FLASH, {}, "url error, please check url！"),
    ],
)
def test_malformed_submissions_are_refused(
    services: Services, model: str, change: dict[str, Any], message: str
) -> None:
    given = {"file_urls": [ELSEWHERE]} if model == PARAFORMER else {"file_url": ELSEWHERE}
    body = {"model": model, "input": given, "parameters": {}} | change
    refused = services.http.post(TRANSCRIPTION, json=body, headers={"X-DashScope-Async": "enable"})
    status, code, told = error(refused)
    assert (status, code) == (400, "InvalidParameter")
    assert message in told


def test_nobody_knows_tasks_of_others(services: Services) -> None:
    task_id = services.transcribe(FILETRANS, ELSEWHERE)["output"]["task_id"]
    with calling(services.server) as stranger:
        for caller, asked in [(stranger, task_id), (services, "00000000-0000-0000-0000-000000000000")]:
            assert caller.query(asked)["output"] == {"task_id": asked, "task_status": "UNKNOWN"}
        assert stranger.http.get("/api/v1/tasks/").json()["total"] == 0


def test_a_task_is_forgotten_a_day_after_its_end(services: Services) -> None:
    task = services.transcribe(FILETRANS, ELSEWHERE)
    url, task_id = task["output"]["result"]["transcription_url"], task["output"]["task_id"]
    now = datetime.datetime.now(datetime.UTC)
    with time_machine.travel(now + datetime.timedelta(hours=23, minutes=59)):
        assert services.query(task_id)["output"]["task_status"] == "SUCCEEDED"
        assert fetch(url)
    with time_machine.travel(now + datetime.timedelta(hours=24, minutes=1)):
        assert services.query(task_id)["output"]["task_status"] == "UNKNOWN"
        assert oss_error(ANYBODY.get(url)) == (403, "AccessDenied")


def test_only_pending_tasks_are_canceled(slow: Services) -> None:
    task_id = slow.submit(FILETRANS, ELSEWHERE).json()["output"]["task_id"]
    other = slow.submit(FILETRANS, ELSEWHERE).json()["output"]["task_id"]
    canceled = slow.http.post(f"/api/v1/tasks/{task_id}/cancel")
    assert canceled.json().keys() == {"request_id"}
    assert slow.query(task_id)["output"]["task_status"] == "CANCELED"
    while slow.query(other)["output"]["task_status"] == "PENDING":
        time.sleep(0.02)
    for asked in (task_id, other, "unknown"):
        status, code, _ = error(slow.http.post(f"/api/v1/tasks/{asked}/cancel"))
        assert (status, code) == (400, "UnsupportedOperation")


def test_a_result_url_opens_without_a_key_and_only_as_it_is(services: Services) -> None:
    url = services.transcribe(FILETRANS, ELSEWHERE)["output"]["result"]["transcription_url"]
    parts = urlsplit(url)
    expires = int(parse_qs(parts.query)["Expires"][0])
    assert parts.scheme == "http"
    assert expires == pytest.approx(time.time() + 86_400, abs=10)
    assert fetch(url)["file_url"] == ELSEWHERE
    assert oss_error(services.http.get(url)) == (400, "InvalidArgument")
    for changed in (url.replace(f"={expires}", f"={expires + 1}"), url.partition("?")[0]):
        assert oss_error(ANYBODY.get(changed)) == (403, "SignatureDoesNotMatch")
    assert oss_error(ANYBODY.post(url)) == (403, "AccessDenied")


def test_task_requests_can_be_limited(start_sandbox: Callable[[SandboxOptions], RunningSandbox]) -> None:
    with calling(start_sandbox(SandboxOptions(task_requests_per_second=2))) as services:
        answers = [services.http.get("/api/v1/tasks/x") for _ in range(3)]
        assert error(answers[2])[:2] == (429, "Throttling.RateQuota")
        assert services.http.post(RECOGNITION, json={"model": FLASH}).status_code == 400
