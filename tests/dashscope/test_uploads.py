"""The provider's temporary storage: the permit, the form and the answer of the store (PROTOCOL §6)."""

import asyncio
import io
import random
import re
import tempfile
import threading
import tracemalloc
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from app.dashscope import Credential, HttpClient, UploadClient
from app.dashscope.uploads import MEGABYTE
from app.errors import (
    AppError,
    AudioTooLarge,
    ConnectionLost,
    InvalidApiKey,
    Throttled,
    UnclearAnswer,
    UpstreamError,
    UpstreamTimeout,
)
from tests.dashscope.http_provider import (
    API_KEY,
    PATIENCE,
    Act,
    HttpProvider,
    HttpRequest,
    Line,
    answers,
    refuses,
    throttles,
)

MODEL = "qwen3-asr-flash"
FOLDER = "dashscope-instant/xxx/2024-07-18/xxx"
EXPIRED = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error>\n  <Code>AccessDenied</Code>\n'
    b"  <Message>Invalid according to Policy: Policy expired.</Message>\n"
    b"  <RequestId>668</RequestId>\n  <HostId>b.oss-cn-beijing.aliyuncs.com</HostId>\n</Error>"
)


@pytest.fixture
async def provider() -> AsyncIterator[HttpProvider]:
    """A provider without a plan yet."""
    async with HttpProvider.run() as running:
        yield running


@pytest.fixture
async def uploads(provider: HttpProvider) -> AsyncIterator[UploadClient]:
    """The client under test."""
    async with provider.client() as http:
        yield UploadClient(http)


def policy(host: str, **changes: Any) -> dict[str, Any]:
    """The documented permit for a store."""
    return {
        "policy": "eyJleHBpcmF0aW9uIjoiMjAyNC0wNy0xOCJ9",
        "signature": "g5K+dfs/asd=",
        "upload_dir": FOLDER,
        "upload_host": host,
        "expire_in_seconds": 300,
        "max_file_size_mb": 100,
        "capacity_limit_mb": 999999999,
        "oss_access_key_id": "LTAI-1",
        "x_oss_object_acl": "private",
        "x_oss_forbid_overwrite": "true",
        **changes,
    }


def permits(provider: HttpProvider, **changes: Any) -> Act:
    """A permit to upload to this provider itself."""
    return answers({"request_id": "req-1", "data": policy(provider.url, **changes)})


async def upload(uploads: UploadClient, credential: Credential, content: bytes, name: str = "a.mp3") -> str:
    return await uploads.upload(credential, MODEL, io.BytesIO(content), len(content), name, "audio/mpeg")


def noise(size: int) -> bytes:
    """Bytes that are always the same."""
    return random.Random(size).randbytes(size)


def fields_of(request: HttpRequest) -> list[tuple[str, str, bytes]]:
    """Name, headers and content of each field of a form, in order."""
    kind = re.fullmatch(r"multipart/form-data; boundary=(\S+)", request.header("Content-Type") or "")
    assert kind
    boundary = b"--" + kind[1].encode()
    start, *parts, end = (b"\r\n" + request.body).split(b"\r\n" + boundary)
    assert (start, end) == (b"", b"--\r\n")
    fields = []
    for part in parts:
        head, _, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        named = re.search(r'; name="([^"]+)"', head.decode())
        assert named
        fields.append((named[1], head.decode(), content))
    return fields


# ---- What is sent


async def test_a_permit_is_asked_for_with_the_key_and_used_without(
    provider: HttpProvider, uploads: UploadClient
) -> None:
    provider.expect(permits(provider), answers(b""))
    inside = replace(provider.credential, workspace="ws-1")
    assert await upload(uploads, inside, b"ID3") == f"oss://{FOLDER}/a.mp3"
    asked, sent = provider.requests
    assert (asked.method, asked.target) == ("GET", f"/api/v1/uploads?action=getPolicy&model={MODEL}")
    assert asked.header("Authorization") == f"Bearer {API_KEY}"
    assert (sent.method, sent.target) == ("POST", "/")
    assert sent.header("Authorization") is None
    assert sent.header("X-DashScope-WorkSpace") is None
    assert API_KEY not in str(sent)


