"""Short audio to text: what is sent, and every answer that is thinkable (PROTOCOL §4)."""

import base64
import io
import math
import random
import threading
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.dashscope import InlineAudio, RecognitionClient, RecognitionOrder
from app.dashscope.answers import MAX_COUNT, count
from app.dashscope.recognition import PATH, read_recognition
from app.errors import ConnectionLost, InvalidApiKey, Throttled, UpstreamError
from tests.dashscope.http_provider import HttpProvider, Line, answers, refuses, throttles

CHUNK = 3 * 64 * 1024
FLASH = RecognitionOrder("qwen3-asr-flash")
DOCUMENTED = {
    "output": {
        "choices": [
            {
                "finish_reason": "stop",
                "message": {
                    "annotations": [{"language": "zh", "type": "audio_info", "emotion": "neutral"}],
                    "content": [{"text": "欢迎使用阿里云。"}],
                    "role": "assistant",
                },
            }
        ]
    },
    "usage": {"input_tokens_details": {"text_tokens": 0}, "output_tokens_details": {"text_tokens": 6}, "seconds": 1},
    "request_id": "req-1",
}


def noise(size: int) -> bytes:
    """Bytes that are always the same."""
    return random.Random(size).randbytes(size)


def inline(content: bytes, content_type: str = "audio/mpeg") -> InlineAudio:
    return InlineAudio(io.BytesIO(content), len(content), content_type)


@pytest.fixture
async def provider() -> AsyncIterator[HttpProvider]:
    """A provider without a plan yet."""
    async with HttpProvider.run() as running:
        yield running


@pytest.fixture
async def recogniser(provider: HttpProvider) -> AsyncIterator[RecognitionClient]:
    """The client under test."""
    async with provider.client() as http:
        yield RecognitionClient(http)


def uri_of(body: Any) -> str:
    """The audio in a request."""
    uri: str = body["input"]["messages"][-1]["content"][0]["audio"]
    return uri


# ---- What is sent


@pytest.mark.parametrize(
    ("order", "body"),
    [
        (
            FLASH,
            {
                "model": "qwen3-asr-flash",
                "input": {"messages": [{"role": "user", "content": [{"audio": "https://a.test/b.mp3"}]}]},
                "parameters": {"asr_options": {"enable_itn": False}},
            },
        ),
        (
            RecognitionOrder("qwen3-asr-flash", language="zh", enable_itn=True, context="专有名词"),
            {
                "model": "qwen3-asr-flash",
                "input": {
                    "messages": [
                        {"role": "system", "content": [{"text": "专有名词"}]},
                        {"role": "user", "content": [{"audio": "https://a.test/b.mp3"}]},
                    ]
                },
                "parameters": {"asr_options": {"enable_itn": True, "language": "zh"}},
            },
        ),
        (
            RecognitionOrder("qwen-audio-asr", language="zh", enable_itn=True),
            {
                "model": "qwen-audio-asr",
                "input": {"messages": [{"role": "user", "content": [{"audio": "https://a.test/b.mp3"}]}]},
            },
        ),
    ],
    ids=["bare", "full", "qwen-audio-asr"],
)
async def test_an_order_is_written_as_its_model_wants_it(
    provider: HttpProvider, recogniser: RecognitionClient, order: RecognitionOrder, body: dict[str, Any]
) -> None:
    provider.expect(answers(DOCUMENTED), answers(DOCUMENTED))
    await recogniser.recognize(provider.credential, order, "https://a.test/b.mp3")
    await recogniser.recognize(provider.credential, order, inline(b"ID3"))
    by_url, by_value = provider.requests
    assert by_url.json == body
    inside = by_value.json
    assert uri_of(inside) == "data:audio/mpeg;base64,SUQz"
    inside["input"]["messages"][-1]["content"][0]["audio"] = "https://a.test/b.mp3"
    assert inside == body
    assert {request.target for request in provider.requests} == {f"/api/v1{PATH}"}


@pytest.mark.parametrize(("audio", "header"), [("oss://folder/a.mp3", "enable"), ("https://a.test/b.mp3", None)])
async def test_only_an_upload_is_to_be_resolved(
    provider: HttpProvider, recogniser: RecognitionClient, audio: str, header: str | None
) -> None:
    provider.expect(answers(DOCUMENTED))
    await recogniser.recognize(provider.credential, FLASH, audio)
    (request,) = provider.requests
    assert request.header("X-DashScope-OssResourceResolve") == header
    assert request.header("X-DashScope-Async") is None
    assert uri_of(request.json) == audio


