"""Transcriptions that the provider has taken on although its answer never came: none is lost, none is bought twice."""

import asyncio
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import Account, CreateAccount
from tests.databases import rows
from tests.hearing import (
    FILETRANS,
    PARAFORMER,
    PATIENCE_SECONDS,
    PUBLIC_URL,
    STRANGE_SPEECH,
    TRANSCRIPTION,
    data_of,
    ended,
    look,
    place,
    refusal,
    settled,
    submit,
    tone,
    transcribe,
)
from tests.servers import Sandbox, Server, run_backend

OTHER_URL = "https://media.example.com/other.mp3"


def lost(**fault: Any) -> dict[str, Any]:
    """What `Sandbox.faults` takes to have the next submission answered so."""
    return {"requests": [{"path": TRANSCRIPTION, "count": 1, **fault}]}


def submissions(sandbox: Sandbox, account: Account) -> int:
    """How many submissions the provider saw."""
    return sum(request["path"] == TRANSCRIPTION for request in sandbox.requests(account.api_key))


def bills(server: Server, record_id: int) -> list[tuple[int, int]]:
    """Quantity and whether it is an estimate, of every bill line of a record."""
    return rows(server, "SELECT quantity, estimated FROM bills WHERE record_id = ?", record_id)


def expire_claims(server: Server) -> None:
    """Let the time pass that a dead process' claims still last."""
    rows(
        server,
        "UPDATE submitted_files SET claimed_until = '2026-01-01 00:00:00', next_check_at = '2026-01-01 00:00:00'",
    )


async def test_a_lost_answer_is_made_up_for_while_the_client_waits(
    account: Account, backend: Server, sandbox: Sandbox
) -> None:
    account.client.headers["Idempotency-Key"] = "once"
    with sandbox.faults(**lost(how="close_after")):
        submitted = data_of(await transcribe(account))
    assert submitted["task_status"] == "PENDING"
    repeated = await transcribe(account)
    assert (data_of(repeated), repeated.headers["Idempotency-Replayed"]) == (submitted, "true")
    state = await ended(account, submitted["task_id"], hurried=backend)
    assert (state["task_status"], state["bill"]) == ("SUCCEEDED", "0.0016")
    assert bills(backend, submitted["record_id"]) == [(4, 0)]
    assert submissions(sandbox, account) == 1
    assert rows(backend, "SELECT count(*) FROM submitted_files WHERE record_id = ?", submitted["record_id"]) == [(0,)]


async def test_an_upload_is_known_again(account: Account, backend: Server, sandbox: Sandbox) -> None:
    with sandbox.faults(**lost(how="close_after")):
        submitted = data_of(await transcribe(account, place(backend, tone(2.2)), model=PARAFORMER))
    assert (await ended(account, submitted["task_id"], hurried=backend))["task_status"] == "SUCCEEDED"
    assert submissions(sandbox, account) == 1


async def test_a_killed_process_s_task_is_found_after_its_restart(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    with run_backend(tmp_path, sandbox.settings) as backend:
        accounts = [await create_account(backend) for _ in range(2)]
        calls = []
        with sandbox.faults(requests=[{"path": TRANSCRIPTION, "how": "delay", "seconds": 30}]):
            for account, model in zip(accounts, (FILETRANS, PARAFORMER), strict=True):
                account.client.headers["Idempotency-Key"] = "once"
                calls.append(asyncio.create_task(transcribe(account, model=model)))
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not all(submissions(sandbox, account) for account in accounts):
                    await asyncio.sleep(0.02)
            backend.kill()
            answers = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(answer, httpx.HTTPError) for answer in answers)
        expire_claims(backend)
    with run_backend(tmp_path, sandbox.settings) as restarted:
        for account, model in zip(accounts, (FILETRANS, PARAFORMER), strict=True):
            account.client.base_url = httpx.URL(restarted.url)
            [record] = (await account.history())["items"]
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not bills(restarted, record["id"]):
                    await asyncio.sleep(0.05)
            item = await settled(account, record["id"])
            assert (item["output_text"], item["bill"]) == (STRANGE_SPEECH, "0.0016")
            assert "status" not in item
            repeated = data_of(await transcribe(account, model=model))
            assert repeated["record_id"] == record["id"]
            assert (await look(account, repeated["task_id"]))["task_status"] == "SUCCEEDED"
            assert bills(restarted, record["id"]) == [(4, 0)]
            assert submissions(sandbox, account) == 1
        assert "Traceback" not in restarted.log


async def test_a_colleague_s_task_is_not_taken_for_ours(
    backend: Server, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    colleague = await create_account(backend)
    account = await create_account(backend, api_key=colleague.api_key)
    elsewhere = httpx.post(  # by another program, which uses the same account of the provider
        f"{sandbox.http_url}/services/audio/asr/transcription",
        headers={"Authorization": f"Bearer {account.api_key}", "X-DashScope-Async": "enable"},
        json={"model": FILETRANS, "input": {"file_url": OTHER_URL}},
    )
    assert elsewhere.status_code == 200
    theirs = await submit(colleague)
    with sandbox.faults(**lost(status=200, body='{"output": {"task_status": "PENDING"}}')):
        answer = await transcribe(account)
    assert refusal(answer) == (502, "UPSTREAM_ERROR")
    assert "继续查找" in answer.json()["message"]
    [item] = (await account.history())["items"]
    assert (item["status"], item["bill"], item["error_message"]) == ("failed", "0", answer.json()["message"])
    assert bills(backend, item["id"]) == []
    assert (await ended(colleague, theirs, hurried=backend))["task_status"] == "SUCCEEDED"
    # What the search goes on for turns up at last: submitted late, for the file that was named.
    data_of(await account.client.get(f"/api/audio/records/{item['id']}"))
    found = httpx.post(
        f"{sandbox.http_url}/services/audio/asr/transcription",
        headers={"Authorization": f"Bearer {account.api_key}", "X-DashScope-Async": "enable"},
        json={"model": FILETRANS, "input": {"file_url": PUBLIC_URL}},
    ).json()["output"]["task_id"]
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not bills(backend, item["id"]):
            await asyncio.sleep(0.1)
    record = data_of(await account.client.get(f"/api/audio/records/{item['id']}"))
    assert (record["status"], record["task_id"], record["task_status"]) == ("succeeded", found, "SUCCEEDED")
    assert record["output_text"] == STRANGE_SPEECH
    assert "error_message" not in record