async def test_the_form_has_its_fields_and_the_file_last(provider: HttpProvider, uploads: UploadClient) -> None:
    provider.expect(permits(provider), answers(b""))
    await upload(uploads, provider.credential, b"ID3")
    fields = fields_of(provider.requests[1])
    assert {name: content.decode() for name, _, content in fields} == {
        "OSSAccessKeyId": "LTAI-1",
        "Signature": "g5K+dfs/asd=",
        "policy": "eyJleHBpcmF0aW9uIjoiMjAyNC0wNy0xOCJ9",
        "key": f"{FOLDER}/a.mp3",
        "x-oss-object-acl": "private",
        "x-oss-forbid-overwrite": "true",
        "success_action_status": "200",
        "x-oss-content-type": "audio/mpeg",
        "file": "ID3",
    }
    assert len(fields) == 9
    name, head, _ = fields[-1]
    assert name == "file"
    assert 'filename="a.mp3"' in head
    assert "Content-Type: audio/mpeg" in head


async def test_a_permit_may_come_as_output(provider: HttpProvider, uploads: UploadClient) -> None:
    provider.expect(answers({"output": policy(provider.url)}), answers(b"", 204))
    assert await upload(uploads, provider.credential, b"ID3") == f"oss://{FOLDER}/a.mp3"


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 100_000, 1_000_003, 20 * MEGABYTE])
async def test_a_file_of_any_size_arrives_whole(provider: HttpProvider, uploads: UploadClient, size: int) -> None:
    provider.expect(permits(provider), answers(b""))
    await upload(uploads, provider.credential, noise(size))
    sent = provider.requests[1]
    assert sent.header("Content-Length") == str(len(sent.body))
    assert sent.header("Transfer-Encoding") is None
    assert fields_of(sent)[-1][2] == noise(size)


async def test_bytes_that_look_like_the_form_arrive_too(provider: HttpProvider, uploads: UploadClient) -> None:
    content = b'\r\n--boundary--\r\nContent-Disposition: form-data; name="key"\r\n\r\nother\r\n'
    provider.expect(permits(provider), answers(b""))
    await upload(uploads, provider.credential, content)
    assert [name for name, _, _ in fields_of(provider.requests[1])].count("key") == 1
    assert fields_of(provider.requests[1])[-1][2] == content


async def test_a_name_of_odd_signs_stays_inside_its_field(provider: HttpProvider, uploads: UploadClient) -> None:
    name = 'a"\r\nX: y/你好.mp3'
    provider.expect(permits(provider), answers(b""))
    assert await upload(uploads, provider.credential, b"ID3", name) == f"oss://{FOLDER}/{name}"
    fields = fields_of(provider.requests[1])
    assert {each: content for each, _, content in fields}["key"].decode() == f"{FOLDER}/{name}"
    assert "\nX:" not in fields[-1][1]
    assert len(fields) == 9


@pytest.mark.parametrize("kind", ["named", "spooled", "rolled"])
async def test_a_file_is_read_from_its_start_wherever_it_was_left(
    provider: HttpProvider, uploads: UploadClient, kind: str
) -> None:
    content = noise(200_000)
    limit = {"named": 0, "spooled": MEGABYTE, "rolled": 1000}[kind]
    with tempfile.TemporaryFile() if kind == "named" else tempfile.SpooledTemporaryFile(limit) as source:
        source.write(content)
        provider.expect(permits(provider), answers(b""))
        await uploads.upload(provider.credential, MODEL, source, len(content), "a.mp3", "audio/mpeg")  # type: ignore[arg-type]
    assert fields_of(provider.requests[1])[-1][2] == content


