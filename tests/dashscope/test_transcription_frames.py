"""Long audio to text: orders, reports and result files, right or wrong (PROTOCOL §5)."""

import copy
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, NamedTuple
from urllib.parse import unquote

import httpx
import pytest
import respx
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from app.dashscope import Credential, Submission, TaskReport, TranscriptionClient, TranscriptionOrder
from app.dashscope.answers import MAX_COUNT
from app.dashscope.result_file import digest_result, read_result
from app.dashscope.transcription import PATH, compose, read_report
from app.errors import (
    AppError,
    ConnectionLost,
    InvalidApiKey,
    InvalidAudio,
    Throttled,
    UnclearAnswer,
    UpstreamError,
    UpstreamTimeout,
)
from app.transcripts import AudioInfo, Transcript, Transcripts, Word
from tests.dashscope.http_provider import (
    API_KEY,
    Act,
    HttpProvider,
    Line,
    answers,
    in_turn,
    refuses,
    sends,
    throttles,
)

FILETRANS = TranscriptionOrder("qwen3-asr-flash-filetrans")
PARAFORMER = TranscriptionOrder("paraformer-v2")
AUDIO_URL = "https://a.test/b.mp3"
RESULT_PATH = (
    "/prod/paraformer-v2/20250925/01%3A37/b0b273dc-1.json?Expires=1758821858&OSSAccessKeyId=K&Signature=a%2Bb%2Fc%3D"
)
RESULT_URL = f"https://dashscope-result-bj.oss-cn-beijing.aliyuncs.com{RESULT_PATH}"
TAKEN_ON = {"request_id": "req-1", "output": {"task_id": "task-1", "task_status": "PENDING"}}

CAPTURED_REPORT: dict[str, Any] = {
    "request_id": "3c829d37-1751-4acf-8d3e-444837d96534",
    "output": {
        "task_id": "68ca5d10-7c49-4abe-9550-4763105f8316",
        "task_status": "SUCCEEDED",
        "submit_time": "2025-09-25 01:37:36.380",
        "scheduled_time": "2025-09-25 01:37:36.509",
        "end_time": "2025-09-25 01:37:38.450",
        "results": [{"file_url": AUDIO_URL, "transcription_url": RESULT_URL, "subtask_status": "SUCCEEDED"}],
        "task_metrics": {"TOTAL": 1, "SUCCEEDED": 1, "FAILED": 0},
    },
    "usage": {"duration": 6},
}
CAPTURED_FILE: dict[str, Any] = {
    "file_url": "http://dashscope-result-sh.oss-cn-shanghai.aliyuncs.com/1d/3a/20250925/a.wav?Expires=1758820629",
    "properties": {
        "audio_format": "pcm_s16le",
        "channels": [0],
        "original_sampling_rate": 24000,
        "original_duration_in_milliseconds": 5680,
    },
    "transcripts": [
        {
            "channel_id": 0,
            "content_duration_in_milliseconds": 5570,
            "text": "听好了，",
            "sentences": [
                {
                    "begin_time": 40,
                    "end_time": 5610,
                    "text": "听好了，",
                    "sentence_id": 1,
                    "words": [
                        {"begin_time": 40, "end_time": 180, "text": "听", "punctuation": ""},
                        {"begin_time": 180, "end_time": 330, "text": "好", "punctuation": ""},
                        {"begin_time": 330, "end_time": 730, "text": "了", "punctuation": "，"},
                    ],
                }
            ],
        }
    ],
}
DOCUMENTED_FILE: dict[str, Any] = {
    "file_url": AUDIO_URL,
    "audio_info": {"format": "mp3", "sample_rate": 22050},
    "transcripts": [
        {
            "channel_id": 0,
            "text": "欢迎使用阿里云。",
            "sentences": [
                {
                    "sentence_id": 0,
                    "begin_time": 0,
                    "end_time": 1440,
                    "language": "zh",
                    "emotion": "neutral",
                    "text": "欢迎使用阿里云。",
                    "words": [{"begin_time": 0, "end_time": 160, "text": "欢", "punctuation": ""}],
                }
            ],
        }
    ],
}


@pytest.fixture
async def provider() -> AsyncIterator[HttpProvider]:
    """A provider without a plan yet."""
    async with HttpProvider.run() as running:
        yield running


@pytest.fixture
async def transcriber(provider: HttpProvider) -> AsyncIterator[TranscriptionClient]:
    """The client under test."""
    async with provider.client() as http:
        yield TranscriptionClient(http)


# ---- Orders


