"""Calls over HTTP: what is sent, how answers and failures are read, and what is asked again (PROTOCOL §0.2 to §0.4)."""

import asyncio
import gzip
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import respx
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from app.dashscope import Credential, HttpClient
from app.dashscope.answers import understand
from app.dashscope.http import IDLE_SECONDS
from app.dashscope.retries import MAX_ATTEMPTS
from app.errors import (
    AppError,
    AudioTooLong,
    ConnectionLost,
    HandshakeTimeout,
    InvalidApiKey,
    InvalidAudio,
    InvalidModel,
    Throttled,
    UnclearAnswer,
    Unreachable,
    UpstreamError,
    UpstreamNotFound,
    UpstreamTimeout,
)
from tests.dashscope.http_provider import (
    API_KEY,
    PATIENCE,
    Act,
    HttpProvider,
    Line,
    answers,
    in_turn,
    refuses,
    sends,
    throttles,
    written,
)

GOOD = {"output": {"text": "你好"}, "usage": {"seconds": 1}, "request_id": "req-1"}
PROVIDER_CALL = "https://dashscope.test/api/v1/call"


@pytest.fixture
async def provider() -> AsyncIterator[HttpProvider]:
    """A provider without a plan yet."""
    async with HttpProvider.run() as running:
        yield running


@pytest.fixture
async def http(provider: HttpProvider) -> AsyncIterator[HttpClient]:
    """A client that waits long enough for a busy machine."""
    async with provider.client() as client:
        yield client


@pytest.fixture
async def impatient(provider: HttpProvider) -> AsyncIterator[HttpClient]:
    """A client that soon takes silence for an answer."""
    async with provider.client(silence_seconds=0.3) as client:
        yield client


@pytest.fixture
def faraway() -> Credential:
    """A user's key at an address that only respx knows."""
    return Credential(API_KEY, "ws://unused.test", PROVIDER_CALL.removesuffix("/call"))


async def failure_of(http: HttpClient, credential: Credential) -> AppError:
    """Post something that fails."""
    with pytest.raises(AppError) as failure:
        await http.post(credential, "/call", {"model": "m"})
    return failure.value


# ---- What is sent


async def test_a_call_carries_the_key_and_the_body(provider: HttpProvider, http: HttpClient) -> None:
    provider.expect(answers(GOOD))
    body = {"model": "m", "input": {"text": '你好 " \\ \n'}}
    assert await http.post(provider.credential, "/services/call", body) == GOOD
    (request,) = provider.requests
    assert (request.method, request.target) == ("POST", "/api/v1/services/call")
    assert request.header("Authorization") == f"Bearer {API_KEY}"
    assert request.header("Content-Type") == "application/json"
    assert request.header("Content-Length") == str(len(request.body))
    assert request.header("Transfer-Encoding") is None
    assert request.header("X-DashScope-WorkSpace") is None
    assert request.json == body


async def test_a_workspace_and_the_headers_of_a_call_are_sent(provider: HttpProvider, http: HttpClient) -> None:
    provider.expect(answers(GOOD), answers(GOOD))
    inside = replace(provider.credential, workspace="ws-1")
    special = {"X-DashScope-Async": "enable", "X-DashScope-OssResourceResolve": "enable"}
    await http.post(inside, "/call", {}, special)
    await http.get(inside, "/tasks/1")
    posted, asked = provider.requests
    assert {name: posted.header(name) for name in special} == special
    assert {name: asked.header(name) for name in special} == dict.fromkeys(special)
    for request in provider.requests:
        assert request.header("X-DashScope-WorkSpace") == "ws-1"
        assert request.header("Authorization") == f"Bearer {API_KEY}"


async def test_a_question_carries_its_query_and_no_body(provider: HttpProvider, http: HttpClient) -> None:
    provider.expect(answers(GOOD), answers(GOOD))
    await http.get(provider.credential, "/uploads", {"action": "getPolicy", "model": "a b&c=你"})
    await http.get(provider.credential, "/uploads")
    asked, plain = provider.requests
    assert asked.target == "/api/v1/uploads?action=getPolicy&model=a+b%26c%3D%E4%BD%A0"
    assert plain.target == "/api/v1/uploads"
    assert (asked.method, asked.body) == ("GET", b"")