@pytest.mark.parametrize(
    "size", [0, 1, 2, 3, 4, 5, 3000, CHUNK - 2, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 2, 2 * CHUNK, 2 * CHUNK + 1]
)
async def test_audio_of_any_size_arrives_whole(
    provider: HttpProvider, recogniser: RecognitionClient, size: int
) -> None:
    provider.expect(answers(DOCUMENTED))
    audio = inline(noise(size), "audio/wav")
    await recogniser.recognize(provider.credential, FLASH, audio)
    (request,) = provider.requests
    assert request.header("Content-Length") == str(len(request.body))
    assert request.header("Transfer-Encoding") is None
    assert request.header("Content-Type") == "application/json"
    uri = uri_of(request.json)
    prefix, encoded = uri.split(",")
    assert prefix + "," == audio.prefix == "data:audio/wav;base64,"
    assert base64.b64decode(encoded, validate=True) == noise(size)
    assert len(uri) == audio.encoded_size


ODD = {
    "quotes": '"}]}],"model":"other',
    "backslashes": "\\ \\\\ \\u0041 \\",
    "lines": "一\n二\r\n三\t四\u2028五",
    "zeros": "a\x00b\x1f\x7f",
    "signs": "😀 é 𝄞 </script> {} [] ,: data:audio/mpeg;base64,AAAA",
    "hex": "0123456789abcdef" * 4,
    "long": "上下文" * 10_000,
}


@pytest.mark.parametrize("context", ODD.values(), ids=ODD.keys())
async def test_a_context_of_odd_signs_arrives_as_it_is(
    provider: HttpProvider, recogniser: RecognitionClient, context: str
) -> None:
    provider.expect(answers(DOCUMENTED))
    await recogniser.recognize(provider.credential, RecognitionOrder("qwen3-asr-flash", context=context), inline(b"ab"))
    (request,) = provider.requests
    assert request.header("Content-Length") == str(len(request.body))
    system, user = request.json["input"]["messages"]
    assert system == {"role": "system", "content": [{"text": context}]}
    assert user == {"role": "user", "content": [{"audio": "data:audio/mpeg;base64,YWI="}]}


async def test_each_attempt_sends_the_whole_audio(provider: HttpProvider, recogniser: RecognitionClient) -> None:
    content = noise(CHUNK + 100)
    audio = inline(content)
    audio.source.seek(50)
    provider.expect(throttles, throttles, answers(DOCUMENTED))
    await recogniser.recognize(provider.credential, FLASH, audio)
    assert len(provider.requests) == 3
    for request in provider.requests:
        assert base64.b64decode(uri_of(request.json).partition(",")[2]) == content


async def test_audio_can_be_sent_after_a_refusal(provider: HttpProvider, recogniser: RecognitionClient) -> None:
    audio = inline(b"once more")
    provider.expect(refuses("InvalidApiKey", status=401), Line.hang_up, answers(DOCUMENTED))
    with pytest.raises(InvalidApiKey):
        await recogniser.recognize(provider.credential, FLASH, audio)
    with pytest.raises(ConnectionLost):
        await recogniser.recognize(provider.credential, FLASH, audio)
    assert (await recogniser.recognize(provider.credential, FLASH, audio)).text == "欢迎使用阿里云。"
    assert len({uri_of(request.json) for request in provider.requests}) == 1
    assert len(provider.requests) == 3


async def test_throttling_for_ever_is_told(provider: HttpProvider, recogniser: RecognitionClient) -> None:
    provider.expect(*[throttles] * 4)
    with pytest.raises(Throttled):
        await recogniser.recognize(provider.credential, FLASH, inline(b"ab"))