@pytest.mark.parametrize(
    ("order", "body"),
    [
        (
            FILETRANS,
            {
                "model": "qwen3-asr-flash-filetrans",
                "input": {"file_url": AUDIO_URL},
                "parameters": {"channel_id": [0], "enable_itn": False, "enable_words": False},
            },
        ),
        (
            TranscriptionOrder("qwen3-asr-flash-filetrans", "zh", True, "专有名词", (0, 1), True),
            {
                "model": "qwen3-asr-flash-filetrans",
                "input": {"file_url": AUDIO_URL},
                "parameters": {
                    "channel_id": [0, 1],
                    "enable_itn": True,
                    "enable_words": True,
                    "language": "zh",
                    "corpus": {"text": "专有名词"},
                },
            },
        ),
        (
            PARAFORMER,
            {
                "model": "paraformer-v2",
                "input": {"file_urls": [AUDIO_URL]},
                "parameters": {"channel_id": [0], "timestamp_alignment_enabled": True},
            },
        ),
        (
            TranscriptionOrder("paraformer-v2", "zh", True, "专有名词", (1,), True),
            {
                "model": "paraformer-v2",
                "input": {"file_urls": [AUDIO_URL]},
                "parameters": {"channel_id": [1], "timestamp_alignment_enabled": True, "language_hints": ["zh"]},
            },
        ),
    ],
    ids=["filetrans", "filetrans in full", "paraformer", "paraformer in full"],
)
def test_an_order_is_written_as_its_model_wants_it(order: TranscriptionOrder, body: dict[str, Any]) -> None:
    assert compose(order, AUDIO_URL) == body


@pytest.mark.parametrize(("url", "resolve"), [(AUDIO_URL, None), ("oss://folder/a.mp3", "enable")])
async def test_a_file_is_handed_over(
    provider: HttpProvider, transcriber: TranscriptionClient, url: str, resolve: str | None
) -> None:
    provider.expect(answers(TAKEN_ON))
    assert await transcriber.submit(provider.credential, FILETRANS, url) == Submission("task-1", "PENDING", "req-1")
    (request,) = provider.requests
    assert (request.method, request.target) == ("POST", f"/api/v1{PATH}")
    assert request.header("X-DashScope-Async") == "enable"
    assert request.header("X-DashScope-OssResourceResolve") == resolve
    assert request.json == compose(FILETRANS, url)


async def test_the_header_of_an_upload_does_not_stay(provider: HttpProvider, transcriber: TranscriptionClient) -> None:
    provider.expect(answers(TAKEN_ON), answers(TAKEN_ON))
    await transcriber.submit(provider.credential, FILETRANS, "oss://folder/a.mp3")
    await transcriber.submit(provider.credential, FILETRANS, AUDIO_URL)
    assert provider.requests[1].header("X-DashScope-OssResourceResolve") is None


@pytest.mark.parametrize(
    "output",
    [
        {},
        None,
        [],
        "task-1",
        {"task_status": "PENDING"},
        {"task_id": None},
        {"task_id": ""},
        {"task_id": 7},
        {"task_id": ["a"]},
        {"task_id": "a" * 129},
    ],
    ids=str,
)
async def test_an_answer_without_a_task_leaves_open_whether_there_is_one(
    provider: HttpProvider, transcriber: TranscriptionClient, output: object
) -> None:
    provider.expect(answers({"request_id": "req-1", "output": output}))
    with pytest.raises(UnclearAnswer):
        await transcriber.submit(provider.credential, FILETRANS, AUDIO_URL)
    assert len(provider.requests) == 1


@pytest.mark.parametrize("status", [None, "", "NEW", 7, ["PENDING"], {}])
async def test_a_task_in_an_odd_state_was_taken_on(
    provider: HttpProvider, transcriber: TranscriptionClient, status: object
) -> None:
    provider.expect(answers({"output": {"task_id": "a" * 128, "task_status": status}}))
    assert await transcriber.submit(provider.credential, FILETRANS, AUDIO_URL) == Submission("a" * 128, "RUNNING", None)


async def test_a_throttled_submission_is_made_again_and_a_lost_one_is_not(
    provider: HttpProvider, transcriber: TranscriptionClient
) -> None:
    provider.expect(throttles, answers(TAKEN_ON), Line.hang_up)
    await transcriber.submit(provider.credential, FILETRANS, AUDIO_URL)
    assert len(provider.requests) == 2
    with pytest.raises(ConnectionLost):
        await transcriber.submit(provider.credential, FILETRANS, AUDIO_URL)
    assert len(provider.requests) == 3


# ---- Reports


async def test_a_task_is_looked_after(provider: HttpProvider, transcriber: TranscriptionClient) -> None:
    provider.expect(answers(CAPTURED_REPORT))
    report = await transcriber.inspect(provider.credential, "68ca5d10-7c49-4abe-9550-4763105f8316")
    assert report == read_report(CAPTURED_REPORT)
    (request,) = provider.requests
    assert (request.method, request.target) == ("GET", "/api/v1/tasks/68ca5d10-7c49-4abe-9550-4763105f8316")
    assert request.header("Authorization") == f"Bearer {API_KEY}"


@pytest.mark.parametrize(
    "task_id", ["a/b", "../../uploads", "a?b=c", "a#b", "a b", "a%2Fb", "任务", "a&b;c", "a\\b", "a\r\nb: c"]
)
async def test_a_task_id_stays_one_part_of_the_path(
    provider: HttpProvider, transcriber: TranscriptionClient, task_id: str
) -> None:
    provider.expect(answers(CAPTURED_REPORT))
    await transcriber.inspect(provider.credential, task_id)
    (request,) = provider.requests
    last = request.target.removeprefix("/api/v1/tasks/")
    assert last.isascii()
    assert not set(last) & set("/?# \\\r\n")
    assert unquote(last) == task_id


