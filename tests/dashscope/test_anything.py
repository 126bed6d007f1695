"""What the provider says of voices, times and failures is read, in bounded time, into what can be stored and shown."""

import json
import time
from contextlib import suppress
from datetime import UTC
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.dashscope.answers import read_instant, read_moment, understand
from app.dashscope.enrollment import MAX_VOICE_ID_CHARS, read_report
from app.dashscope.failures import MAX_PROVIDER_MESSAGE_CHARS, MAX_RETRY_AFTER_SECONDS, explain, plain, read_retry_after
from app.dashscope.frames import MalformedEvent, parse_event
from app.errors import AppError

FARTHEST_ZONES = (ZoneInfo("Pacific/Kiritimati"), ZoneInfo("Pacific/Pago_Pago"))
# What takes ten megabytes of it takes no longer than this; a slow search would take hours.
PATIENCE_SECONDS = 10.0
TEN_MEGABYTES = 10 * 1024 * 1024

texts = st.text(st.characters(), max_size=40)  # lone surrogates included, as JSON may hold them
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
times = (
    anything
    | st.datetimes(timezones=st.none() | st.timezones()).map(str)
    | st.sampled_from(
        ["0001-01-01T00:00:00+14:00", "9999-12-31 23:59:59", "9999-12-31T23:59:59Z", "1970-01-01 07:59:59"]
    )
)


def may_be_kept(text: str) -> bool:
    """Whether every database takes it and every log and answer can show it."""
    return text.encode().decode() == text and "\0" not in text


@settings(derandomize=True, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "voice_id": anything | st.just("cosyvoice-v2-mine-1"),
            "status": anything | st.sampled_from(["OK", "DEPLOYING", "UNDEPLOYED"]),
            "gmt_create": times,
            "gmt_modified": times,
            "target_model": anything,
            "resource_link": anything,
        },
    )
)
def test_any_voice_is_one_or_none(entry: dict[str, Any]) -> None:
    report = read_report(entry)
    if report is None:
        return
    assert 0 < len(report.voice_id) <= MAX_VOICE_ID_CHARS
    assert report.status in {"DEPLOYING", "OK", "UNDEPLOYED"}
    assert report.created_at.tzinfo is UTC
    assert report.modified_at.tzinfo is UTC
    for word in (report.voice_id, report.target_model, report.resource_link):
        assert word is None or may_be_kept(word)


@settings(derandomize=True, deadline=None)
@given(times)
def test_any_time_can_be_shown_in_every_zone_or_is_none(told: Any) -> None:
    for moment in (read_moment(told), read_instant(told)):
        for zone in FARTHEST_ZONES:
            assert moment is None or moment.astimezone(zone).isoformat()


@pytest.mark.parametrize("told", ["9999-12-31T23:59:59+00:00", "0001-01-01T00:00:00+00:00", "1969-12-31 23:59:59"])
def test_times_that_some_zone_has_no_word_for_are_none(told: str) -> None:
    assert read_moment(told) is None


@settings(derandomize=True, deadline=None)
@given(
    texts | st.sampled_from(["InvalidApiKey", "Throttling", "Audio.DecoderError", "InternalError", "InvalidParameter"]),
    texts | st.text("sk-Bearer http://?a\0\ud800", max_size=60),
    st.sampled_from([0, 200, 400, 401, 404, 429, 500, 503]),
)
def test_any_failure_is_one_of_ours_with_words_that_can_be_shown(code: str, message: str, status: int) -> None:
    error = explain(code, message, status)
    assert isinstance(error, AppError)
    assert may_be_kept(error.message)
    assert may_be_kept(plain(message))
    assert len(plain(message)) <= MAX_PROVIDER_MESSAGE_CHARS


@settings(derandomize=True, deadline=None)
@given(
    st.none() | texts | st.datetimes(timezones=st.none() | st.timezones()).map(str) | st.text("0123456789:, GMTMon-+")
)
def test_any_retry_after_is_a_bearable_time_or_none(told: str | None) -> None:
    seconds = read_retry_after(told)
    assert seconds is None or 1 <= seconds <= MAX_RETRY_AFTER_SECONDS


LARGE_TEXTS = ["http://", "https://a?", "sk-", "Bearer ", "\x00", "\ud800", " ", "[tts:]", "a"]


@pytest.mark.parametrize("piece", LARGE_TEXTS, ids=[ascii(piece) for piece in LARGE_TEXTS])
def test_ten_megabytes_of_a_reason_are_read_in_no_time(piece: str) -> None:
    began = time.monotonic()
    assert may_be_kept(explain("X", piece * (TEN_MEGABYTES // len(piece)), 400).message)
    assert may_be_kept(plain(piece * (TEN_MEGABYTES // len(piece))))
    assert time.monotonic() - began < PATIENCE_SECONDS


LARGE_BODIES = [
    b"\n",
    b"data:\n",
    b"data: {}\n",
    b"[",
    b'{"a":',
    b'"',
    b"9",
    b"\xff",
    b'{"code":"x","message":"http://"}',
]


@pytest.mark.parametrize("piece", LARGE_BODIES, ids=[ascii(piece) for piece in LARGE_BODIES])
def test_ten_megabytes_of_anything_are_an_answer_or_a_failure_in_no_time(piece: bytes) -> None:
    body = piece * (TEN_MEGABYTES // len(piece))
    began = time.monotonic()
    with suppress(AppError):
        understand(200, body)
    with suppress(MalformedEvent):
        parse_event(body.decode("latin-1"))
    assert time.monotonic() - began < PATIENCE_SECONDS


def test_an_event_of_ten_megabytes_is_read_in_no_time() -> None:
    words = [{"text": "好", "begin_time": at, "end_time": at + 1} for at in range(150_000)]
    header = {"event": "result-generated", "task_id": "t"}
    told = json.dumps({"header": header, "payload": {"output": {"sentence": {"words": words}}}})
    assert len(told) > TEN_MEGABYTES // 2
    began = time.monotonic()
    assert len(parse_event(told).words) == len(words)
    assert time.monotonic() - began < PATIENCE_SECONDS


@pytest.mark.parametrize("name", ["request_id", "code", "message", "output", "error", "x"])
@pytest.mark.parametrize("depth", [*range(900, 1001, 5), 5000])
def test_no_depth_of_an_answer_is_too_much(name: str, depth: int) -> None:
    body = f'{{"{name}":{"[" * depth}{"]" * depth}}}'.encode()
    with suppress(AppError):
        understand(400, body)
    with suppress(MalformedEvent):
        parse_event(body.decode())
