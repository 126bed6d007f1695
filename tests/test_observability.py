"""What an operator sees of one request: its line in the log, and where its time went."""

import asyncio
import json
import re
import time
from typing import Any

import httpx

from app import timing
from app.timing import RequestTiming, Stopwatch
from tests.conftest import PASSWORD, Account, CreateAccount
from tests.databases import rows
from tests.servers import Server
from tests.talking import talking, token_of

PATIENCE_SECONDS = 10.0
TEXT = "今天天气真好，我们一起去公园散步。"


async def line_of(server: Server, request_id: str) -> dict[str, Any]:
    """The line that the log has of a request."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            for line in server.log.splitlines():
                if f'"{request_id}"' in line and '"event": "request"' in line:
                    told: dict[str, Any] = json.loads(line)
                    return told
            await asyncio.sleep(0.02)


def billed_name(server: Server, record_id: int) -> str:
    """What the provider calls a call that was paid."""
    [found] = rows(server, "SELECT provider_request_id FROM bills WHERE record_id = ?", record_id)
    return str(found[0])


def shares_of(answer: httpx.Response) -> dict[str, float]:
    """What `Server-Timing` says, in milliseconds."""
    shares = (re.fullmatch(r"(\w+);dur=([0-9.]+)", each) for each in answer.headers["server-timing"].split(", "))
    return {share[1]: float(share[2]) for share in shares if share}


# ---- Stopwatches


def test_blocks_that_overlap_are_counted_once() -> None:
    watch = Stopwatch()
    began_at = time.perf_counter()
    with watch:
        time.sleep(0.02)
        with watch:
            time.sleep(0.02)
    took = time.perf_counter() - began_at
    assert 0.04 <= watch.seconds <= took
    time.sleep(0.01)
    assert watch.seconds <= took


async def test_what_waits_side_by_side_leaves_our_own_share_whole() -> None:
    async def wait(kind: timing.Kind) -> None:
        with timing.measure(kind):
            await asyncio.sleep(0.05)

    with timing.timed_request() as request:
        began_at = time.perf_counter()
        await asyncio.gather(*(asyncio.create_task(wait(kind)) for kind in ("provider", "provider", "storage")))
        waited_ms = (time.perf_counter() - began_at) * 1000
        time.sleep(0.03)
        header = request.server_timing()
    shares = {name: float(ms) for name, ms in re.findall(r"(\w+);dur=([0-9.]+)", header)}
    assert shares.keys() == {"provider", "storage", "app"}
    for kind in ("provider", "storage"):
        assert 50 <= shares[kind] <= waited_ms + 1
    assert 30 <= shares["app"] <= request.seconds * 1000 - 50


def test_outside_a_request_nothing_is_measured() -> None:
    request = RequestTiming()
    with timing.measure("provider"):
        timing.note(record_id=1)
    assert request.facts == {}
    assert request.waits_ms() == {"provider_ms": 0, "storage_ms": 0}


def test_measuring_is_cheap() -> None:
    times = 2000
    with timing.timed_request():
        began_at = time.process_time()
        for _ in range(times):
            with timing.measure("provider"):
                pass
        spent = time.process_time() - began_at
    assert spent / times < 50e-6


# ---- Requests


async def test_a_line_tells_whose_call_it_was_and_whom_it_waited_for(account: Account, backend: Server) -> None:
    answer = await account.synthesize(TEXT)
    assert answer.status_code == 200, answer.text
    line = await line_of(backend, answer.headers["x-request-id"])
    record_id = answer.json()["data"]["record_id"]
    billed_as = billed_name(backend, record_id)
    assert (line["method"], line["route"], line["status"]) == ("POST", "/api/audio/tts/synthesize", 200)
    assert (line["user_id"], line["record_id"]) == (account.user_id, record_id)
    assert line["provider_request_id"] == billed_as
    assert 0 < line["provider_ms"] < line["duration_ms"]
    assert 0 < line["storage_ms"] < line["duration_ms"]
    assert 0 < line["first_byte_ms"] <= line["duration_ms"]
    assert "close_code" not in line


async def test_every_answer_tells_browsers_where_its_time_went(account: Account) -> None:
    origin = {"Origin": "http://frontend.example"}
    answers = [
        await account.client.get("/health/live", headers=origin),
        await account.client.get("/no/such/page", headers=origin),
        await account.client.post("/api/auth/login", content=b"{", headers=origin),
    ]
    for answer in answers:
        shares = shares_of(answer)
        assert (shares["provider"], shares["storage"]) == (0, 0)
        assert 0 < shares["app"] <= answer.elapsed.total_seconds() * 1000
        assert answer.headers["timing-allow-origin"] == answer.headers["access-control-allow-origin"]
        assert "Server-Timing" in answer.headers["access-control-expose-headers"]
    unasked = await account.client.get("/health/live")
    assert "timing-allow-origin" not in unasked.headers


async def test_a_recognition_is_the_providers_time(account: Account, backend: Server) -> None:
    spoken = await account.synthesize(TEXT, format="wav")
    audio = (await account.client.get(httpx.URL(spoken.json()["data"]["audio_url"]).path)).content
    answer = await account.client.post(
        "/api/audio/asr/recognize", data={"model": "qwen3-asr-flash"}, files={"file": ("a.wav", audio, "audio/wav")}
    )
    assert answer.status_code == 200, answer.text
    assert shares_of(answer)["provider"] > 0
    line = await line_of(backend, answer.headers["x-request-id"])
    assert line["provider_request_id"] == billed_name(backend, line["record_id"])


async def test_a_stream_is_timed_to_its_first_audio(realtime_backend: Server, create_account: CreateAccount) -> None:
    account = await create_account(realtime_backend)
    body = {"model": "cosyvoice-v3-flash", "voice": "longanyang", "text": TEXT, "stream": True, "format": "wav"}
    async with account.client.stream("POST", "/api/audio/tts/synthesize", json=body) as answer:
        async for _ in answer.aiter_raw():
            pass
    line = await line_of(realtime_backend, answer.headers["x-request-id"])
    assert line["first_byte_ms"] < line["duration_ms"] - 500  # it is spoken as fast as it plays
    assert 0 < shares_of(answer)["provider"] <= line["first_byte_ms"]
    assert line["provider_ms"] > line["first_byte_ms"]
    assert line["record_id"] == int(answer.headers["x-record-id"])


async def test_the_record_that_a_path_names_is_told(account: Account, backend: Server) -> None:
    record_id = (await account.synthesize("你好")).json()["data"]["record_id"]
    answer = await account.client.get(f"/api/audio/records/{record_id}")
    line = await line_of(backend, answer.headers["x-request-id"])
    assert (line["route"], line["record_id"]) == ("/api/audio/records/{record_id}", record_id)


async def test_a_websocket_has_a_line_with_the_code_that_closed_it(account: Account, backend: Server) -> None:
    async with talking(backend, account) as talk:
        request_id = talk.socket.response.headers["x-request-id"] if talk.socket.response else ""
        await talk.say(TEXT)
        await talk.end()
        told = (await talk.hear()).message
        assert told["type"] == "complete"
    line = await line_of(backend, request_id)
    assert (line["method"], line["route"], line["status"]) == ("WEBSOCKET", "/api/audio/tts/stream", 101)
    assert (line["user_id"], line["record_id"]) == (account.user_id, told["record_id"])
    assert line["close_code"] == 1000
    assert 0 < line["first_byte_ms"] < line["duration_ms"]
    assert line["provider_ms"] > 0
    assert line["provider_request_id"] == billed_name(backend, told["record_id"])


async def test_a_websocket_that_we_close_says_why(account: Account, backend: Server) -> None:
    async with talking(backend, account, model="nothing") as talk:
        request_id = talk.socket.response.headers["x-request-id"] if talk.socket.response else ""
        await talk.socket.wait_closed()
    line = await line_of(backend, request_id)
    assert line["close_code"] == 1008
    assert "first_byte_ms" not in line


async def test_lines_tell_neither_tokens_nor_texts(account: Account, backend: Server) -> None:
    text = "只有这一次说的话。"
    record_id = (await account.synthesize(text)).json()["data"]["record_id"]
    async with talking(backend, None, token=token_of(account)) as talk:
        await talk.say(text)
        await talk.end()
        await talk.hear()
    await account.client.get(f"/api/audio/records/{record_id}/events", params={"token": token_of(account)})
    log = backend.log
    for secret in (text, token_of(account), account.api_key, PASSWORD):
        assert secret not in log