async def test_a_task_that_is_not_found_is_unknown(provider: HttpProvider, transcriber: TranscriptionClient) -> None:
    provider.expect(refuses("NotFound", "Task not found", 404))
    assert await transcriber.inspect(provider.credential, "task-1") == TaskReport("UNKNOWN")


@pytest.mark.parametrize("status", [200, 404])
async def test_unknown_may_come_with_any_status(
    provider: HttpProvider, transcriber: TranscriptionClient, status: int
) -> None:
    provider.expect(answers({"request_id": "r", "output": {"task_id": "task-1", "task_status": "UNKNOWN"}}, status))
    assert (await transcriber.inspect(provider.credential, "task-1")).status == "UNKNOWN"


def test_a_part_that_tells_no_status_is_taken_at_its_result() -> None:
    parts = [{"file_url": AUDIO_URL, "transcription_url": RESULT_URL}]
    report = read_report({"output": {"task_status": "SUCCEEDED", "results": parts}})
    assert (report.status, report.result_url) == ("SUCCEEDED", RESULT_URL)


@pytest.mark.parametrize("page", [b"", b"<html>"])
async def test_a_gateway_knows_nothing_of_tasks(
    provider: HttpProvider, transcriber: TranscriptionClient, page: bytes
) -> None:
    provider.expect(answers(page, 404))
    with pytest.raises(UpstreamError):
        await transcriber.inspect(provider.credential, "task-1")


async def test_a_task_is_not_unknown_where_the_workspace_is(
    provider: HttpProvider, transcriber: TranscriptionClient
) -> None:
    provider.expect(refuses("WorkSpaceNotFound", "The workspace does not exist.", 404))
    with pytest.raises(UpstreamError):
        await transcriber.inspect(replace(provider.credential, workspace="ws-wrong"), "task-1")


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (throttles, Throttled),
        (answers(b"", 429), Throttled),
        (refuses("InvalidApiKey", status=401), InvalidApiKey),
        (answers(b"", 500), UnclearAnswer),
        (answers(b"", 503), UnclearAnswer),
        (Line.hang_up, ConnectionLost),
    ],
)
async def test_a_question_is_asked_once(
    provider: HttpProvider, transcriber: TranscriptionClient, act: Act, error: type[AppError]
) -> None:
    provider.expect(act)
    with pytest.raises(AppError) as refused:
        await transcriber.inspect(provider.credential, "task-1")
    assert type(refused.value) is error
    assert len(provider.requests) == 1


def test_the_captured_report() -> None:
    assert read_report(CAPTURED_REPORT) == TaskReport(
        status="SUCCEEDED",
        submitted_at=datetime(2025, 9, 24, 17, 37, 36, 380_000, UTC),
        scheduled_at=datetime(2025, 9, 24, 17, 37, 36, 509_000, UTC),
        ended_at=datetime(2025, 9, 24, 17, 37, 38, 450_000, UTC),
        result_url=RESULT_URL,
        seconds=6,
        request_id="3c829d37-1751-4acf-8d3e-444837d96534",
        file_urls=(AUDIO_URL,),
    )


def test_the_documented_report() -> None:
    output = {"task_id": "t", "task_status": "SUCCEEDED", "result": {"transcription_url": "http://b/c.json"}}
    report = read_report({"request_id": "req-1", "output": output, "usage": {"seconds": 3}})
    assert report == TaskReport("SUCCEEDED", result_url="http://b/c.json", seconds=3, request_id="req-1")


@pytest.mark.parametrize(
    ("told", "status"),
    [
        ("PENDING", "PENDING"),
        ("RUNNING", "RUNNING"),
        ("SUSPENDED", "RUNNING"),
        ("SUCCEEDED", "SUCCEEDED"),
        ("FAILED", "FAILED"),
        ("CANCELED", "FAILED"),
        ("UNKNOWN", "UNKNOWN"),
    ],
)
def test_each_status_of_the_provider_is_one_of_ours(told: str, status: str) -> None:
    with capture_logs() as logs:
        assert read_report({"output": {"task_status": told}}).status == status
    assert logs == []


@pytest.mark.parametrize("told", [None, "", "succeeded", "NEW", 7, True, ["FAILED"], {"a": 1}], ids=repr)
def test_an_odd_status_is_waited_out_and_noted(told: object) -> None:
    with capture_logs() as logs:
        assert read_report({"output": {"task_status": told}}) == TaskReport("RUNNING")
    assert [line["event"] for line in logs] == ["provider_task_status_unknown"]


def test_a_failure_is_told_with_its_reason() -> None:
    output = {"task_status": "FAILED", "code": "FILE_403_FORBIDDEN", "message": "no right"}
    report = read_report({"output": output})
    assert report == TaskReport("FAILED", code="FILE_403_FORBIDDEN", message="no right")
    assert not report.is_silent


async def test_a_failed_task_is_no_refusal(provider: HttpProvider, transcriber: TranscriptionClient) -> None:
    provider.expect(answers({"output": {"task_status": "FAILED", "code": "InvalidApiKey", "message": "m"}}))
    report = await transcriber.inspect(provider.credential, "task-1")
    assert report == TaskReport("FAILED", code="InvalidApiKey", message="m")