async def test_a_large_audio_is_never_held_whole(
    provider: HttpProvider, recogniser: RecognitionClient, tmp_path: Path
) -> None:
    size = 7 * 1024 * 1024
    file = tmp_path / "audio"
    file.write_bytes(noise(size))
    provider.keeps_bodies = False
    provider.expect(answers(DOCUMENTED), answers(DOCUMENTED))
    await recogniser.recognize(provider.credential, FLASH, inline(b"warm"))
    with file.open("rb") as source:
        tracemalloc.start()
        await recogniser.recognize(provider.credential, FLASH, InlineAudio(source, size, "audio/wav"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert int(provider.requests[-1].header("Content-Length") or 0) > size * 4 / 3
    assert peak < size / 3


async def test_the_file_is_read_beside_the_event_loop(provider: HttpProvider, recogniser: RecognitionClient) -> None:
    readers: set[int] = set()

    class Watched(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            readers.add(threading.get_ident())
            return super().read(size)

    provider.expect(answers(DOCUMENTED))
    await recogniser.recognize(provider.credential, FLASH, InlineAudio(Watched(b"abc"), 3, "audio/wav"))
    assert readers
    assert threading.get_ident() not in readers


# ---- How answers are read


def heard(message: object, usage: object = None) -> dict[str, Any]:
    return {"output": {"choices": [{"finish_reason": "stop", "message": message}]}, "usage": usage}


def test_the_documented_answer() -> None:
    recognition = read_recognition(DOCUMENTED)
    assert (recognition.text, recognition.language, recognition.emotion) == ("欢迎使用阿里云。", "zh", "neutral")
    assert (recognition.input_tokens, recognition.output_tokens, recognition.seconds) == (0, 6, 1)
    assert recognition.request_id == "req-1"


def test_the_answer_of_the_older_model() -> None:
    usage = {"input_tokens": 101, "output_tokens": 12, "audio_tokens": 101}
    recognition = read_recognition(heard({"role": "assistant", "content": [{"text": "你好"}]}, usage))
    assert (recognition.text, recognition.language, recognition.emotion) == ("你好", None, None)
    assert (recognition.input_tokens, recognition.output_tokens, recognition.seconds) == (101, 12, 5)
    assert recognition.request_id is None


SILENT: dict[str, dict[str, Any]] = {
    "no content": heard({"content": []}),
    "missing content": heard({"role": "assistant"}),
    "null content": heard({"content": None}),
    "empty content": heard({"content": ""}),
    "empty text": heard({"content": [{"text": ""}]}),
    "null text": heard({"content": [{"text": None}]}),
    "no text": heard({"content": [{}]}),
    "a null piece": heard({"content": [None]}),
    "a null message": heard(None),
    "no message": {"output": {"choices": [{"finish_reason": "stop"}]}},
    "a null choice": {"output": {"choices": [None]}},
    "no choices": {"output": {"choices": []}},
    "null notes": heard({"content": [], "annotations": None}),
    "no notes": heard({"content": [], "annotations": []}),
    "odd notes": heard({"content": [], "annotations": ["zh", {"language": "zh"}]}),
    "odd words": heard({"content": [], "annotations": [{"language": 7, "emotion": ["sad"]}]}),
    "empty words": heard({"content": [], "annotations": [{"language": "", "emotion": ""}]}),
}


@pytest.mark.parametrize("answer", SILENT.values(), ids=SILENT.keys())
def test_silence_is_an_empty_text(answer: dict[str, Any]) -> None:
    recognition = read_recognition(answer)
    assert (recognition.text, recognition.language, recognition.emotion) == ("", None, None)
    assert (recognition.input_tokens, recognition.output_tokens, recognition.seconds) == (0, 0, None)


NOTHING: dict[str, dict[str, Any]] = {
    "null choices": {"output": {"choices": None}},
    "odd choices": {"output": {"choices": {"message": {}}}},
    "missing choices": {"output": {"finish_reason": "stop"}},
    "a null output": {"output": None},
    "an odd output": {"output": []},
    "no output": {},
    "somebody else's answer": {"success": False, "msg": "系统繁忙"},
}


@pytest.mark.parametrize("answer", NOTHING.values(), ids=NOTHING.keys())
def test_no_answer_at_all_is_no_silence(answer: dict[str, Any]) -> None:
    with pytest.raises(UpstreamError):
        read_recognition({**answer, "request_id": "r", "usage": {}})
    assert read_recognition({**answer, "usage": {"seconds": 3}}).seconds == 3  # what was counted is billed


def test_silence_may_still_be_counted() -> None:
    notes = [{"language": "zh", "emotion": "neutral"}]
    recognition = read_recognition(heard({"content": [], "annotations": notes}, {"seconds": 3}))
    assert (recognition.text, recognition.language, recognition.seconds) == ("", "zh", 3)


@pytest.mark.parametrize(
    "content",
    ["你好", [{"text": "你好"}], [{"text": "你"}, {"text": "好"}], [{"text": None}, {"image": "x"}, {"text": "你好"}]],
)
def test_text_comes_in_pieces_or_whole(content: object) -> None:
    assert read_recognition(heard({"content": content})).text == "你好"


@pytest.mark.parametrize("text", [7, 1.5, True, ["你好"], {"a": "b"}], ids=repr)
def test_what_is_no_text_is_not_shown_as_one(text: object) -> None:
    assert read_recognition(heard({"content": [{"text": text}]})).text == ""
    assert read_recognition(heard({"content": {"text": text}})).text == ""


@pytest.mark.parametrize(
    ("usage", "seconds"),
    [
        ({"seconds": 0}, 0),
        ({"seconds": 1}, 1),
        ({"seconds": 300}, 300),
        ({"seconds": 1.0}, 1),
        ({"seconds": 1.01}, 2),
        ({"seconds": MAX_COUNT}, MAX_COUNT),
        ({"seconds": MAX_COUNT + 1}, None),
        ({"seconds": 10**400}, None),
        ({"seconds": 1e308}, None),
        ({"seconds": math.inf}, None),
        ({"seconds": math.nan}, None),
        ({"seconds": -1}, None),
        ({"seconds": -0.5}, None),
        ({"seconds": True}, None),
        ({"seconds": "3"}, None),
        ({"seconds": [3]}, None),
        ({"seconds": None}, None),
        ({"audio_tokens": 0}, 1),
        ({"audio_tokens": 1}, 1),
        ({"audio_tokens": 25}, 1),
        ({"audio_tokens": 26}, 2),
        ({"audio_tokens": 7500}, 300),
        ({"audio_tokens": -25}, None),
        ({"audio_tokens": True}, None),
        ({"audio_tokens": "25"}, None),
        ({"audio_tokens": 10**12}, None),
        ({"seconds": 2, "audio_tokens": 250}, 2),
        ({"seconds": None, "audio_tokens": 250}, 10),
        ({"seconds": "x", "audio_tokens": 250}, 10),
        ({}, None),
        (None, None),
        ([], None),
        ("seconds", None),
        (3, None),
    ],
    ids=repr,
)
def test_seconds_are_counted(usage: object, seconds: int | None) -> None:
    assert read_recognition(heard({"content": []}, usage)).seconds == seconds


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"input_tokens": 5, "output_tokens": 6}, (5, 6)),
        ({"input_tokens_details": {"text_tokens": 5}, "output_tokens_details": {"text_tokens": 6}}, (5, 6)),
        ({"input_tokens": 30, "input_tokens_details": {"text_tokens": 5}, "output_tokens": 6}, (5, 6)),
        ({"input_tokens": 30, "input_tokens_details": {"text_tokens": 0}}, (0, 0)),
        ({"input_tokens": 30, "input_tokens_details": {"text_tokens": None}}, (30, 0)),
        ({"input_tokens": 30, "input_tokens_details": {}}, (30, 0)),
        ({"input_tokens": 30, "input_tokens_details": [5]}, (30, 0)),
        ({"input_tokens": "30", "output_tokens": None}, (0, 0)),
        ({"input_tokens": -1, "output_tokens": True}, (0, 0)),
        ({"input_tokens": 10**30, "output_tokens": 1.5}, (0, 2)),
        (["input_tokens"], (0, 0)),
    ],
    ids=repr,
)
def test_tokens_are_counted_nested_or_flat(usage: object, tokens: tuple[int, int]) -> None:
    recognition = read_recognition(heard({"content": []}, usage))
    assert (recognition.input_tokens, recognition.output_tokens) == tokens


