"""Audio on its way in: bodies of every kind and size, what is in them, and how it gets to the provider."""

import asyncio
import base64
import gzip
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.conftest import Account, CreateAccount
from tests.hearing import (
    AUDIO_ASR,
    FLASH,
    PUBLIC_URL,
    STRANGE_SPEECH,
    data_of,
    recognize,
    recognize_file,
    refusal,
    speak,
    tone,
    transcribe,
)
from tests.servers import Sandbox, Server, run_backend
from tests.test_deployments import oss_settings
from tests.test_recordings import encode

PATH = "/api/audio/asr/recognize"
MEGABYTE = 1024 * 1024
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
FILE_PART = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.mp3"\r\n\r\n'
URI_LIMIT_BYTES = 7_864_300  # of audio whose data URI is about as long as the provider takes

LOCAL_URLS = [
    "file:///etc/passwd",
    "ftp://media.example.com/a.mp3",
    "//media.example.com/a.mp3",
    "data:audio/mpeg;base64,AAAA",
    "oss://dashscope-instant/x/a.mp3",
    "http://127.0.0.1/a.mp3",
    "http://127.1/a.mp3",
    "http://2130706433/a.mp3",
    "http://0x7f000001/a.mp3",
    "http://0177.0.0.1/a.mp3",
    "http://１２７.0.0.1/a.mp3",
    "http://localhost:8000/a.mp3",
    "http://localhost./a.mp3",
    "http://[::1]/a.mp3",
    "http://[::ffff:127.0.0.1]/a.mp3",
    "http://10.0.0.8/a.mp3",
    "http://192.168.1.1/a.mp3",
    "http://100.100.100.200/latest/meta-data/",
    "http://169.254.169.254/latest/meta-data/",
    "http://metadata.google.internal/computeMetadata/v1/",
    "http://metadata.tencentyun.com/latest/meta-data/",
    "http://printer/a.mp3",
    "https://user:secret@media.example.com/a.mp3",
    "https://media.example.com\\@127.0.0.1/a.mp3",
    "https://",
    "audio.mp3",
]


def encoded(audio: bytes) -> str:
    """Audio in Base64."""
    return base64.b64encode(audio).decode()


def wav_of(size: int) -> bytes:
    """A WAV of about this many bytes that plays less than a minute."""
    return tone(size / (4 * 48_000), channels="tt", rate=48_000)


async def refused_for_nothing(account: Account, sandbox: Sandbox) -> None:
    """What was refused left neither a record nor a trace at the provider."""
    assert sandbox.requests(account.api_key) == []
    assert (await account.history())["total"] == 0


async def test_exactly_one_source_is_taken(account: Account, sandbox: Sandbox) -> None:
    audio = tone(1)
    for answer in (
        await recognize(account),
        await recognize(account, audio_url=None, audio_base64=None),
        await recognize(account, audio_url="", audio_base64=""),
        await recognize(account, audio_url=PUBLIC_URL, audio_base64=encoded(audio)),
        await recognize_file(account, audio, audio_url=PUBLIC_URL),
        await recognize_file(account, audio, audio_base64=encoded(b"x")),
        await account.client.post(PATH, files={"model": (None, FLASH)}),
        await account.client.post(PATH, files={"model": (None, FLASH), "file": (None, "text")}),
        await account.client.post(PATH, files=[("model", (None, FLASH)), *[("file", ("a.wav", audio))] * 2]),
    ):
        assert refusal(answer) == (400, "INVALID_REQUEST"), answer.text
    await refused_for_nothing(account, sandbox)


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        (None, b"{}"),
        ("text/plain", b"{}"),
        ("application/x-www-form-urlencoded", b"model=qwen3-asr-flash"),
        ("audio/mpeg", b"ID3"),
        ("multipart/form-data", b"--x--"),
        ("multipart/form-data; boundary=x", b"--y\r\n"),
        ("multipart/form-data; boundary=x", FILE_PART),
        ("application/json", b""),
        ("application/json", b"{"),
        ("application/json", b"[]"),
        ("application/json", b"null"),
        ("application/json", b"[" * 100_000),
        ("application/json", b'{"model": "qwen3-asr-flash", "audio_url": "a\\ud800"}'),
        ("application/json", b'{"model": "qwen3-asr-flash", "audio_base64": "\xff"}'),
        ("application/json", gzip.compress(json.dumps({"model": FLASH, "audio_url": PUBLIC_URL}).encode(), mtime=0)),
    ],
)
async def test_bodies_of_another_kind_are_refused(
    account: Account, sandbox: Sandbox, content_type: str | None, content: bytes
) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    answer = await account.client.post(PATH, content=content, headers=headers)
    assert refusal(answer) == (400, "INVALID_REQUEST"), answer.text
    await refused_for_nothing(account, sandbox)