def test_a_cancelled_task_says_so() -> None:
    assert read_report({"output": {"task_status": "CANCELED"}}).code == "CANCELED"
    assert read_report({"output": {"task_status": "CANCELED", "code": "Why"}}).code == "Why"


@pytest.mark.parametrize("code", ["SUCCESS_WITH_NO_VALID_FRAGMENT", "ASR_RESPONSE_HAVE_NO_WORDS"])
@pytest.mark.parametrize("told_by", ["the task", "the part", "the part of a success"])
def test_silence_is_a_failure_of_its_own_kind(code: str, told_by: str) -> None:
    part = {"file_url": AUDIO_URL, "subtask_status": "FAILED", "code": code, "message": code}
    outputs: dict[str, dict[str, Any]] = {
        "the task": {"task_status": "FAILED", "code": code},
        "the part": {"task_status": "FAILED", "results": [part]},
        "the part of a success": {"task_status": "SUCCEEDED", "results": [part]},
    }
    report = read_report({"output": outputs[told_by]})
    assert (report.status, report.code, report.is_silent) == ("FAILED", code, True)
    assert not replace(report, status="RUNNING").is_silent


DONE = {"subtask_status": "SUCCEEDED", "transcription_url": "https://b/1.json"}
BAD = {"subtask_status": "FAILED", "code": "FILE_404_NOT_FOUND", "message": "gone"}


@pytest.mark.parametrize(
    ("results", "status", "url", "code"),
    [
        ([DONE], "SUCCEEDED", "https://b/1.json", ""),
        ([BAD], "FAILED", None, "FILE_404_NOT_FOUND"),
        ([BAD, DONE], "SUCCEEDED", "https://b/1.json", "FILE_404_NOT_FOUND"),
        ([DONE, BAD], "SUCCEEDED", "https://b/1.json", "FILE_404_NOT_FOUND"),
        ([BAD, {**BAD, "code": "Other"}], "FAILED", None, "FILE_404_NOT_FOUND"),
        ([None, "x", [], 7, DONE], "SUCCEEDED", "https://b/1.json", ""),
        ([{"subtask_status": "RUNNING"}], "SUCCEEDED", None, ""),
        ([{"subtask_status": "SUCCEEDED"}], "SUCCEEDED", None, ""),
        ([{"subtask_status": "SUCCEEDED", "transcription_url": 7}], "SUCCEEDED", None, ""),
        ([{"subtask_status": ["FAILED"]}], "SUCCEEDED", None, ""),
        ([{}], "SUCCEEDED", None, ""),
        ([], "SUCCEEDED", None, ""),
        ({}, "SUCCEEDED", None, ""),
        (None, "SUCCEEDED", None, ""),
        ("x", "SUCCEEDED", None, ""),
    ],
)
def test_parts_of_a_task_are_looked_at_one_by_one(results: object, status: str, url: str | None, code: str) -> None:
    report = read_report({"output": {"task_status": "SUCCEEDED", "results": results}})
    assert (report.status, report.result_url, report.code) == (status, url, code)


def test_the_reason_of_a_task_comes_before_that_of_a_part() -> None:
    report = read_report({"output": {"task_status": "FAILED", "code": "A", "message": "a", "results": [BAD]}})
    assert (report.code, report.message) == ("A", "a")


@pytest.mark.parametrize(
    "result", [None, "x", [], {}, {"transcription_url": None}, {"transcription_url": ""}, {"url": "x"}]
)
def test_a_success_without_an_address_has_none(result: object) -> None:
    assert read_report({"output": {"task_status": "SUCCEEDED", "result": result}}).result_url is None


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2025-10-27 14:19:31.150", datetime(2025, 10, 27, 6, 19, 31, 150_000, UTC)),
        ("2025-10-27 14:19:31", datetime(2025, 10, 27, 6, 19, 31, 0, UTC)),
        ("2025-10-27T14:19:31.150", datetime(2025, 10, 27, 6, 19, 31, 150_000, UTC)),
        ("2025-01-01 07:59:59.999", datetime(2024, 12, 31, 23, 59, 59, 999_000, UTC)),
        ("2024-02-29 08:00:00", datetime(2024, 2, 29, 0, 0, 0, 0, UTC)),
        ("2025-02-29 08:00:00", None),
        ("2025-10-27 25:00:00", None),
        ("27.10.2025", None),
        ("soon", None),
        ("", None),
        ("null", None),
        (None, None),
        (True, None),
        (1.5, None),
        (1758735456380, None),
        ({}, None),
        (["2025-10-27 14:19:31"], None),
    ],
    ids=repr,
)
def test_times_are_beijing_times(text: object, moment: datetime | None) -> None:
    times = {"submit_time": text, "scheduled_time": text, "end_time": text}
    report = read_report({"output": {"task_status": "RUNNING", **times}})
    assert (report.submitted_at, report.scheduled_at, report.ended_at) == (moment, moment, moment)


@pytest.mark.parametrize("text", ["0001-01-01 00:00:00", "0001-01-01 07:59:59.999", "0001-01-01"])
def test_a_time_before_all_times_is_none(text: str) -> None:
    assert read_report({"output": {"task_status": "RUNNING", "end_time": text}}).ended_at is None


