"""What remains of a call when our process goes away."""

import asyncio
import time
from pathlib import Path

import httpx
import pytest

from tests.conftest import CreateAccount
from tests.databases import rows
from tests.servers import ENDED_GRACEFULLY, Sandbox, Server, run_backend
from tests.test_streaming import LONG_TEXT

BODY = {"model": "cosyvoice-v3-flash", "voice": "longanyang", "text": LONG_TEXT, "stream": True, "format": "pcm"}


def expire_leases(server: Server) -> None:
    """Let the time pass that a dead process' lease still lasts."""
    rows(server, "UPDATE records SET lease_expires_at = '2026-01-01 00:00:00' WHERE status = 'running'")


async def test_a_killed_process_leaves_an_interrupted_record_with_an_estimate(
    tmp_path: Path, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    environment = realtime_sandbox.settings
    with run_backend(tmp_path, environment) as backend:
        account = await create_account(backend)
        with pytest.raises(httpx.TransportError):
            async with account.client.stream("POST", "/api/audio/tts/synthesize", json=BODY) as answer:
                async for _ in answer.aiter_raw():
                    backend.kill()
        expire_leases(backend)
    with run_backend(tmp_path, environment) as restarted:
        account.client.base_url = httpx.URL(restarted.url)
        deadline = time.monotonic() + 10
        while (item := (await account.history())["items"][0])["status"] == "running":
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        assert item["status"] == "interrupted"
        assert item["bill"] == "0.0058"
        assert rows(restarted, "SELECT quantity, estimated FROM bills") == [(408, 1)]


async def test_a_terminated_process_settles_what_is_under_way(
    tmp_path: Path, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    with run_backend(tmp_path, {**realtime_sandbox.settings, "DRAIN_SECONDS": "1"}) as backend:
        account = await create_account(backend)
        with pytest.raises(httpx.TransportError):
            async with account.client.stream("POST", "/api/audio/tts/synthesize", json=BODY) as answer:
                async for _ in answer.aiter_raw():
                    backend.process.terminate()
        started = time.monotonic()
        assert backend.stop() in ENDED_GRACEFULLY
        assert time.monotonic() - started < 10
        assert "Traceback" not in backend.log
        assert "exc_type" not in backend.log
    [call] = realtime_sandbox.calls(account.api_key)
    [(status,)] = rows(backend, "SELECT status FROM records")
    bills = rows(backend, "SELECT quantity, estimated FROM bills")
    assert status == "interrupted"
    assert bills == [(call["characters"], 0)]


async def test_short_work_is_finished_before_the_process_ends(
    tmp_path: Path, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    with run_backend(tmp_path, realtime_sandbox.settings) as backend:
        account = await create_account(backend)
        speaking = asyncio.create_task(account.synthesize("今天天气真好。", format="pcm"))
        await asyncio.sleep(0.3)
        backend.process.terminate()
        answer = await speaking
        assert answer.status_code == 200
        assert await asyncio.to_thread(backend.stop) in ENDED_GRACEFULLY
    assert rows(backend, "SELECT status FROM records") == [("succeeded",)]


async def test_a_plain_call_that_outlasts_the_drain_is_told_billed_and_kept(
    tmp_path: Path, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    with run_backend(tmp_path, {**realtime_sandbox.settings, "DRAIN_SECONDS": "1"}) as backend:
        account = await create_account(backend)
        speaking = asyncio.create_task(account.synthesize(LONG_TEXT * 4, format="pcm"))
        await asyncio.sleep(1.5)
        backend.process.terminate()
        answer = await speaking
        assert (answer.status_code, answer.json()["error"]) == (503, "NOT_READY")
        assert answer.headers["x-request-id"]
        started = time.monotonic()
        assert await asyncio.to_thread(backend.stop) in ENDED_GRACEFULLY
        assert time.monotonic() - started < 12
    [call] = realtime_sandbox.calls(account.api_key)
    assert call["outcome"] == "cancelled"
    [(status, key)] = rows(backend, "SELECT status, output_key FROM records")
    bills = rows(backend, "SELECT quantity, estimated FROM bills")
    assert status == "interrupted"
    assert bills == [(call["characters"], 0)]
    assert (tmp_path / "data" / "media" / key).stat().st_size == call["audio_bytes"]


async def test_a_death_in_the_queue_bills_only_what_was_sent(
    tmp_path: Path, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    environment = {**realtime_sandbox.settings, "UPSTREAM_RATE": "1/minute"}
    with run_backend(tmp_path, environment) as backend:
        account = await create_account(backend)
        calls = [asyncio.create_task(account.synthesize(LONG_TEXT, format="pcm")) for _ in range(4)]
        while not any(call["text"] for call in realtime_sandbox.calls(account.api_key)):
            await asyncio.sleep(0.05)
        backend.kill()
        await asyncio.gather(*calls, return_exceptions=True)
        expire_leases(backend)
    with run_backend(tmp_path, environment) as restarted:
        async with asyncio.timeout(10):
            while rows(restarted, "SELECT 1 FROM records WHERE status != 'interrupted'"):
                await asyncio.sleep(0.1)
        assert rows(restarted, "SELECT quantity, estimated FROM bills") == [(408, 1)]
