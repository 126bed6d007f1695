"""OSS over real HTTP: signatures, addresses, retries, and what failures say."""

import io
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import parse_qs, urlsplit

import anyio
import httpx
import pytest
from structlog.testing import capture_logs

from app.errors import AppError, ObjectNotFound, StorageError
from app.storage import oss as oss_module
from app.storage.oss import OssStorage
from tests.servers import free_port
from tests.storage.oss_server import (
    KEY_ID,
    KEY_SECRET,
    REQUEST_ID,
    OssRequest,
    OssServer,
    busy,
    crc64,
    hang_up,
    refusing,
    silent,
)

KEY = "audio/tts/20251230/a.mp3"
BuildOss = Callable[..., OssStorage]


async def read(storage: OssStorage, key: str = KEY) -> bytes:
    async with storage.open(key) as chunks:
        return b"".join([chunk async for chunk in chunks])


async def failure_of(storage: OssStorage) -> tuple[AppError, list[dict[str, Any]]]:
    """Put something that fails; give the error and what was logged."""
    with capture_logs() as logs, pytest.raises(AppError) as failure:
        await storage.put(KEY, io.BytesIO(b"x"), content_type="audio/mpeg")
    return failure.value, [dict(line) for line in logs]


async def test_the_object_carries_its_content_type(oss: OssStorage, oss_server: OssServer) -> None:
    await oss.put(KEY, io.BytesIO(b"audio"), content_type="audio/ogg")

    assert oss_server.objects == {KEY: (b"audio", "audio/ogg")}


async def test_calls_share_connections(oss: OssStorage, oss_server: OssServer) -> None:
    for _ in range(4):
        await oss.put(KEY, io.BytesIO(b"audio"), content_type="audio/ogg")
        assert await read(oss) == b"audio"
        await oss.delete(KEY)
        with pytest.raises(ObjectNotFound):
            await read(oss)

    assert oss_server.connections == 1