@pytest.mark.parametrize("charset", ["punycode", "PunyCode", "utf-7", "undefined", "latin-1", "no-codec", '"utf-16"'])
async def test_forms_in_other_charsets_are_refused_at_once(
    account: Account, sandbox: Sandbox, backend: Server, charset: str
) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n--x--\r\n'
    headers = {"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}
    slow = part % (b"9" * 200_000)  # Punycode takes five seconds for it
    asking = asyncio.create_task(account.client.post(PATH, content=slow, headers=headers))
    async with httpx.AsyncClient(base_url=backend.url, trust_env=False) as other:
        started = time.monotonic()
        while not asking.done():
            before = time.monotonic()
            assert (await other.get("/health/live")).status_code == 200
            assert time.monotonic() - before < 1
    assert refusal(await asking) == (400, "INVALID_REQUEST")
    assert "charset" in (await asking).json()["message"]
    assert time.monotonic() - started < 2
    await refused_for_nothing(account, sandbox)


async def test_forms_in_utf_8_are_taken(account: Account) -> None:
    form = (
        b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n'
        b'--x\r\nContent-Disposition: form-data; name="audio_url"\r\n\r\n%b\r\n--x--\r\n'
    ) % (FLASH.encode(), PUBLIC_URL.encode())
    for charset in ("utf-8", "UTF-8", '"utf8"'):
        headers = {"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}
        assert data_of(await account.client.post(PATH, content=form, headers=headers))["text"] == STRANGE_SPEECH


async def test_an_id_that_cannot_be_one_is_no_task(account: Account) -> None:
    for task_id in ("abc%00def", "%ED%A0%80", "%FF", "%E4%BB%BB%E5%8A%A1", "abc%0Adef"):
        for path in (f"/api/audio/asr/task/{task_id}", f"/api/audio/asr/task/{task_id}/subtitle"):
            assert refusal(await account.client.get(path)) == (404, "TASK_NOT_FOUND"), path


async def test_json_with_a_charset_is_json(account: Account) -> None:
    content = json.dumps({"model": FLASH, "audio_url": PUBLIC_URL})
    answer = await account.client.post(
        PATH, content=content, headers={"Content-Type": "Application/JSON; charset=utf-8"}
    )
    assert data_of(answer)["text"] == STRANGE_SPEECH


async def test_what_is_no_audio_is_refused(account: Account, sandbox: Sandbox) -> None:
    m4a = encode("aac", "ipod", 16000, seconds=2)
    for name, content in (
        ("picture.mp3", PNG),
        ("text.wav", "只是文字。".encode() * 100),
        ("apple.mp3", m4a),
        ("nothing.mp3", b""),
        ("cut.wav", tone(1)[:30]),
        ("list.mp3", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"),
        ("script.mp3", b"ffconcat version 1.0\nfile /etc/passwd\n"),
    ):
        answer = await recognize_file(account, content, name)
        assert refusal(answer) == (400, "INVALID_AUDIO"), name
        if content:
            answer = await recognize(account, audio_base64=encoded(content))
            assert refusal(answer) == (400, "INVALID_AUDIO"), name
    await refused_for_nothing(account, sandbox)


@pytest.mark.parametrize(
    "text",
    [
        "好",
        "AAA",
        "A",
        "AAAA=AAA",
        "AA-_",
        "data:audio/mpeg,AAAA",
        "data:audio/mpeg;base64",
        "data:;base64,A",
        "%41AAA",
    ],
)
async def test_what_is_no_base64_is_refused(account: Account, sandbox: Sandbox, text: str) -> None:
    answer = await recognize(account, audio_base64=text)
    assert refusal(answer) == (400, "INVALID_AUDIO")
    assert "audio_base64" in answer.json()["message"]
    await refused_for_nothing(account, sandbox)


async def test_a_minute_is_taken_and_more_is_not(account: Account, sandbox: Sandbox) -> None:
    for content in (tone(61), encode("libmp3lame", "mp3", 8000, seconds=61)):
        for answer in (
            await recognize_file(account, content),
            await recognize(account, audio_base64=encoded(content)),
        ):
            assert refusal(answer) == (400, "AUDIO_TOO_LONG")
            assert "60" in answer.json()["message"]
    await refused_for_nothing(account, sandbox)
    for seconds, bill in ((59, "0.0236"), (60, "0.0240")):
        assert data_of(await recognize_file(account, tone(seconds)))["bill"] == bill


async def test_ten_megabytes_are_taken_and_more_is_not(account: Account, sandbox: Sandbox) -> None:
    large = wav_of(10 * MEGABYTE + 100_000)
    for answer in (await recognize_file(account, large), await recognize(account, audio_base64=encoded(large))):
        assert refusal(answer) == (400, "INVALID_AUDIO")
        assert "10 MB" in answer.json()["message"]
    await refused_for_nothing(account, sandbox)
    assert data_of(await recognize_file(account, large[: 10 * MEGABYTE]))["text"] == STRANGE_SPEECH


@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=x"])
async def test_two_gigabytes_are_refused_at_once_and_unread(
    backend: Server, account: Account, sandbox: Sandbox, content_type: str
) -> None:
    async with raw_request(backend, account, content_type, "Content-Length: 2147483648") as (reader, _):
        async with asyncio.timeout(2):
            status, body = await read_answer(reader)
    assert (status, body["code"], body["error"]) == (400, 400, "INVALID_AUDIO")
    assert "15 MB" in body["message"]
    await refused_for_nothing(account, sandbox)


@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=x"])
async def test_an_endless_body_is_not_read_to_its_end(
    backend: Server, account: Account, sandbox: Sandbox, content_type: str
) -> None:
    chunk = FILE_PART if content_type.startswith("multipart") else b'{"audio_base64": "'
    sent = 0
    async with (
        raw_request(backend, account, content_type, "Transfer-Encoding: chunked") as (reader, writer),
        asyncio.timeout(20),
    ):
        answering = asyncio.create_task(read_answer(reader))
        while not answering.done() and sent < 200 * MEGABYTE:
            try:
                writer.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                await writer.drain()
            except ConnectionError:
                break
            sent += len(chunk)
            chunk = b"A" * 256 * 1024
        status, body = await answering
    assert (status, body["error"]) == (400, "INVALID_AUDIO")
    assert sent < 64 * MEGABYTE
    await refused_for_nothing(account, sandbox)


async def test_a_client_that_leaves_in_the_middle_of_its_upload_costs_nothing(
    backend: Server, account: Account, sandbox: Sandbox
) -> None:
    log_before = len(backend.log)
    for content_type in ("application/json", "multipart/form-data; boundary=x"):
        async with raw_request(backend, account, content_type, "Content-Length: 1000000") as (_, writer):
            writer.write(b"A" * 1000)
            await writer.drain()
    async with asyncio.timeout(5):
        while backend.log[log_before:].count(" /api/audio/asr/recognize") + backend.log[log_before:].count(PATH) < 2:
            await asyncio.sleep(0.05)
    assert "Traceback" not in backend.log[log_before:]
    await refused_for_nothing(account, sandbox)


async def test_addresses_that_are_not_public_are_refused(account: Account, sandbox: Sandbox) -> None:
    for url in LOCAL_URLS:
        for answer, field in (
            (await recognize(account, audio_url=url), "audio_url"),
            (await transcribe(account, url), "file_url"),
        ):
            assert refusal(answer) == (400, "INVALID_REQUEST"), url
            assert field in answer.json()["message"]
            assert "secret" not in answer.text
    await refused_for_nothing(account, sandbox)


async def test_addresses_near_our_own_media_are_not_our_own(
    account: Account, sandbox: Sandbox, backend: Server
) -> None:
    url, _ = await speak(account, "你好。")
    for near in (
        f"{backend.url}/media/../api/user/me",
        f"{backend.url}/media/..%2f..%2fjwt_secret",
        f"{backend.url}/metrics",
        url.replace("http://", "http://x@"),
        f"{url}/",
    ):
        assert refusal(await recognize(account, audio_url=near)) == (400, "INVALID_REQUEST"), near
    gone = f"{url[:-8]}0000.mp3"
    for answer in (await recognize(account, audio_url=gone), await transcribe(account, gone)):
        assert refusal(answer) == (400, "INVALID_AUDIO")
        assert "不存在" in answer.json()["message"]
    assert sandbox.requests(account.api_key) == []
    assert (await account.history(type="asr"))["total"] == 0


async def test_small_audio_travels_inside_the_request(account: Account, sandbox: Sandbox) -> None:
    url, audio = await speak(account, "今天天气真好。", format="wav")
    data_of(await recognize_file(account, audio))
    data_of(await recognize(account, audio_url=url))
    data_of(await recognize(account, audio_base64=encoded(audio)))
    for request in sandbox.requests(account.api_key):
        assert (request["audio_source"], request["audio_bytes"]) == ("data", len(audio))
        assert request["input"]["messages"][0]["content"][0]["audio"].startswith("data:audio/wav;base64,")


async def test_large_audio_goes_by_a_temporary_upload(account: Account, sandbox: Sandbox) -> None:
    audio = wav_of(8_000_000)
    for model in (FLASH, AUDIO_ASR):
        data = data_of(await recognize_file(account, audio, model=model))
        assert (data["text"], data["duration"], data["bill"]) == (STRANGE_SPEECH, 42, "0.0168")
        policy, recognition = sandbox.requests(account.api_key)[-2:]
        assert (policy["path"], policy["model"]) == ("/api/v1/uploads", model)
        assert (recognition["audio_source"], recognition["audio_bytes"]) == ("oss", len(audio))
        address = recognition["input"]["messages"][0]["content"][0]["audio"]
        [upload] = [
            each
            for each in sandbox.requests("")
            if each["path"].startswith("/dashscope-file-") and policy["time"] < each["time"] < recognition["time"]
        ]
        assert (upload["status"], upload["audio_bytes"]) == (200, len(audio))
        assert address.startswith("oss://dashscope-instant/")
        assert address.endswith(".wav")


async def test_the_encoded_length_decides(account: Account, sandbox: Sandbox) -> None:
    whole = wav_of(8_000_000)
    for size, source in ((URI_LIMIT_BYTES - 200, "data"), (URI_LIMIT_BYTES + 200, "oss")):
        assert data_of(await recognize_file(account, whole[:size]))["text"] == STRANGE_SPEECH
        request = sandbox.requests(account.api_key)[-1]
        assert (request["audio_source"], request["audio_bytes"]) == (source, size)


@pytest.mark.parametrize("how", ["refused", "expired"])
async def test_an_upload_that_fails_is_told_and_costs_nothing(account: Account, sandbox: Sandbox, how: str) -> None:
    with sandbox.faults(uploads={"how": how}):
        answer = await recognize_file(account, wav_of(8_000_000))
    assert refusal(answer) == (502, "UPSTREAM_ERROR")
    assert "上传" in answer.json()["message"]
    assert [request["path"] for request in sandbox.requests(account.api_key)] == ["/api/v1/uploads"]
    [item] = (await account.history())["items"]
    assert (item["status"], item["bill"]) == ("failed", "0")


async def test_with_a_bucket_large_audio_goes_by_an_object_that_is_removed(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    settings = oss_settings(sandbox, OSS_URL_MODE="signed", OSS_BUCKET="heard-private")
    with run_backend(tmp_path, {**settings, **sandbox.settings}) as backend:
        account = await create_account(backend)
        audio = wav_of(8_000_000)
        assert data_of(await recognize_file(account, audio))["text"] == STRANGE_SPEECH
        [request] = sandbox.requests(account.api_key)
        assert (request["audio_source"], request["audio_bytes"]) == ("url", len(audio))
        address = request["input"]["messages"][0]["content"][0]["audio"]
        assert "/audio/asr/" in address
        assert httpx.get(address.partition("?")[0]).status_code in {403, 404}
        async with asyncio.timeout(5), httpx.AsyncClient(trust_env=False) as reader:
            while (await reader.get(address)).status_code != 404:
                await asyncio.sleep(0.02)
        url, audio = await speak_into(account)
        data_of(await recognize(account, audio_url=url))
        request = sandbox.requests(account.api_key)[-1]
        assert (request["audio_source"], request["audio_bytes"]) == ("url", len(audio))
        data_of(await recognize_file(account, audio))
        assert sandbox.requests(account.api_key)[-1]["audio_source"] == "data"
        assert "Signature" not in backend.log


async def speak_into(account: Account) -> tuple[str, bytes]:
    """Have a sentence spoken that lies in the bucket: its URL and the audio."""
    url = data_of(await account.synthesize("今天天气真好。"))["audio_url"]
    async with httpx.AsyncClient(trust_env=False) as reader:
        return url, (await reader.get(url)).content


@asynccontextmanager
async def raw_request(
    backend: Server, account: Account, content_type: str, framing: str
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Begin a request whose body is yet to come, and hang up in the end."""
    address = urlsplit(backend.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(
        f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: {account.client.headers['Authorization']}\r\n"
        f"Content-Type: {content_type}\r\n{framing}\r\n\r\n".encode()
    )
    try:
        await writer.drain()
        yield reader, writer
    finally:
        writer.transport.abort()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, Any]]:
    """Status and JSON of an answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.partition("content-length:")[2].split()[0])
    body: dict[str, Any] = json.loads(await reader.readexactly(length))
    return int(head.split()[1]), body