async def test_bodies_are_asked_for_as_they_are(provider: HttpProvider, http: HttpClient) -> None:
    provider.expect(answers(GOOD), answers(GOOD))
    await http.post(provider.credential, "/call", {})
    await http.get(provider.credential, "/call")
    assert [request.header("Accept-Encoding") for request in provider.requests] == ["identity", "identity"]


async def test_what_comes_packed_all_the_same_is_not_unpacked(provider: HttpProvider, http: HttpClient) -> None:
    provider.expect(answers(gzip.compress(json.dumps(GOOD).encode()), content_encoding="gzip"))
    assert type(await failure_of(http, provider.credential)) is UnclearAnswer


async def test_the_environment_sets_no_proxy(provider: HttpProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    provider.expect(answers(GOOD))
    async with provider.client() as http:
        assert await http.post(provider.credential, "/call", {}) == GOOD


# ---- How answers are read


def sse(*lines: str, end: str = "\n") -> bytes:
    return end.join([*lines, "", ""]).encode()


SUCCESSES: dict[str, tuple[int, bytes, dict[str, Any]]] = {
    "native": (200, json.dumps(GOOD).encode(), GOOD),
    "created": (201, json.dumps(GOOD).encode(), GOOD),
    "an empty code": (
        200,
        b'{"code":"","message":"","output":{"a":1}}',
        {"code": "", "message": "", "output": {"a": 1}},
    ),
    "no code": (200, b'{"code":null,"output":{"a":1}}', {"code": None, "output": {"a": 1}}),
    "a policy": (200, b'{"data":{"policy":"x"},"request_id":"r"}', {"data": {"policy": "x"}, "request_id": "r"}),
    "a failed task": (
        200,
        b'{"output":{"task_status":"FAILED","code":"FILE_403_FORBIDDEN","message":"FILE_403_FORBIDDEN"}}',
        {"output": {"task_status": "FAILED", "code": "FILE_403_FORBIDDEN", "message": "FILE_403_FORBIDDEN"}},
    ),
    "a failed task that says so twice": (
        200,
        b'{"code":"DECODE_ERROR","message":"m","output":{"task_status":"FAILED"}}',
        {"code": "DECODE_ERROR", "message": "m", "output": {"task_status": "FAILED"}},
    ),
    "an event": (200, sse("id:1", "event:result", ":HTTP_STATUS/200", "data:" + json.dumps(GOOD)), GOOD),
    "an event with spaces": (200, sse("id: 1", "event: result", "data: " + json.dumps(GOOD), end="\r\n"), GOOD),
    "an event in several lines": (
        200,
        sse("event:result", 'data:{"output":', 'data:{"a":1}', "data:}"),
        {"output": {"a": 1}},
    ),
}


@pytest.mark.parametrize(("status", "content", "answer"), SUCCESSES.values(), ids=SUCCESSES.keys())
def test_a_success_is_given_whole(status: int, content: bytes, answer: dict[str, Any]) -> None:
    assert understand(status, content) == answer


KEY_REFUSED = '{"code":"InvalidApiKey","message":"Invalid API-key provided.","request_id":"r"}'
COMPATIBLE = '{{"error":{{"message":"{}","type":"invalid_request_error","param":null,"code":"{}"}}}}'

REFUSALS: dict[str, tuple[type[AppError], int, bytes]] = {
    "native": (InvalidApiKey, 401, KEY_REFUSED.encode()),
    "native with 200": (InvalidApiKey, 200, KEY_REFUSED.encode()),
    "native with an empty output": (InvalidApiKey, 200, b'{"code":"InvalidApiKey","message":"","output":{}}'),
    "native with no output": (InvalidApiKey, 200, b'{"code":"InvalidApiKey","message":"","output":null}'),
    "native with an output and 401": (InvalidApiKey, 401, b'{"code":"InvalidApiKey","output":{"a":1}}'),
    "compatible": (InvalidApiKey, 401, COMPATIBLE.format("Incorrect API key provided. ", "invalid_api_key").encode()),
    "compatible model": (InvalidModel, 404, COMPATIBLE.format("x", "model_not_found").encode()),
    "compatible throttling": (Throttled, 429, COMPATIBLE.format("x", "limit_requests").encode()),
    "compatible with 200": (InvalidApiKey, 200, COMPATIBLE.format("x", "invalid_api_key").encode()),
    "msg": (InvalidModel, 400, b'{"code":"InvalidParameter","msg":"Model not exist."}'),
    "message before msg": (InvalidModel, 400, b'{"code":"InvalidParameter","message":"Model not exist.","msg":"x"}'),
    "an event with 200": (InvalidApiKey, 200, sse("id:1", "event:error", ":HTTP_STATUS/400", "data:" + KEY_REFUSED)),
    "an event with 400": (InvalidApiKey, 400, sse("event:error", ":HTTP_STATUS/400", "data:" + KEY_REFUSED)),
    "an event with returns": (InvalidApiKey, 200, sse("event:error", "data:" + KEY_REFUSED, end="\r\n")),
    "an event in several lines": (
        InvalidApiKey,
        200,
        sse("event:error", "data:{", 'data:"code":"InvalidApiKey",', 'data:"message":"x"', "data:}"),
    ),
    "an event in several lines with 400": (
        Throttled,
        400,
        sse("event: error", 'data: {"code":', 'data: "Throttling.RateQuota"}'),
    ),
    "an event without an end": (InvalidApiKey, 200, b"event:error\ndata:" + KEY_REFUSED.encode()),
    "a model that may not be used": (InvalidModel, 403, b'{"code":"Model.AccessDenied","message":"x"}'),
    "no right": (UpstreamError, 403, b'{"code":"AccessDenied","message":"does not support synchronous calls."}'),
    "no workspace right": (UpstreamError, 401, b'{"code":"NOT AUTHORIZED","message":"x"}'),
    "nothing there": (UpstreamNotFound, 404, b'{"code":"NotFound","message":"x"}'),
    "no such model": (InvalidModel, 404, b'{"code":"ModelNotFound","message":"Model can not be found."}'),
    "too long": (AudioTooLong, 400, b'{"code":"InvalidFile.AudioLengthError","message":"x"}'),
    "bad audio": (InvalidAudio, 430, b'{"code":"Audio.DecoderError","message":"x"}'),
    "throttling": (Throttled, 429, b'{"code":"Throttling","message":"Too many requests in route."}'),
    "throttling with 400": (Throttled, 400, b'{"code":"Throttling.RateQuota","message":"x"}'),
    "throttling without a code": (Throttled, 429, b'{"message":"slow down"}'),
    "no free quota": (
        UpstreamError,
        429,
        b'{"code":"Throttling.AllocationQuota","message":"Free allocated quota exceeded."}',
    ),
    "no free quota without a code": (UpstreamError, 429, b'{"message":"Free allocated quota exceeded."}'),
    "a bill": (UpstreamError, 429, b'{"code":"PostpaidBillOverdue","message":""}'),
    "inside": (UpstreamError, 500, b'{"code":"InternalError","message":"An internal error has occured"}'),
    "inside with an output": (UnclearAnswer, 500, b'{"output":{"a":1},"request_id":"r"}'),
    "busy": (UpstreamError, 503, b'{"code":"ModelServingError","message":"x"}'),
    "odd types": (UpstreamError, 400, b'{"code":7,"message":["x"]}'),
    "odder types": (UpstreamError, 400, b'{"code":{"a":1},"message":{"b":2}}'),
    "nulls": (UnclearAnswer, 400, b'{"code":null,"message":null,"error":null}'),
}


@pytest.mark.parametrize(("meaning", "status", "content"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refusal_has_one_meaning(meaning: type[AppError], status: int, content: bytes) -> None:
    with pytest.raises(AppError) as refused:
        understand(status, content)
    assert type(refused.value) is meaning
    assert bool(refused.value.retry_after_seconds) is (meaning is Throttled)


@pytest.mark.parametrize("status", [400, 404])
@pytest.mark.parametrize(
    "content",
    [
        b'{"code":"Odd","message":"the moon is full"}',
        b'{"code":"Odd","msg":"the moon is full"}',
        b'{"error":{"code":"Odd","message":"the moon is full"}}',
        sse("event:error", 'data:{"code":"Odd",', 'data:"message":"the moon is full"}'),
    ],
)
def test_the_words_of_the_provider_come_through(status: int, content: bytes) -> None:
    with pytest.raises(UpstreamError, match=r"the moon is full（Odd）"):
        understand(status, content)


NO_JSON = {
    "nothing": b"",
    "blanks": b" \r\n ",
    "a page": b"<html><body>502 Bad Gateway</body></html>",
    "half": b'{"output":{"text":',
    "an event without data": b"event:error\n\n",
    "an event with half": b'event:error\ndata:{"code":\n\n',
    "an end of events": b"data: [DONE]\n\n",
    "a list": b'[{"code":"InvalidApiKey"}]',
    "a text": b'"InvalidApiKey"',
    "a number": b"200",
    "null": b"null",
    "an empty object": b"{}",
    "bad letters": b'{"code":"\xff\xfe"}',
    "zeros": b"\x00" * 64,
    "deep": b"[" * 100_000,
    "deeper": b'{"output":' * 100_000,
}


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON.keys())
def test_what_is_no_answer_is_told_by_its_status(content: bytes) -> None:
    meanings: dict[int, type[AppError]] = {401: InvalidApiKey, 429: Throttled}
    for status in (200, 201, 204, 301, 302, 400, 401, 403, 404, 408, 413, 429, 430, 500, 502, 503, 504, 599):
        with pytest.raises(AppError) as refused:
            understand(status, content)
        assert type(refused.value) is meanings.get(status, UnclearAnswer)
        if type(refused.value) is UnclearAnswer:
            assert f"HTTP {status}" in refused.value.message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
envelopes = st.fixed_dictionaries(
    {},
    optional={
        name: json_values | st.sampled_from(["Throttling", "InvalidApiKey"])
        for name in ("code", "message", "msg", "output", "request_id")
    }
    | {"error": st.fixed_dictionaries({}, optional={"code": json_values, "message": json_values}) | json_values},
)


@settings(derandomize=True, deadline=None)
@given(
    status=st.sampled_from([200, 204, 302, 400, 401, 403, 404, 429, 500]),
    content=st.binary()
    | (envelopes | json_values).map(lambda value: json.dumps(value).encode())
    | envelopes.map(lambda value: b"event:error\ndata:" + json.dumps(value).encode() + b"\n\n"),
)
def test_any_answer_is_a_success_or_an_error_of_ours(status: int, content: bytes) -> None:
    with suppress(AppError):
        assert understand(status, content)


# ---- How answers arrive


@pytest.mark.parametrize("chunked", [False, True], ids=["of known length", "chunked"])
async def test_an_answer_may_come_byte_by_byte(provider: HttpProvider, http: HttpClient, chunked: bool) -> None:
    content = json.dumps(GOOD).encode()
    answer = written(content)
    if chunked:
        pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in content) + b"0\r\n\r\n"
        answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + pieces

    async def drip(line: Line) -> None:
        for byte in answer:
            await line.send(bytes([byte]))
            await asyncio.sleep(0)

    provider.expect(drip)
    assert await http.post(provider.credential, "/call", {}) == GOOD


async def test_an_answer_may_end_with_its_connection(provider: HttpProvider, http: HttpClient) -> None:
    answer = b"HTTP/1.1 200 OK\r\n\r\n" + json.dumps(GOOD).encode()
    provider.expect(in_turn(sends(answer), Line.hang_up))
    assert await http.post(provider.credential, "/call", {}) == GOOD


def of_size(size: int) -> bytes:
    """A good answer of so many bytes."""
    frame = b'{"output":{"text":"%s"}}'
    return frame % (b"a" * (size - len(frame) + 2))


async def test_an_answer_as_large_as_the_limit_is_read(
    provider: HttpProvider, http: HttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.dashscope.http.MAX_ANSWER_BYTES", 1000)
    provider.expect(answers(of_size(1000)))
    assert len((await http.post(provider.credential, "/call", {}))["output"]["text"]) > 900


@pytest.mark.parametrize("status", [200, 400, 500])
async def test_an_answer_beyond_the_limit_is_not_read(
    provider: HttpProvider, http: HttpClient, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr("app.dashscope.http.MAX_ANSWER_BYTES", 1000)
    provider.expect(answers(of_size(1001), status))
    assert type(await failure_of(http, provider.credential)) is UnclearAnswer
    assert len(provider.requests) == 1


async def test_an_answer_without_an_end_is_cut_and_its_connection_closed(
    provider: HttpProvider, http: HttpClient
) -> None:
    async def flood(line: Line) -> None:
        await line.send(b"HTTP/1.1 200 OK\r\n\r\n")
        while not line.writer.is_closing():
            await line.send(b"a" * 65536)

    provider.expect(flood)
    assert type(await failure_of(http, provider.credential)) is UnclearAnswer
    await provider.all_closed()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_a_redirect_is_not_followed_so_the_key_does_not_travel(
    provider: HttpProvider, http: HttpClient, status: int, method: str
) -> None:
    async with HttpProvider.run() as elsewhere:
        provider.expect(answers(b"", status, location=f"{elsewhere.url}/api/v1/call"))
        with pytest.raises(UpstreamError):
            await (
                http.post(provider.credential, "/call", {}) if method == "POST" else http.get(provider.credential, "")
            )
        assert elsewhere.connections == 0
    assert len(provider.requests) == 1


# ---- Silence and broken lines

SILENT = {
    "at once": Line.keep_silent,
    "in the headers": in_turn(sends(b"HTTP/1.1 200 OK\r\nContent-"), Line.keep_silent),
    "in the body": in_turn(sends(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"), Line.keep_silent),
}


@pytest.mark.parametrize("silent", SILENT.values(), ids=SILENT.keys())
async def test_silence_times_out_and_nothing_is_asked_again(
    provider: HttpProvider, impatient: HttpClient, silent: Act
) -> None:
    provider.expect(silent)
    assert type(await failure_of(impatient, provider.credential)) is UpstreamTimeout
    await provider.all_closed()
    assert len(provider.requests) == 1


async def test_silence_after_a_question_is_borne_once_too(provider: HttpProvider, impatient: HttpClient) -> None:
    provider.expect(Line.keep_silent)
    with pytest.raises(UpstreamTimeout):
        await impatient.get(provider.credential, "/call")
    assert len(provider.requests) == 1


async def test_steady_slow_progress_does_not_time_out(provider: HttpProvider) -> None:
    content = written(GOOD)

    async def slowly(line: Line) -> None:
        for start in range(0, len(content), len(content) // 5):
            await asyncio.sleep(0.15)
            await line.send(content[start : start + len(content) // 5])

    provider.expect(slowly)
    async with provider.client(silence_seconds=0.6) as http:
        assert await http.post(provider.credential, "/call", {}) == GOOD


LOST = {
    "closed": Line.hang_up,
    "cut": Line.reset,
    "closed in the headers": in_turn(sends(b"HTTP/1.1 200 OK\r\nContent-"), Line.hang_up),
    "closed in the body": in_turn(sends(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"), Line.hang_up),
    "closed in a chunk": in_turn(sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{"), Line.hang_up),
    "another protocol": in_turn(sends(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), Line.hang_up),
    "a bad chunk": in_turn(sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"), Line.hang_up),
    "two lengths": in_turn(sends(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}"), Line.hang_up),
}


@pytest.mark.parametrize("lost", LOST.values(), ids=LOST.keys())
async def test_what_may_have_been_taken_on_is_not_asked_again(
    provider: HttpProvider, http: HttpClient, lost: Act
) -> None:
    provider.expect(lost)
    assert type(await failure_of(http, provider.credential)) is ConnectionLost
    await provider.all_closed()
    assert len(provider.requests) == 1


async def test_nothing_is_asked_again_on_a_reused_line_either(provider: HttpProvider, http: HttpClient) -> None:
    provider.expect(answers(GOOD), Line.hang_up)
    await http.post(provider.credential, "/call", {})
    assert type(await failure_of(http, provider.credential)) is ConnectionLost
    await provider.all_closed()
    assert [request.connection for request in provider.requests] == [1, 1]


@pytest.fixture
def nobody_listens() -> Iterator[str]:
    """The address of a port that is taken, but where nobody answers."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/api/v1"


def retries(logs: Any) -> list[str]:
    """What each retry was for."""
    return [line["error"] for line in logs if line["event"] == "provider_retry"]


async def test_a_refused_connection_is_tried_again_and_then_unreachable(
    provider: HttpProvider, http: HttpClient, nobody_listens: str
) -> None:
    with capture_logs() as logs:
        failure = await failure_of(http, replace(provider.credential, http_url=nobody_listens))
    assert type(failure) is Unreachable
    assert retries(logs) == ["Unreachable"] * (MAX_ATTEMPTS - 1)


@pytest.fixture
def mute() -> Iterator[int]:
    """The port of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


async def test_a_tls_handshake_without_an_answer_times_out(provider: HttpProvider, mute: int) -> None:
    http = HttpClient(handshake_seconds=0.05, silence_seconds=PATIENCE)
    with capture_logs() as logs:
        failure = await failure_of(http, replace(provider.credential, http_url=f"https://127.0.0.1:{mute}/api/v1"))
    await http.close()
    assert type(failure) is HandshakeTimeout
    assert retries(logs) == ["HandshakeTimeout"] * (MAX_ATTEMPTS - 1)


@pytest.mark.parametrize(
    ("cause", "error", "calls"),
    [
        (httpx.ConnectError("refused"), Unreachable, MAX_ATTEMPTS),
        (httpx.ConnectTimeout("slow"), HandshakeTimeout, MAX_ATTEMPTS),
        (httpx.ReadTimeout("silent"), UpstreamTimeout, 1),
        (httpx.WriteTimeout("stuck"), UpstreamTimeout, 1),
        (httpx.PoolTimeout("full"), UpstreamTimeout, 1),
        (httpx.ReadError("cut"), ConnectionLost, 1),
        (httpx.WriteError("cut"), ConnectionLost, 1),
        (httpx.CloseError("cut"), ConnectionLost, 1),
        (httpx.RemoteProtocolError("odd"), ConnectionLost, 1),
        (httpx.LocalProtocolError("odd"), ConnectionLost, 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
@pytest.mark.usefixtures("provider")
async def test_each_way_to_break_has_one_meaning(
    http: HttpClient, faraway: Credential, cause: Exception, error: type[AppError], calls: int
) -> None:
    async with respx.mock() as router:
        route = router.post(PROVIDER_CALL).mock(side_effect=cause)
        failure = await failure_of(http, faraway)
    assert type(failure) is error
    assert route.call_count == calls


async def test_a_connection_that_comes_up_at_last_is_not_noticed(http: HttpClient, faraway: Credential) -> None:
    causes: list[Exception | httpx.Response] = [
        httpx.ConnectError("refused"),
        httpx.ConnectTimeout("slow"),
        httpx.Response(200, json=GOOD),
    ]
    async with respx.mock() as router:
        route = router.post(PROVIDER_CALL).mock(side_effect=causes)
        assert await http.post(faraway, "/call", {"text": "你好"}) == GOOD
    assert [json.loads(call.request.content) for call in route.calls] == [{"text": "你好"}] * 3


# ---- What is asked again


@pytest.mark.parametrize(
    "throttled", [throttles, answers(b"", 429), answers({"code": "limit_requests"}, 400)], ids=["named", "bare", "400"]
)
async def test_what_was_throttled_is_asked_again(provider: HttpProvider, http: HttpClient, throttled: Act) -> None:
    provider.expect(throttled, throttled, answers(GOOD))
    assert await http.post(provider.credential, "/call", {"text": "你好"}, {"X-DashScope-Async": "enable"}) == GOOD
    assert [request.json for request in provider.requests] == [{"text": "你好"}] * 3
    for request in provider.requests:
        assert request.header("Authorization") == f"Bearer {API_KEY}"
        assert request.header("X-DashScope-Async") == "enable"


async def test_throttling_for_ever_ends_with_the_time_to_come_back(provider: HttpProvider, http: HttpClient) -> None:
    provider.expect(*[throttles] * 4)
    failure = await failure_of(http, provider.credential)
    assert type(failure) is Throttled
    assert failure.retry_after_seconds
    assert len(provider.requests) == 4


async def test_a_question_may_be_asked_just_once(provider: HttpProvider, http: HttpClient) -> None:
    provider.expect(throttles)
    with pytest.raises(Throttled):
        await http.get(provider.credential, "/tasks/1", attempts=1)
    assert len(provider.requests) == 1


async def test_a_question_is_asked_again_too(provider: HttpProvider, http: HttpClient) -> None:
    provider.expect(throttles, answers(GOOD))
    assert await http.get(provider.credential, "/uploads", {"action": "getPolicy"}) == GOOD
    assert [request.target for request in provider.requests] == ["/api/v1/uploads?action=getPolicy"] * 2


FINAL = {
    "500": answers(b"", 500),
    "500 named": refuses("InternalError", "An internal error has occured, please try again later", 500),
    "502": answers(b"<html>", 502),
    "503": refuses("ModelServingError", "", 503),
    "504": answers(b"", 504),
    "500 that talks of rates": refuses("InternalError", "Requests rate limit exceeded", 500),
    "502 that talks of rates": refuses("Odd", "You have exceeded your request limit.", 502),
    "429 with work": answers({"code": "Throttling.RateQuota", "output": {"text": "你"}}, 429),
    "429 with a bill": answers({"code": "Throttling.RateQuota", "usage": {"seconds": 3}}, 429),
    "429 with a bill and no code": answers({"usage": {"seconds": 3}}, 429),
    "no free quota": refuses("Throttling.AllocationQuota", "Free allocated quota exceeded.", 429),
    "a bill": refuses("PrepaidBillOverdue", "", 429),
    "too many voices": refuses("Throttling.AllocationQuota", "Maximum voice storage limit exceeded", 400),
    "a key": refuses("InvalidApiKey", "Invalid API-key provided.", 401),
    "400": refuses("InvalidParameter", "url error, please check url！"),
    "403": answers(b"", 403),
    "404": answers(b"", 404),
    "a success that is none": answers(b"", 200),
}


@pytest.mark.parametrize("final", FINAL.values(), ids=FINAL.keys())
async def test_a_final_refusal_is_told_at_once(provider: HttpProvider, http: HttpClient, final: Act) -> None:
    provider.expect(final)
    failure = await failure_of(http, provider.credential)
    assert not isinstance(failure, Throttled | ConnectionLost)
    assert len(provider.requests) == 1


async def test_attempts_come_ever_later(
    provider: HttpProvider, http: HttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    async def note(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr("app.dashscope.failures.RETRY_BASE_SECONDS", 0.5)
    monkeypatch.setattr("app.dashscope.http.asyncio", SimpleNamespace(sleep=note))
    provider.expect(*[throttles] * MAX_ATTEMPTS)
    await failure_of(http, provider.credential)
    first, second, third = waited
    assert 0.25 <= first <= 0.75
    assert 0.5 <= second <= 1.5
    assert 1 <= third <= 3


async def test_a_caller_who_leaves_between_attempts_ends_them(
    provider: HttpProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.dashscope.failures.RETRY_BASE_SECONDS", 60)
    throttled = asyncio.Event()

    async def throttle(line: Line) -> None:
        await throttles(line)
        throttled.set()

    provider.expect(throttle)
    async with provider.client(silence_seconds=600) as http, asyncio.timeout(PATIENCE):
        calling = asyncio.create_task(http.post(provider.credential, "/call", {}))
        await throttled.wait()
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
    assert len(provider.requests) == 1


async def test_a_caller_who_leaves_while_waiting_closes_the_line(provider: HttpProvider, http: HttpClient) -> None:
    heard = asyncio.Event()

    async def listen(line: Line) -> None:
        heard.set()
        await line.keep_silent()

    provider.expect(listen, answers(GOOD))
    calling = asyncio.create_task(http.post(provider.credential, "/call", {}))
    async with asyncio.timeout(PATIENCE):
        await heard.wait()
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
    await provider.all_closed()
    assert await http.post(provider.credential, "/call", {}) == GOOD


# ---- What is written down


@pytest.mark.parametrize(
    "answer",
    [
        {"code": "InvalidParameter", "message": f"key {API_KEY} is odd", "request_id": "req-7"},
        {"code": "InvalidParameter", "message": f"Authorization: Bearer {API_KEY}", "request_id": "req-7"},
        {"code": f"Bearer {API_KEY}", "message": "x", "request_id": "req-7"},
        {"error": {"code": "invalid_request", "message": API_KEY}, "request_id": "req-7"},
    ],
    ids=["in the message", "in a header", "in the code", "in the other envelope"],
)
async def test_a_refusal_is_logged_with_its_request_id_and_never_with_the_key(
    provider: HttpProvider, http: HttpClient, answer: dict[str, Any]
) -> None:
    provider.expect(answers(answer, 400))
    with capture_logs() as logs:
        failure = await failure_of(http, provider.credential)
    (line,) = [line for line in logs if line["event"] == "provider_refused"]
    assert line["provider_request_id"] == "req-7"
    assert line["status"] == 400
    assert API_KEY not in failure.message
    assert API_KEY not in str(logs)


async def test_retries_and_broken_lines_are_logged_without_the_key(provider: HttpProvider, http: HttpClient) -> None:
    provider.expect(throttles, Line.hang_up)
    with capture_logs() as logs:
        await failure_of(http, provider.credential)
    assert retries(logs) == ["Throttled"]
    assert API_KEY not in str(logs)


def test_a_key_stays_out_of_what_is_printed(faraway: Credential) -> None:
    assert API_KEY not in repr(faraway)
    assert API_KEY not in faraway.fingerprint


# ---- Connections


async def test_calls_share_a_connection(provider: HttpProvider, http: HttpClient) -> None:
    provider.expect(answers(GOOD), throttles, answers(GOOD), refuses("Odd"), answers(GOOD))
    await http.post(provider.credential, "/call", {})
    await http.get(provider.credential, "/call")
    await failure_of(http, provider.credential)
    await http.post(replace(provider.credential, api_key="sk-test-2"), "/call", {})
    assert provider.connections == 1
    assert [request.header("Authorization") for request in provider.requests][-2:] == [
        f"Bearer {API_KEY}",
        "Bearer sk-test-2",
    ]


async def test_calls_at_the_same_time_do_not_wait_for_each_other(provider: HttpProvider, http: HttpClient) -> None:
    together = asyncio.Barrier(20)

    async def act(line: Line) -> None:
        await together.wait()
        await line.send(written(GOOD))

    provider.expect(*[act] * 20)
    async with asyncio.timeout(PATIENCE):
        said = await asyncio.gather(*[http.post(provider.credential, "/call", {}) for _ in range(20)])
    assert said == [GOOD] * 20


async def test_a_connection_that_was_idle_for_too_long_is_not_used(
    provider: HttpProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.dashscope.http.IDLE_SECONDS", 0.05)
    provider.expect(answers(GOOD), answers(GOOD))
    async with provider.client() as http:
        await http.post(provider.credential, "/call", {})
        await asyncio.sleep(0.1)
        await http.post(provider.credential, "/call", {})
    assert [request.connection for request in provider.requests] == [1, 2]


def test_connections_are_given_up_before_gateways_drop_them() -> None:
    assert 0 < IDLE_SECONDS < 60


async def test_a_connection_that_the_provider_closed_is_not_used(provider: HttpProvider, http: HttpClient) -> None:
    provider.expect(in_turn(answers(GOOD), Line.hang_up), answers(GOOD))
    await http.post(provider.credential, "/call", {})
    await provider.all_closed()
    await asyncio.sleep(0.05)  # until the end of the line has been heard on this side
    assert await http.post(provider.credential, "/call", {}) == GOOD
    assert provider.connections == 2


async def test_what_one_user_was_given_does_not_travel_with_another(provider: HttpProvider, http: HttpClient) -> None:
    provider.expect(answers(GOOD, set_cookie="session=of-the-first-user; Path=/"), answers(GOOD))
    await http.post(provider.credential, "/call", {})
    await http.post(replace(provider.credential, api_key="sk-test-2"), "/call", {})
    assert provider.requests[1].header("Cookie") is None


async def test_closing_ends_every_connection(provider: HttpProvider) -> None:
    provider.expect(answers(GOOD))
    async with provider.client() as http:
        await http.post(provider.credential, "/call", {})
    await provider.all_closed()