async def test_the_file_is_read_beside_the_event_loop(provider: HttpProvider, uploads: UploadClient) -> None:
    readers: set[int] = set()

    class Watched(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            readers.add(threading.get_ident())
            return super().read(size)

    provider.expect(permits(provider), answers(b""))
    await uploads.upload(provider.credential, MODEL, Watched(b"abc"), 3, "a.mp3", "audio/mpeg")
    assert readers
    assert threading.get_ident() not in readers


async def test_a_large_file_is_never_held_whole(provider: HttpProvider, uploads: UploadClient, tmp_path: Path) -> None:
    size = 20 * MEGABYTE
    file = tmp_path / "audio"
    file.write_bytes(b"\x00" * size)
    provider.keeps_bodies = False
    provider.expect(permits(provider), answers(b""), permits(provider), answers(b""))
    await upload(uploads, provider.credential, b"warm")
    with file.open("rb") as source:
        tracemalloc.start()
        await uploads.upload(provider.credential, MODEL, source, size, "a.wav", "audio/wav")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert int(provider.requests[-1].header("Content-Length") or 0) > size
    assert peak < size / 8


async def test_a_local_store_may_have_a_port_of_its_own(provider: HttpProvider, uploads: UploadClient) -> None:
    async with HttpProvider.run() as store:
        provider.expect(permits(store))
        store.expect(answers(b""))
        assert await upload(uploads, provider.credential, b"ID3") == f"oss://{FOLDER}/a.mp3"
        (sent,) = store.requests
    assert sent.header("Authorization") is None
    assert sent.header("Host") == store.url.removeprefix("http://")


@pytest.mark.parametrize("scheme", ["https", "http"])
async def test_a_bucket_is_always_called_over_tls(provider: HttpProvider, uploads: UploadClient, scheme: str) -> None:
    host = "dashscope-file-xxx.oss-cn-beijing.aliyuncs.com"
    faraway = Credential(API_KEY, "ws://unused.test", "https://dashscope.test/api/v1")
    async with respx.mock() as router:
        router.get("https://dashscope.test/api/v1/uploads").respond(json={"data": policy(f"{scheme}://{host}")})
        route = router.post(f"https://{host}/").mock(return_value=httpx.Response(200))
        assert await upload(uploads, faraway, b"ID3") == f"oss://{FOLDER}/a.mp3"
    request = route.calls.last.request
    assert request.headers["Host"] == host
    assert "Authorization" not in request.headers


# ---- Limits


@pytest.mark.parametrize("megabytes", [1, "1", 1.0, 1.9])
async def test_a_file_as_large_as_the_permit_is_taken(
    provider: HttpProvider, uploads: UploadClient, megabytes: object
) -> None:
    provider.expect(permits(provider, max_file_size_mb=megabytes), answers(b""))
    await upload(uploads, provider.credential, b"\x00" * MEGABYTE)
    assert len(provider.requests) == 2


async def test_a_file_beyond_the_permit_is_not_sent(provider: HttpProvider, uploads: UploadClient) -> None:
    provider.expect(permits(provider, max_file_size_mb=1))
    with pytest.raises(AudioTooLarge, match="1 MB") as refused:
        await upload(uploads, provider.credential, b"\x00" * (MEGABYTE + 1))
    assert refused.value.status == 400
    assert len(provider.requests) == 1


# ---- Permits that are none

ODD: dict[str, list[Any]] = {
    "max_file_size_mb": [None, "", "x", [1], {}],
    "upload_host": [None, "", 7, [], {}],
    "upload_dir": [None, 7, ["a"], {"a": 1}],
    "policy": [None, ["a", "b"], {"a": 1}],
    "signature": [None, ["a"], {}],
    "oss_access_key_id": [None, ["a"], {}],
    "x_oss_object_acl": [["a"], {}],
    "x_oss_forbid_overwrite": [["a"], {}],
}
BROKEN: dict[str, dict[str, Any]] = {
    "no data": {"request_id": "req-1"},
    "null data": {"data": None, "request_id": "req-1"},
    "empty data": {"data": {}, "request_id": "req-1"},
    "a list": {"data": ["upload_host"]},
    "a text": {"data": "upload_host"},
    "a number": {"data": 7},
    **{
        f"{name} = {value!r}": {"data": {**policy("https://b.oss-cn-beijing.aliyuncs.com"), name: value}}
        for name, values in ODD.items()
        for value in values
    },
}
MISSING = [
    "policy",
    "signature",
    "upload_dir",
    "upload_host",
    "max_file_size_mb",
    "oss_access_key_id",
    "x_oss_object_acl",
    "x_oss_forbid_overwrite",
]
FOREIGN = [
    "https://example.com",
    "https://127.0.0.1",
    "http://127.0.0.2",
    "http://169.254.169.254",
    "https://b.oss-cn-beijing-internal.aliyuncs.com",
    "https://b.oss-cn-beijing.aliyuncs.com.example.com",
    "https://user@b.oss-cn-beijing.aliyuncs.com",
    "https://b.oss-cn-beijing.aliyuncs.com:8443",
    "b.oss-cn-beijing.aliyuncs.com",
]


async def refused_without_upload(provider: HttpProvider, uploads: UploadClient, answer: object) -> UpstreamError:
    """Have this answer taken for a permit; nothing may be sent anywhere."""
    provider.expect(answers(answer))
    faraway = Credential(API_KEY, "ws://unused.test", f"{provider.url}/api/v1")
    with respx.mock(assert_all_called=False, assert_all_mocked=False) as router:
        router.route(host="127.0.0.1", port=int(provider.url.rpartition(":")[2])).pass_through()
        elsewhere = router.route().respond(200)
        with pytest.raises(UpstreamError) as refused:
            await upload(uploads, faraway, b"ID3")
    assert not elsewhere.called
    assert len(provider.requests) == 1
    return refused.value


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN.keys())
async def test_a_broken_permit_is_none(provider: HttpProvider, uploads: UploadClient, answer: dict[str, Any]) -> None:
    assert type(await refused_without_upload(provider, uploads, answer)) is UpstreamError


