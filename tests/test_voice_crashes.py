"""What becomes of a voice that is being made when our process goes away."""

import asyncio
import time
import uuid
from pathlib import Path

import httpx

from tests.cloning import asked, clone, clone_file, fault, hurry, sample_of, samples_of, struck
from tests.conftest import Account, CreateAccount
from tests.databases import rows
from tests.hearing import PATIENCE_SECONDS, data_of
from tests.servers import ENDED_GRACEFULLY, Sandbox, Server, run_backend


async def record_of(server: Server, account: Account, *, ends: str) -> tuple[int, str | None]:
    """An account's only record once it has ended so, and its voice."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        [(record_id, status, voice_id)] = rows(
            server,
            "SELECT id, records.status, voice_id FROM records LEFT JOIN enrollments ON record_id = id"
            " WHERE records.user_id = ?",
            uuid.UUID(account.user_id),
        )
        if status == ends:
            return record_id, voice_id
        assert time.monotonic() < deadline, status
        await asyncio.sleep(0.05)


async def test_a_killed_process_finds_its_voices_after_its_restart(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    with run_backend(tmp_path, sandbox.settings) as backend:
        accepted, unasked, followed = [await create_account(backend) for _ in range(3)]
        with sandbox.faults(
            requests=[
                *fault("create_voice", how="delay", seconds=30, count=1)["requests"],
                {"path": "/api/v1/uploads", "how": "silent"},
            ]
        ):
            # A URL needs no upload.
            calls = [asyncio.create_task(clone(accepted)), asyncio.create_task(clone_file(unasked))]
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not sandbox.voices(accepted.api_key) or not samples_of(backend):
                    await asyncio.sleep(0.02)
            made = data_of(await clone(followed))
            backend.kill()
            assert all(
                isinstance(each, httpx.HTTPError) for each in await asyncio.gather(*calls, return_exceptions=True)
            )
    accepted_id, unasked_id = [(await record_of(backend, each, ends="running"))[0] for each in (accepted, unasked)]
    # Let the time pass that a dead process' claims still last, and that an order without a trace is waited for.
    for record_id in (accepted_id, unasked_id, made["record_id"]):
        hurry(backend, record_id)
    rows(backend, "UPDATE enrollments SET lost_at = '2026-01-01 00:00:00.000000' WHERE record_id = ?", unasked_id)
    with run_backend(tmp_path, sandbox.settings) as restarted:
        [voice] = sandbox.voices(accepted.api_key)
        assert await record_of(restarted, accepted, ends="succeeded") == (accepted_id, voice["voice_id"])
        assert await record_of(restarted, unasked, ends="failed") == (unasked_id, None)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while set(rows(restarted, "SELECT voice_id, status FROM enrollments WHERE voice_id IS NOT NULL")) != {
                (voice["voice_id"], "OK"),
                (made["voice_id"], "OK"),
            }:
                await asyncio.sleep(0.05)
        assert [len(asked(sandbox, each, "create_voice")) for each in (accepted, unasked, followed)] == [1, 0, 1]
        accepted.client.base_url = httpx.URL(restarted.url)
        [item] = (await accepted.history())["items"]
        assert (item["voice_id"], item["status"], item["bill"]) == (voice["voice_id"], "OK", "0")
        data_of(await accepted.client.delete(f"/api/audio/voice/{voice['voice_id']}"))  # what is due is removed at once
        async with asyncio.timeout(PATIENCE_SECONDS):
            while samples_of(restarted):
                await asyncio.sleep(0.05)
        assert "Traceback" not in restarted.log


async def test_a_process_that_is_asked_to_end_brings_its_voices_to_safety(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    settings = {**sandbox.settings, "UPSTREAM_TIMEOUT": "1", "DRAIN_SECONDS": "2"}
    with run_backend(tmp_path, settings) as backend:
        quick, slow, waiting = [await create_account(backend) for _ in range(3)]
        with sandbox.faults(**fault("create_voice", how="late", seconds=10, count=1)):
            late = asyncio.create_task(clone_file(slow))
            await struck(sandbox, slow, "create_voice")
        with sandbox.faults(**fault("create_voice", how="delay", seconds=0.5, count=1)):
            soon = asyncio.create_task(clone_file(quick))
            await struck(sandbox, quick, "create_voice")
            [voice] = sandbox.add_voices(waiting.api_key, status="DEPLOYING")
            looking = asyncio.create_task(waiting.client.get(f"/api/audio/voice/{voice}", params={"wait": 300}))
            await asyncio.sleep(0.1)
            backend.process.terminate()
            answers = await asyncio.gather(soon, late, looking, return_exceptions=True)
        assert isinstance(answers[0], httpx.Response)
        assert answers[0].status_code == 200
        for answer in answers[1:]:
            told = answer.status_code if isinstance(answer, httpx.Response) else type(answer)
            assert told in {200, 503, 504, httpx.RemoteProtocolError, httpx.ReadError}
        started = time.monotonic()
        assert await asyncio.to_thread(backend.stop) in ENDED_GRACEFULLY
        assert time.monotonic() - started < 12
        assert "Traceback" not in backend.log
    [soon_voice] = sandbox.voices(quick.api_key)
    assert (await record_of(backend, quick, ends="succeeded"))[1] == soon_voice["voice_id"]
    record_id, _ = await record_of(backend, slow, ends="running")
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (late_voices := sandbox.voices(slow.api_key)):
            await asyncio.sleep(0.1)
    hurry(backend, record_id)
    with run_backend(tmp_path, settings) as restarted:
        assert await record_of(restarted, slow, ends="succeeded") == (record_id, late_voices[0]["voice_id"])
        assert sample_of(restarted, slow) is not None
        assert len(asked(sandbox, slow, "create_voice")) == 1