async def test_who_gets_ready_in_time_does_not_wait_for_a_connection(
    oss: OssStorage, oss_server: OssServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        await oss.get_ready()
    assert (oss_server.connections, len(oss_server.methods)) == (1, 1)
    await oss.put(KEY, io.BytesIO(b"audio"), content_type="audio/ogg")
    await oss.get_ready()
    assert (oss_server.connections, len(oss_server.methods)) == (1, 2)
    monkeypatch.setattr(oss_module, "OPEN_SECONDS", 0.0)
    await oss.get_ready()
    assert (oss_server.connections, len(oss_server.methods)) == (1, 3)


async def test_to_get_ready_in_vain_is_no_failure(build_oss: BuildOss) -> None:
    storage = build_oss(endpoint=f"http://127.0.0.1:{free_port()}")
    await storage.get_ready()
    await storage.close()


async def test_ten_calls_at_a_time_and_a_free_event_loop(oss: OssStorage, oss_server: OssServer) -> None:
    oss_server.delay_seconds = 0.5
    latest = 0.0

    async def tick() -> None:
        nonlocal latest
        while True:
            before = time.perf_counter()
            await anyio.sleep(0.001)
            latest = max(latest, time.perf_counter() - before)

    async with anyio.create_task_group() as background:
        background.start_soon(tick)
        async with anyio.create_task_group() as uploads:
            for number in range(25):
                put = partial(oss.put, f"a/{number}", io.BytesIO(b"x"), content_type="audio/wav")
                uploads.start_soon(put)
        background.cancel_scope.cancel()

    assert len(oss_server.objects) == 25
    assert oss_server.most_running == 10
    assert latest < 0.15


@pytest.mark.parametrize("fault", [busy, hang_up, silent], ids=["busy", "hang-up", "silent"])
async def test_a_passing_failure_is_tried_again_from_the_start(
    build_oss: BuildOss, oss_server: OssServer, fault: Callable[[OssRequest], None]
) -> None:
    storage = build_oss(timeout_seconds=0.4)
    content = bytes(range(256)) * 1000
    oss_server.faults.extend([fault, busy])

    with capture_logs() as logs:
        await storage.put(KEY, io.BytesIO(content), content_type="audio/mpeg")
    await storage.close()

    assert oss_server.objects[KEY][0] == content
    assert [line["event"] for line in logs] == ["oss_retry", "oss_retry"]


async def test_reading_and_deleting_are_tried_again(oss: OssStorage, oss_server: OssServer) -> None:
    oss_server.objects[KEY] = (b"audio", "audio/mpeg")

    oss_server.faults.extend([busy, hang_up])
    assert await read(oss) == b"audio"
    oss_server.faults.extend([hang_up, busy])
    await oss.delete(KEY)

    assert oss_server.objects == {}


async def test_a_lasting_failure_ends_after_three_tries(oss: OssStorage, oss_server: OssServer) -> None:
    oss_server.always = busy

    error, logs = await failure_of(oss)

    assert isinstance(error, StorageError)
    assert "稍后重试" in error.message
    assert oss_server.methods == ["PUT"] * 3
    assert logs[-1] == {
        "event": "oss_failed",
        "log_level": "error",
        "verb": "put",
        "key": KEY,
        "code": "ServiceUnavailable",
        "status": 503,
        "request_id": REQUEST_ID,
    }


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (403, "AccessDenied", "权限"),
        (403, "InvalidAccessKeyId", "AccessKey"),
        (403, "RequestTimeTooSkewed", "校准"),
        (404, "NoSuchBucket", "Bucket"),
        (400, "EntityTooLarge", "错误码"),
    ],
)
async def test_a_refusal_is_not_repeated(
    oss: OssStorage, oss_server: OssServer, status: int, code: str, advice: str
) -> None:
    oss_server.always = refusing(status, code)

    error, logs = await failure_of(oss)

    assert isinstance(error, StorageError)
    assert advice in error.message
    assert oss_server.methods == ["PUT"]
    assert [line["code"] for line in logs] == [code]