@pytest.mark.parametrize("name", MISSING)
async def test_a_permit_has_everything_that_it_needs(provider: HttpProvider, uploads: UploadClient, name: str) -> None:
    data = policy(provider.url)
    del data[name]
    await refused_without_upload(provider, uploads, {"data": data})


@pytest.mark.parametrize("host", FOREIGN)
async def test_audio_is_given_to_nobody_else(provider: HttpProvider, uploads: UploadClient, host: str) -> None:
    await refused_without_upload(provider, uploads, {"data": policy(host)})


@pytest.mark.parametrize("path", ["/\x01", "/" + "a" * 70_000], ids=["control", "endless"])
async def test_a_store_that_cannot_be_called_is_an_error_of_ours(
    provider: HttpProvider, uploads: UploadClient, path: str
) -> None:
    await refused_without_upload(provider, uploads, {"data": policy(provider.url + path)})


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (refuses("InvalidApiKey", status=401), InvalidApiKey),
        (answers(b"", 500), UnclearAnswer),
    ],
)
async def test_a_refused_permit_is_told(
    provider: HttpProvider, uploads: UploadClient, act: Act, error: type[AppError]
) -> None:
    provider.expect(act)
    with pytest.raises(AppError) as refused:
        await upload(uploads, provider.credential, b"ID3")
    assert type(refused.value) is error
    assert len(provider.requests) == 1


async def test_a_permit_costs_nothing_and_is_asked_for_again(provider: HttpProvider, uploads: UploadClient) -> None:
    provider.expect(Line.hang_up, permits(provider), answers(b""))
    await upload(uploads, provider.credential, b"ID3")
    provider.expect(*[Line.hang_up] * 4)
    with pytest.raises(ConnectionLost):
        await upload(uploads, provider.credential, b"ID3")


async def test_a_throttled_permit_is_asked_for_again(provider: HttpProvider, uploads: UploadClient) -> None:
    provider.expect(throttles, throttles, permits(provider), answers(b""), *[throttles] * 4)
    await upload(uploads, provider.credential, b"ID3")
    assert [request.method for request in provider.requests] == ["GET", "GET", "GET", "POST"]
    with pytest.raises(Throttled):
        await upload(uploads, provider.credential, b"ID3")