@pytest.mark.parametrize("text", ["2025-10-27T06:19:31Z", "2025-10-27T06:19:31+00:00", "2025-10-27T14:19:31+08:00"])
def test_a_time_that_names_its_zone_is_believed(text: str) -> None:
    report = read_report({"output": {"task_status": "RUNNING", "end_time": text}})
    assert report.ended_at == datetime(2025, 10, 27, 6, 19, 31, 0, UTC)


@pytest.mark.parametrize(
    ("usage", "seconds"),
    [
        ({"seconds": 3}, 3),
        ({"duration": 6}, 6),
        ({"seconds": 3, "duration": 6}, 3),
        ({"seconds": 0, "duration": 6}, 0),
        ({"seconds": None, "duration": 6}, 6),
        ({"seconds": "x", "duration": 5.2}, 6),
        ({"seconds": 2.5}, 3),
        ({"seconds": -1}, None),
        ({"duration": True}, None),
        ({"duration": 10**30}, None),
        ({}, None),
        ([], None),
        (None, None),
        ("6", None),
    ],
    ids=repr,
)
def test_seconds_come_under_two_names(usage: object, seconds: int | None) -> None:
    assert read_report({"output": {"task_status": "SUCCEEDED"}, "usage": usage}).seconds == seconds


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
times = st.datetimes().map(lambda moment: moment.isoformat(" ", "milliseconds")) | st.dates().map(str) | values


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """An object with some of these fields, each of which may be anything; or anything else."""
    return st.fixed_dictionaries({}, optional={name: field | values for name, field in fields.items()}) | values