async def test_nothing_said_or_logged_carries_a_credential(
    build_oss: BuildOss, oss_server: OssServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    storage = build_oss(access_key_secret="another-secret")

    error, logs = await failure_of(storage)
    await storage.close()

    assert "密钥不匹配" in error.message
    assert error.__cause__ is None
    assert error.__suppress_context__
    said = error.message + json.dumps(logs, ensure_ascii=False) + caplog.text
    assert not any(word in said for word in (KEY_ID, "another-secret", "Signature="))


async def test_a_closed_port_is_a_storage_error(build_oss: BuildOss) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    storage = build_oss(endpoint=f"http://127.0.0.1:{port}")

    error, logs = await failure_of(storage)

    assert "无法连接" in error.message
    assert [line["event"] for line in logs] == ["oss_retry", "oss_retry", "oss_failed"]


async def test_damage_on_the_way_up_is_repaired_by_another_try(oss: OssStorage, oss_server: OssServer) -> None:
    def store_damaged(request: OssRequest) -> None:
        body = request.body()
        oss_server.objects[KEY] = (body[:-1], "audio/mpeg")
        request.send(200, crc=crc64(body[:-1]))

    oss_server.faults.append(store_damaged)

    await oss.put(KEY, io.BytesIO(b"audio"), content_type="audio/mpeg")

    assert oss_server.objects[KEY][0] == b"audio"


async def test_damage_on_the_way_down_is_noticed(oss: OssStorage, oss_server: OssServer) -> None:
    oss_server.always = lambda request: request.send(200, b"damaged", crc=crc64(b"as stored"))

    with pytest.raises(StorageError):
        await read(oss)


async def test_a_download_that_breaks_off_is_noticed(oss: OssStorage, oss_server: OssServer) -> None:
    def break_off(request: OssRequest) -> None:
        request.send_response(200)
        request.send_header("Content-Length", "1000")
        request.end_headers()
        request.wfile.write(b"half")
        request.hang_up()

    oss_server.always = break_off

    with pytest.raises(StorageError):
        await read(oss)


async def test_a_cancelled_put_returns_at_once_and_gives_the_source_back(
    build_oss: BuildOss, oss_server: OssServer
) -> None:
    read_on = threading.Event()
    finished = threading.Event()
    received: list[bytes] = []

    def stall(request: OssRequest) -> None:
        read_on.wait(5)
        try:
            received.append(request.body())
        finally:
            finished.set()

    oss_server.always = stall
    storage = build_oss()
    source = io.BytesIO(b"private" * 5_000_000)

    before = time.perf_counter()
    with anyio.move_on_after(0.2):
        await storage.put(KEY, source, content_type="audio/mpeg")
    waited = time.perf_counter() - before
    position = source.seek(0)
    read_on.set()
    assert await anyio.to_thread.run_sync(finished.wait, 5)
    await storage.close()

    assert waited < 1
    assert source.tell() == position
    assert received == []
    assert oss_server.objects == {}


@pytest.mark.parametrize(
    ("endpoint", "public_base_url", "address"),
    [
        ("oss-cn-hangzhou.aliyuncs.com", None, "https://voices.oss-cn-hangzhou.aliyuncs.com"),
        ("http://oss-cn-hangzhou.aliyuncs.com/", None, "http://voices.oss-cn-hangzhou.aliyuncs.com"),
        ("oss-cn-hangzhou-internal.aliyuncs.com", None, "https://voices.oss-cn-hangzhou.aliyuncs.com"),
        ("http://127.0.0.1:9000", None, "http://127.0.0.1:9000/voices"),
        ("http://localhost:9000", None, "http://localhost:9000/voices"),
        ("oss-cn-hangzhou.aliyuncs.com", "https://cdn.example/audio", "https://cdn.example/audio"),
    ],
)
async def test_addresses(build_oss: BuildOss, endpoint: str, public_base_url: str | None, address: str) -> None:
    public = build_oss(endpoint=endpoint, public_base_url=public_base_url)
    signed = build_oss(endpoint=endpoint, public_base_url=public_base_url, signed_urls=True)

    assert public.url(KEY) == f"{address}/{KEY}"
    assert signed.url(KEY).startswith(f"{address}/{KEY}?")
    assert KEY_SECRET not in signed.url(KEY)


@pytest.mark.parametrize("region", ["cn-hangzhou", "oss-cn-hangzhou"])
async def test_a_signed_address_plays_for_an_hour(build_oss: BuildOss, oss_server: OssServer, region: str) -> None:
    storage = build_oss(region=region, signed_urls=True)
    oss_server.objects[KEY] = (b"audio", "audio/mpeg")

    url = storage.url(KEY)
    async with httpx.AsyncClient(trust_env=False) as client:
        played = await client.get(url)
        forged = await client.get(url.replace("a.mp3", "b.mp3"))

    assert played.content == b"audio"
    assert parse_qs(urlsplit(url).query)["x-oss-expires"] == ["3600"]
    assert forged.status_code == 403


@pytest.mark.parametrize("wrong", [{"bucket": "No_Such"}, {"endpoint": "http://not a host"}])
def test_malformed_settings_are_refused_at_once(build_oss: BuildOss, wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="malformed"):
        build_oss(**wrong)


async def test_a_slow_checksum_is_reported(build_oss: BuildOss, monkeypatch: pytest.MonkeyPatch) -> None:
    with capture_logs() as compiled:
        build_oss()
    monkeypatch.setattr("crcmod.crcmod._usingExtension", False)
    with capture_logs() as interpreted:
        build_oss()

    assert compiled == []
    assert [line["event"] for line in interpreted] == ["crc_is_slow"]