@pytest.mark.parametrize("request_id", [None, "", 7, ["req"], {}])
def test_an_odd_request_id_is_none(request_id: object) -> None:
    assert read_recognition({"output": {"choices": []}, "request_id": request_id}).request_id is None


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """An object with some of these fields, each of which may be anything; or anything else."""
    return st.fixed_dictionaries({}, optional={name: field | values for name, field in fields.items()}) | values


messages = some(
    content=st.lists(some(text=st.text()), max_size=3), annotations=st.lists(some(language=values, emotion=values))
)
usages = some(
    seconds=values,
    audio_tokens=values,
    input_tokens=values,
    output_tokens=values,
    input_tokens_details=some(text_tokens=values),
    output_tokens_details=some(text_tokens=values),
)


@settings(derandomize=True, deadline=None)
@given(
    output=some(choices=st.lists(some(message=messages), max_size=2)),
    usage=usages,
    request_id=values,
)
def test_any_answer_has_only_the_types_that_it_promises(output: Any, usage: Any, request_id: Any) -> None:
    try:
        recognition = read_recognition({"output": output, "usage": usage, "request_id": request_id})
    except UpstreamError:
        return
    assert type(recognition.text) is str
    for word in (recognition.language, recognition.emotion, recognition.request_id):
        assert word is None or (type(word) is str and word)
    for tokens in (recognition.input_tokens, recognition.output_tokens):
        assert type(tokens) is int
        assert 0 <= tokens <= MAX_COUNT
    assert recognition.seconds is None or (type(recognition.seconds) is int and 0 <= recognition.seconds <= MAX_COUNT)


@settings(derandomize=True, deadline=None)
@given(values)
def test_a_count_is_a_small_whole_number_or_none(value: Any) -> None:
    counted = count(value)
    assert counted is None or (type(counted) is int and 0 <= counted - value <= 1 and counted <= MAX_COUNT)