# ---- Stores that refuse


async def test_an_expired_permit_is_told_with_the_code_of_the_store(
    provider: HttpProvider, uploads: UploadClient
) -> None:
    provider.expect(permits(provider), answers(EXPIRED, 403, content_type="application/xml"))
    with capture_logs() as logs, pytest.raises(UpstreamError, match=r"AccessDenied") as refused:
        await upload(uploads, provider.credential, b"ID3")
    assert type(refused.value) is UpstreamError
    assert "oss-cn" not in refused.value.message
    (line,) = logs
    assert (line["event"], line["status"], line["provider_code"]) == ("provider_upload_refused", 403, "AccessDenied")
    assert API_KEY not in str(logs)
    assert len(provider.requests) == 2


@pytest.mark.parametrize("status", [202, 301, 302, 307, 400, 403, 404, 409, 411, 413, 500, 503])
@pytest.mark.parametrize("body", [b"", b"<html>", b"<Code></Code>", b"<Code>bad code\n</Code>", b"\xff" * 100])
async def test_any_other_answer_of_the_store_is_told_by_its_status(
    provider: HttpProvider, uploads: UploadClient, status: int, body: bytes
) -> None:
    provider.expect(permits(provider), answers(body, status, location=f"{provider.url}/elsewhere"))
    with pytest.raises(UpstreamError, match=f"HTTP {status}"):
        await upload(uploads, provider.credential, b"ID3")
    assert len(provider.requests) == 2


async def test_a_store_that_talks_for_ever_is_cut_short(provider: HttpProvider, uploads: UploadClient) -> None:
    provider.expect(permits(provider), answers(b"a" * 100_000, 403))
    with pytest.raises(UpstreamError):
        await upload(uploads, provider.credential, b"ID3")


@pytest.mark.parametrize(("act", "error"), [(Line.hang_up, ConnectionLost), (Line.keep_silent, UpstreamTimeout)])
async def test_a_broken_upload_has_its_own_error(provider: HttpProvider, act: Act, error: type[AppError]) -> None:
    provider.expect(permits(provider), act)
    async with provider.client(silence_seconds=0.3) as http:
        with pytest.raises(AppError) as broken:
            await upload(UploadClient(http), provider.credential, b"ID3")
    assert type(broken.value) is error
    assert len(provider.requests) == 2


# ---- Anything


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
good_policy = policy("https://b.oss-cn-beijing.aliyuncs.com")


class Permitting(HttpClient):
    """A client whose provider permits something, and whose store takes everything."""

    answer: Any = None

    async def get(
        self, credential: Credential, path: str, query: dict[str, str] | None = None, *, attempts: int = 4
    ) -> dict[str, Any]:
        """Give the permit."""
        return {"data": self.answer}

    async def send(self, request: httpx.Request, max_bytes: int) -> tuple[int, bytes]:
        """Take the form."""
        assert request.url.host == "b.oss-cn-beijing.aliyuncs.com"
        return 200, b""


def test_any_permit_is_used_or_an_error_of_ours() -> None:
    http = Permitting(handshake_seconds=PATIENCE, silence_seconds=PATIENCE)
    credential = Credential(API_KEY, "ws://unused.test", "https://dashscope.test/api/v1")
    changes = st.fixed_dictionaries({}, optional=dict.fromkeys(good_policy, json_values))

    async def upload_with(permit: Any) -> None:
        http.answer = permit
        try:
            address = await upload(UploadClient(http), credential, b"ID3")
        except AppError:
            return
        assert address.startswith("oss://")

    with asyncio.Runner() as runner:

        @settings(derandomize=True, deadline=None)
        @given(changes.map(lambda change: {**good_policy, **change}) | json_values)
        def try_permit(permit: Any) -> None:
            runner.run(upload_with(permit))

        try_permit()
        runner.run(http.close())
