"""Text to speech that is heard while it is spoken: spec 1.1 with stream."""

import asyncio
import socket
import time
from typing import Any

import httpx
import pytest

from tests.conftest import Account, CreateAccount
from tests.servers import Sandbox, Server
from tests.sound import decode, duration, loudness
from tests.test_synthesis import FORMATS

LONG_TEXT = "今天天气真好，我们一起去公园散步吧。" * 12
SETTLE_SECONDS = 8.0


async def settled(account: Account) -> dict[str, Any]:
    """The user's only record, once it has its end."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline:
        [item] = (await account.history())["items"]
        if item.get("status") != "running":
            return dict(item)
        await asyncio.sleep(0.05)
    raise AssertionError("the record was not settled in time")


@pytest.mark.parametrize("audio_format", FORMATS)
async def test_the_stream_plays_and_the_same_audio_is_kept(
    account: Account, sandbox: Sandbox, audio_format: str
) -> None:
    answer = await account.synthesize("今天天气真好。", stream=True, format=audio_format)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == FORMATS[audio_format]
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "content-length" not in answer.headers
    assert answer.headers["x-request-id"]
    [item] = (await account.history())["items"]
    assert item["id"] == int(answer.headers["x-record-id"])
    assert "status" not in item
    assert item["bill"] == "0.0002"
    kept = (await account.client.get(item["output_url"])).content
    assert len(answer.content) == sandbox.calls(account.api_key)[0]["audio_bytes"] == len(kept)
    if audio_format == "wav":
        assert answer.content[44:] == kept[44:]
        assert answer.content[:44] != kept[:44]
    else:
        assert answer.content == kept
    samples, rate = decode(answer.content, audio_format, 22050)
    assert loudness(samples) > 100
    assert abs(len(samples) / rate - item["duration"]) <= 0.05


async def test_the_first_byte_comes_long_before_the_last(
    realtime_backend: Server, create_account: CreateAccount
) -> None:
    account = await create_account(realtime_backend)
    body = {"model": "cosyvoice-v3-flash", "voice": "longanyang", "text": "今天天气真好。" * 2, "stream": True}
    started = time.monotonic()
    arrivals = []
    async with account.client.stream("POST", "/api/audio/tts/synthesize", json={**body, "format": "pcm"}) as answer:
        async for _ in answer.aiter_raw():
            arrivals.append(time.monotonic() - started)
    assert arrivals[0] < 0.8
    assert arrivals[-1] - arrivals[0] > 1.0
    assert len(arrivals) > 5


async def test_an_error_before_the_first_byte_is_json(account: Account) -> None:
    answer = await account.synthesize("你好", model="cosyvoice-v3-plus", voice="longyingjing_v3", stream=True)
    assert (answer.status_code, answer.json()["error"]) == (400, "INVALID_VOICE")
    assert (await settled(account))["status"] == "failed"


async def test_a_failure_after_the_first_byte_breaks_the_body_off(account: Account, sandbox: Sandbox) -> None:
    with (
        sandbox.faults(break_tasks=1, break_after_frames=2, break_how="fail"),
        pytest.raises(httpx.RemoteProtocolError),
    ):
        await account.synthesize(LONG_TEXT, stream=True, format="wav")
    item = await settled(account)
    assert item["status"] == "failed"
    assert "InternalError" in item["error_message"]
    assert duration((await account.client.get(item["output_url"])).content, "wav", 22050) > 0


async def test_a_hangup_stops_the_provider_and_bills_what_was_spoken(
    realtime_backend: Server, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(realtime_backend)
    body = {"model": "cosyvoice-v3-flash", "voice": "longanyang", "text": LONG_TEXT, "stream": True, "format": "pcm"}
    async with account.client.stream("POST", "/api/audio/tts/synthesize", json=body) as answer:
        async for _ in answer.aiter_raw():
            break
    item = await settled(account)
    assert item["status"] == "abandoned"
    [call] = realtime_sandbox.calls(account.api_key)
    assert call["outcome"] == "cancelled"
    assert 0 < call["characters"] < 400
    assert item["bill"] == f"{call['characters'] * 0.000014335:.4f}"
    kept = (await account.client.get(item["output_url"])).content
    assert len(kept) == call["audio_bytes"]
    assert (await account.synthesize("还能说话。")).status_code == 200
    assert {each["connection"] for each in realtime_sandbox.calls(account.api_key)} == {call["connection"]}


async def test_a_client_who_is_killed_is_noticed(
    realtime_backend: Server, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(realtime_backend)
    url = httpx.URL(realtime_backend.url)
    request = account.client.build_request(
        "POST",
        "/api/audio/tts/synthesize",
        json={"model": "cosyvoice-v3-flash", "voice": "longanyang", "text": LONG_TEXT, "stream": True},
    )
    raw = b"\r\n".join(
        [b"POST /api/audio/tts/synthesize HTTP/1.1", *(name + b": " + value for name, value in request.headers.raw)]
    )
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(raw + b"\r\n\r\n" + request.content)
    assert b"200" in await reader.readline()
    handle: socket.socket = writer.get_extra_info("socket")
    handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    writer.transport.abort()
    assert (await settled(account))["status"] == "abandoned"
    assert realtime_sandbox.calls(account.api_key)[0]["outcome"] == "cancelled"


async def test_a_hangup_before_the_first_byte_is_acted_on_at_once(
    backend: Server, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(backend)
    with sandbox.faults(break_tasks=1, break_after_frames=0, break_how="silent"):
        with pytest.raises(httpx.ReadTimeout):
            await account.client.post(
                "/api/audio/tts/synthesize",
                json={"model": "cosyvoice-v3-flash", "voice": "longanyang", "text": "今天天气真好。", "stream": True},
                timeout=0.5,
            )
        assert (await settled(account))["status"] == "abandoned"


async def test_a_client_of_the_plain_call_who_leaves_finds_the_audio_in_the_history(
    realtime_backend: Server, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(realtime_backend)
    with pytest.raises(httpx.ReadTimeout):
        await account.client.post(
            "/api/audio/tts/synthesize",
            json={"model": "cosyvoice-v3-flash", "voice": "longanyang", "text": "今天天气真好。", "format": "pcm"},
            timeout=0.3,
        )
    item = await settled(account)
    assert "status" not in item
    assert item["bill"] == "0.0002"
    assert (await account.client.get(item["output_url"])).status_code == 200


async def test_a_slow_client_slows_the_provider_down(
    backend: Server, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(backend)
    body = {"model": "cosyvoice-v3-flash", "voice": "longanyang", "text": LONG_TEXT * 6, "stream": True}
    fast_enough = {**body, "format": "pcm", "sample_rate": 48000}
    async with account.client.stream("POST", "/api/audio/tts/synthesize", json=fast_enough) as answer:
        chunks = answer.aiter_raw()
        received = len(await anext(chunks))
        await asyncio.sleep(1.0)
        [item] = (await account.history())["items"]
        assert item["status"] == "running"
        async for chunk in chunks:
            received += len(chunk)
    assert received == sandbox.calls(account.api_key)[0]["audio_bytes"] > 20_000_000