statuses = st.sampled_from(["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "CANCELED", "UNKNOWN"])
outputs = some(
    task_status=statuses,
    submit_time=times,
    scheduled_time=times,
    end_time=times,
    result=some(transcription_url=values),
    results=st.lists(some(subtask_status=statuses, transcription_url=values, code=values, message=values), max_size=3),
    code=values,
    message=values,
)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(output=outputs, usage=some(seconds=values, duration=values), request_id=values)
def test_any_report_has_only_the_types_that_it_promises(output: Any, usage: Any, request_id: Any) -> None:
    report = read_report({"output": output, "usage": usage, "request_id": request_id})
    assert report.status in {"PENDING", "RUNNING", "SUCCEEDED", "FAILED", "UNKNOWN"}
    for moment in (report.submitted_at, report.scheduled_at, report.ended_at):
        assert moment is None or moment.tzinfo is UTC
    for word in (report.result_url, report.request_id):
        assert word is None or (type(word) is str and word)
    assert type(report.code) is str
    assert type(report.message) is str
    assert report.seconds is None or (type(report.seconds) is int and 0 <= report.seconds <= MAX_COUNT)


# ---- Result files


class Result(NamedTuple):
    """What a result file holds."""

    transcripts: tuple[Transcript, ...]
    audio: AudioInfo


def read(file: Any) -> Result:
    """A result file that was JSON."""
    return Result(*read_result(json.dumps(file).encode()))


def join_text(transcripts: tuple[Transcript, ...]) -> str:
    """What was said on all tracks."""
    return "\n".join(track.text for track in transcripts)


def changed(file: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The file with another value at a path."""
    whole: Any = copy.deepcopy(file)
    inner = whole
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in way:
        inner = inner[part]
    inner[last] = value
    return whole  # type: ignore[no-any-return]


def without(file: dict[str, Any], path: str) -> dict[str, Any]:
    """The file with nothing at a path."""
    whole: Any = copy.deepcopy(file)
    inner = whole
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in way:
        inner = inner[part]
    del inner[last]
    return whole  # type: ignore[no-any-return]


def test_the_captured_file() -> None:
    result = read(CAPTURED_FILE)
    assert (result.audio.format, result.audio.sample_rate, result.audio.duration_ms) == ("pcm_s16le", 24000, 5680)
    (track,) = result.transcripts
    assert (track.channel_id, track.text) == (0, "听好了，")
    (sentence,) = track.sentences
    assert (sentence.sentence_id, sentence.begin_time, sentence.end_time) == (1, 40, 5610)
    assert (sentence.text, sentence.language, sentence.emotion) == ("听好了，", None, None)
    assert sentence.words is not None
    assert sentence.words[-1] == Word(begin_time=330, end_time=730, text="了", punctuation="，")
    assert len(sentence.words) == 3


def test_the_documented_file() -> None:
    result = read(DOCUMENTED_FILE)
    assert (result.audio.format, result.audio.sample_rate, result.audio.duration_ms) == ("mp3", 22050, None)
    (sentence,) = result.transcripts[0].sentences
    assert (sentence.sentence_id, sentence.language, sentence.emotion) == (0, "zh", "neutral")
    assert join_text(result.transcripts) == "欢迎使用阿里云。"


def test_tracks_stay_apart() -> None:
    tracks = [{**DOCUMENTED_FILE["transcripts"][0], "channel_id": channel} for channel in (0, 1)]
    result = read({**DOCUMENTED_FILE, "transcripts": tracks})
    assert [track.channel_id for track in result.transcripts] == [0, 1]


SENTENCE = "transcripts.0.sentences.0"
HARMLESS: dict[str, dict[str, Any]] = {
    "more in the file": changed(DOCUMENTED_FILE, "new", {"a": [1]}),
    "more in a track": changed(DOCUMENTED_FILE, "transcripts.0.new", [None]),
    "more in a sentence": changed(DOCUMENTED_FILE, f"{SENTENCE}.new", "x"),
    "more in a word": changed(DOCUMENTED_FILE, f"{SENTENCE}.words.0.new", 1),
    "more of the audio": changed(DOCUMENTED_FILE, "audio_info.new", 1),
    "no address": without(DOCUMENTED_FILE, "file_url"),
    "no audio": without(DOCUMENTED_FILE, "audio_info"),
    "null audio": changed(DOCUMENTED_FILE, "audio_info", None),
    "empty audio": changed(DOCUMENTED_FILE, "audio_info", {}),
    "nulls of the audio": changed(DOCUMENTED_FILE, "audio_info", {"format": None, "sample_rate": None}),
    "null properties": changed(CAPTURED_FILE, "properties", None),
    "no properties": without(CAPTURED_FILE, "properties"),
    "empty properties": changed(CAPTURED_FILE, "properties", {}),
    "null channel": changed(DOCUMENTED_FILE, "transcripts.0.channel_id", None),
    "no channel": without(DOCUMENTED_FILE, "transcripts.0.channel_id"),
    "no words": without(DOCUMENTED_FILE, f"{SENTENCE}.words"),
    "null words": changed(DOCUMENTED_FILE, f"{SENTENCE}.words", None),
    "empty words": changed(DOCUMENTED_FILE, f"{SENTENCE}.words", []),
    "no number": without(DOCUMENTED_FILE, f"{SENTENCE}.sentence_id"),
    "null number": changed(DOCUMENTED_FILE, f"{SENTENCE}.sentence_id", None),
    "null language": changed(DOCUMENTED_FILE, f"{SENTENCE}.language", None),
    "a speaker": changed(DOCUMENTED_FILE, f"{SENTENCE}.speaker_id", 2),
    "null punctuation": changed(DOCUMENTED_FILE, f"{SENTENCE}.words.0.punctuation", None),
    "no punctuation": without(DOCUMENTED_FILE, f"{SENTENCE}.words.0.punctuation"),
    "a broken time": changed(DOCUMENTED_FILE, f"{SENTENCE}.end_time", 1440.4),
    "a broken time of a word": changed(DOCUMENTED_FILE, f"{SENTENCE}.words.0.begin_time", 0.3),
    "a broken sample rate": changed(DOCUMENTED_FILE, "audio_info.sample_rate", 22050.0),
    "a broken duration": changed(CAPTURED_FILE, "properties.original_duration_in_milliseconds", 5680.4),
}


@pytest.mark.parametrize("file", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_is_missing_or_new_does_no_harm(file: dict[str, Any]) -> None:
    result = read(file)
    assert join_text(result.transcripts) in {"欢迎使用阿里云。", "听好了，"}
    (sentence,) = result.transcripts[0].sentences
    assert sentence.end_time in {1440, 5610}


SILENT: dict[str, dict[str, Any]] = {
    "no tracks": {"transcripts": []},
    "an empty track": {"transcripts": [{}]},
    "an empty text": {"transcripts": [{"channel_id": 0, "text": "", "sentences": []}]},
    "a null text": {"transcripts": [{"channel_id": 0, "text": None}]},
    "null tracks": {"transcripts": None},
    "null sentences": {"transcripts": [{"channel_id": 0, "text": "", "sentences": None}]},
}


@pytest.mark.parametrize("file", SILENT.values(), ids=SILENT.keys())
def test_a_file_without_words_is_silence(file: dict[str, Any]) -> None:
    result = read(file)
    assert join_text(result.transcripts) == ""
    assert [sentence for track in result.transcripts for sentence in track.sentences] == []
    assert result.audio.duration_ms is None


ODD: dict[str, list[Any]] = {
    "transcripts": [{}, "x", [None], ["x"], [[]]],
    "transcripts.0.text": [7, [], {}],
    "transcripts.0.channel_id": ["x", [], 0.5],
    "transcripts.0.sentences": ["x", {}, [None]],
    f"{SENTENCE}.begin_time": ["x", [], float("nan"), float("inf")],
    f"{SENTENCE}.end_time": ["1s", {}],
    f"{SENTENCE}.text": [7, ["x"]],
    f"{SENTENCE}.words": ["x", {}, [None]],
    f"{SENTENCE}.words.0.begin_time": ["x"],
    f"{SENTENCE}.words.0.text": [7, {}],
}
UNFIT: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>",
    "half": json.dumps(CAPTURED_FILE).encode()[:-1],
    "more than one": json.dumps(CAPTURED_FILE).encode() * 2,
    "bad letters": b'{"transcripts":[{"text":"\xff"}]}',
    "zeros": b"\x00" * 100,
    "packed": b"\x1f\x8b\x08\x00" + b"\x00" * 20,
    "deep": b"[" * 100_000,
    "deep in a new field": b'{"transcripts":[],"new":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep in a track": b'{"transcripts":[{"sentences":' + b'[{"words":' * 100_000,
    "an endless number": b'{"transcripts":[{"channel_id":' + b"9" * 100_000 + b"}]}",
    "a list": b"[]",
    "null": b"null",
    "a text": b'"transcripts"',
    "an empty object": b"{}",
    "an error": b'{"code":"AccessDenied","message":"x"}',
} | {
    f"{path} = {json.dumps(value)}": json.dumps(changed(DOCUMENTED_FILE, path, value)).encode()
    for path, odd in ODD.items()
    for value in odd
}


@pytest.mark.parametrize("content", UNFIT.values(), ids=UNFIT.keys())
def test_what_is_no_result_is_refused(content: bytes) -> None:
    with pytest.raises(UpstreamError) as refused:
        read_result(content)
    assert type(refused.value) is UpstreamError
    assert refused.value.__suppress_context__  # the parser's words quote the transcript


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("begin_time", None),
        ("sentence_id", "7"),
        ("speaker_id", [1]),
        ("emotion", 5),
        ("language", {"zh": 1}),
        ("end_time", 10**15),
    ],
)
def test_nothing_odd_in_what_nobody_needs_costs_the_transcript(path: str, value: object) -> None:
    (sentence,) = read(changed(DOCUMENTED_FILE, f"{SENTENCE}.{path}", value)).transcripts[0].sentences
    assert sentence.text == "欢迎使用阿里云。"
    assert sentence.end_time <= 10**9


def test_a_sentence_without_times_keeps_its_text() -> None:
    (sentence,) = (
        read(without(without(DOCUMENTED_FILE, f"{SENTENCE}.begin_time"), f"{SENTENCE}.end_time"))
        .transcripts[0]
        .sentences
    )
    assert (sentence.begin_time, sentence.end_time, sentence.text) == (0, 0, "欢迎使用阿里云。")


@pytest.mark.parametrize("letter", ["\\u0000", "\\ud83d"], ids=["NUL", "half a letter"])
def test_letters_that_cannot_be_stored_are_replaced(letter: str) -> None:
    content = json.dumps(changed(DOCUMENTED_FILE, "transcripts.0.text", "LETTER")).replace("LETTER", f"你{letter}好")
    kept = digest_result(content.encode())
    assert kept.text == "你\ufffd好"
    kept.transcripts.encode()


def test_a_digest_tells_words_and_the_rest_apart() -> None:
    kept = digest_result(json.dumps(DOCUMENTED_FILE).encode())
    assert kept.transcripts_with_words is not None
    (whole,), (plain,) = Transcripts.validate_json(kept.transcripts_with_words), json.loads(kept.transcripts)
    assert whole == read(DOCUMENTED_FILE).transcripts[0]
    assert plain["sentences"][0].keys() == {"begin_time", "end_time", "text", "sentence_id", "language", "emotion"}
    assert (kept.text, kept.tracks, kept.last_word_ms) == ("欢迎使用阿里云。", 1, 1440)
    assert (
        digest_result(json.dumps(without(DOCUMENTED_FILE, f"{SENTENCE}.words")).encode()).transcripts_with_words is None
    )


moments = st.integers(0, 10**8) | st.floats(0, 10**8)
words = some(begin_time=moments, end_time=moments, text=st.text(), punctuation=st.text())
sentences = some(
    begin_time=moments, end_time=moments, text=st.text(), sentence_id=st.integers(), words=st.lists(words, max_size=2)
)
tracks = some(channel_id=st.integers(), text=st.text(), sentences=st.lists(sentences, max_size=2))
files = some(
    transcripts=st.lists(tracks, max_size=2),
    audio_info=some(format=st.text(), sample_rate=st.integers()),
    properties=some(audio_format=st.text(), original_sampling_rate=st.integers()),
)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.binary() | files.map(lambda file: json.dumps(file).encode()))
def test_any_file_is_a_result_or_an_error_of_ours(content: bytes) -> None:
    with suppress(UpstreamError):
        for track in read_result(content)[0]:
            assert type(track.text) is str
            for sentence in track.sentences:
                assert type(sentence.begin_time) is type(sentence.end_time) is int


# ---- Fetching


async def fetched(transcriber: TranscriptionClient, credential: Credential, url: str) -> bytes:
    """The whole of a result file."""
    taken: list[bytes] = []

    async def take(piece: bytes) -> None:
        taken.append(piece)

    await transcriber.fetch(credential, url, take)
    return b"".join(taken)


def at(provider: HttpProvider, path: str = RESULT_PATH) -> str:
    return provider.url + path


async def test_a_result_is_fetched_without_the_key(provider: HttpProvider, transcriber: TranscriptionClient) -> None:
    provider.expect(answers(CAPTURED_FILE))
    inside = replace(provider.credential, workspace="ws-1")
    assert json.loads(await fetched(transcriber, inside, at(provider))) == CAPTURED_FILE
    (request,) = provider.requests
    assert (request.method, request.target) == ("GET", RESULT_PATH)
    assert request.header("Authorization") is None
    assert request.header("X-DashScope-WorkSpace") is None
    assert request.header("Accept-Encoding") == "identity"
    assert API_KEY not in str(request.headers)


@pytest.mark.parametrize("scheme", ["https", "http"])
async def test_a_result_in_a_bucket_is_always_fetched_over_tls(
    provider: HttpProvider, transcriber: TranscriptionClient, scheme: str
) -> None:
    async with respx.mock() as router:
        route = router.route(host="dashscope-result-bj.oss-cn-beijing.aliyuncs.com").respond(json=DOCUMENTED_FILE)
        result = await fetched(transcriber, provider.credential, RESULT_URL.replace("https", scheme, 1))
    assert json.loads(result) == DOCUMENTED_FILE
    request = route.calls.last.request
    assert (request.url.scheme, request.url.port) == ("https", None)
    assert request.url.raw_path.decode() == RESULT_PATH
    assert "Authorization" not in request.headers
    assert provider.requests == []


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a.json",
        "http://169.254.169.254/latest/meta-data",
        "http://127.0.0.1:1/a.json",
        "https://b.oss-cn-beijing-internal.aliyuncs.com/a.json",
        "https://user@b.oss-cn-beijing.aliyuncs.com/a.json",
        "file:///etc/passwd",
        "oss://b/a.json",
        "",
        "a.json",
    ],
)
async def test_nobody_else_is_asked_for_a_result(
    provider: HttpProvider, transcriber: TranscriptionClient, url: str
) -> None:
    async with respx.mock(assert_all_called=False) as router:
        route = router.route().respond(json=DOCUMENTED_FILE)
        with pytest.raises(UpstreamError):
            await fetched(transcriber, provider.credential, url)
    assert not route.called


@pytest.mark.parametrize("path", ["/\x01.json", "/a\x7f", "/" + "a" * 70_000], ids=["control", "delete", "endless"])
async def test_an_address_that_cannot_be_called_is_an_error_of_ours(
    provider: HttpProvider, transcriber: TranscriptionClient, path: str
) -> None:
    with pytest.raises(UpstreamError):
        await fetched(transcriber, provider.credential, at(provider, path))


@pytest.mark.parametrize("status", [201, 204, 206, 301, 302, 307, 400, 401, 403, 404, 429, 500, 503])
async def test_only_200_brings_a_result(provider: HttpProvider, transcriber: TranscriptionClient, status: int) -> None:
    body = b"" if status == 204 else json.dumps(CAPTURED_FILE).encode()
    provider.expect(answers(body, status, location=at(provider, "/elsewhere")))
    with pytest.raises(UpstreamError, match=str(status)) as refused:
        await fetched(transcriber, provider.credential, at(provider))
    assert type(refused.value) is (ConnectionLost if status >= 400 else UpstreamError)  # that may pass, this not
    assert len(provider.requests) == 1


async def test_a_result_beyond_the_limit_is_not_read(
    provider: HttpProvider, transcriber: TranscriptionClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.dumps(CAPTURED_FILE).encode()
    provider.expect(answers(content), answers(content))
    monkeypatch.setattr("app.dashscope.transcription.MAX_RESULT_BYTES", len(content))
    await fetched(transcriber, provider.credential, at(provider))
    monkeypatch.setattr("app.dashscope.transcription.MAX_RESULT_BYTES", len(content) - 1)
    with pytest.raises(UpstreamError):
        await fetched(transcriber, provider.credential, at(provider))


async def test_a_result_may_be_larger_than_an_answer(
    provider: HttpProvider, transcriber: TranscriptionClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.dashscope.http.MAX_ANSWER_BYTES", 100)
    provider.expect(answers(CAPTURED_FILE))
    await fetched(transcriber, provider.credential, at(provider))


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (Line.hang_up, ConnectionLost),
        (in_turn(sends(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"), Line.hang_up), ConnectionLost),
        (Line.keep_silent, UpstreamTimeout),
    ],
    ids=["closed", "cut off", "silent"],
)
async def test_a_broken_fetch_has_its_own_error(provider: HttpProvider, act: Act, error: type[AppError]) -> None:
    provider.expect(act)
    async with provider.client(silence_seconds=0.3) as http:
        with pytest.raises(AppError) as broken:
            await fetched(TranscriptionClient(http), provider.credential, at(provider))
    assert type(broken.value) is error


async def test_the_reason_of_a_failed_submission_is_told(
    provider: HttpProvider, transcriber: TranscriptionClient
) -> None:
    provider.expect(refuses("InvalidFile.DownloadFailed", "The audio file cannot be downloaded."))
    with pytest.raises(InvalidAudio):
        await transcriber.submit(provider.credential, PARAFORMER, AUDIO_URL)


async def test_each_region_has_its_own_task_address(provider: HttpProvider, transcriber: TranscriptionClient) -> None:
    singapore = Credential(API_KEY, "ws://unused.test", "https://dashscope-intl.aliyuncs.com/api/v1")
    async with respx.mock() as router:
        route = router.get("https://dashscope-intl.aliyuncs.com/api/v1/tasks/task-1").mock(
            return_value=httpx.Response(200, json=CAPTURED_REPORT)
        )
        await transcriber.inspect(singapore, "task-1")
    assert route.called
