"""Transcripts and their bills come in whatever happens: nobody asks, everybody asks, the provider or we stumble."""

import asyncio
import json
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Account, CreateAccount
from tests.databases import rows
from tests.hearing import (
    FILETRANS,
    PARAFORMER,
    PUBLIC_URL,
    STRANGE_SPEECH,
    data_of,
    ended,
    hurry,
    look,
    refusal,
    settled,
    submit,
    transcribe,
)
from tests.servers import Sandbox, Server, run_backend

TASK_SECONDS = 1.0  # of the sandbox
RESULT = {
    "transcripts": [
        {"channel_id": 0, "text": "你好。", "sentences": [{"begin_time": 0, "end_time": 900, "text": "你好。"}]}
    ]
}


def told(task_id: str, status: str = "SUCCEEDED", *, usage: Any = None, **output: Any) -> dict[str, Any]:
    """What `Sandbox.faults` takes to have the provider tell this of one task."""
    answer = {"output": {"task_id": task_id, "task_status": status, **output}, "usage": usage}
    return {"path": f"/api/v1/tasks/{task_id}", "status": 200, "body": json.dumps(answer)}


def told_result(sandbox: Sandbox, task_id: str) -> dict[str, Any]:
    """The same for a task that has its result at `result_path`."""
    return told(task_id, usage={"seconds": 4}, result={"transcription_url": sandbox.url + result_path(task_id)})


def result_path(task_id: str) -> str:
    """Where a result is that no real task has."""
    return f"/dashscope-result-sandbox/{task_id}.json"


def bills(server: Server, task_id: str) -> list[tuple[int, int]]:
    """Quantity and whether it is an estimate, of every bill line of a task."""
    return rows(
        server,
        "SELECT quantity, estimated FROM bills JOIN transcriptions USING (record_id) WHERE task_id = ?",
        task_id,
    )


def expire_claims(server: Server) -> None:
    """Let the time pass that a dead process' claims still last."""
    rows(server, "UPDATE transcriptions SET claimed_until = '2026-01-01 00:00:00'")


def asked(sandbox: Sandbox, account: Account) -> int:
    """How often the provider was asked about tasks."""
    return sum(request["path"].startswith("/api/v1/tasks/") for request in sandbox.requests(account.api_key))


async def test_a_task_that_nobody_asks_for_is_collected(account: Account, backend: Server, sandbox: Sandbox) -> None:
    for submitted in [data_of(await transcribe(account, model=model)) for model in (FILETRANS, PARAFORMER)]:
        item = await settled(account, submitted["record_id"])
        assert "status" not in item
        assert (item["output_text"], item["duration"], item["bill"]) == (STRANGE_SPEECH, 4, "0.0016")
        assert bills(backend, submitted["task_id"]) == [(4, 0)]
    assert asked(sandbox, account) <= 3


async def test_twenty_polls_at_once_make_one_bill(account: Account, backend: Server, sandbox: Sandbox) -> None:
    task_id = await submit(account)
    await asyncio.sleep(TASK_SECONDS + 0.1)
    hurry(backend, task_id)
    states = await asyncio.gather(*(look(account, task_id) for _ in range(20)))
    done = await ended(account, task_id)
    assert [state for state in states if state["task_status"] == "SUCCEEDED"] == [done] * 20
    assert done["bill"] == "0.0016"
    assert bills(backend, task_id) == [(4, 0)]
    assert asked(sandbox, account) == 1


async def test_the_result_outlives_the_task(account: Account, sandbox: Sandbox, backend: Server) -> None:
    task_id = await submit(account)
    done = await ended(account, task_id, hurried=backend)
    with sandbox.faults(requests=[told(task_id, "UNKNOWN")], results={"status": 403}):
        hurry(backend, task_id)
        assert await look(account, task_id) == done
        subtitle = await account.client.get(f"/api/audio/asr/task/{task_id}/subtitle")
        assert STRANGE_SPEECH in subtitle.text.replace("\n", "")


async def test_a_killed_process_collects_after_its_restart(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    with run_backend(tmp_path, sandbox.settings) as backend:
        account = await create_account(backend)
        submitted = [data_of(await transcribe(account, model=model)) for model in (FILETRANS, PARAFORMER)]
        claimed = await submit(account)
        with sandbox.faults(requests=[{"path": f"/api/v1/tasks/{claimed}", "how": "silent"}]):
            hurry(backend, claimed)
            polling = asyncio.create_task(look(account, claimed))
            while not asked(sandbox, account):
                await asyncio.sleep(0.02)
            backend.kill()
            with pytest.raises(httpx.TransportError):
                await polling
    with run_backend(tmp_path, sandbox.settings) as restarted:
        account.client.base_url = httpx.URL(restarted.url)
        for data in submitted:
            assert (await settled(account, data["record_id"]))["output_text"] == STRANGE_SPEECH
            assert bills(restarted, data["task_id"]) == [(4, 0)]
        assert (await look(account, claimed))["task_status"] == "PENDING"
        expire_claims(restarted)
        assert (await ended(account, claimed, hurried=restarted))["bill"] == "0.0016"
        assert bills(restarted, claimed) == [(4, 0)]
        assert "Traceback" not in restarted.log


async def test_two_processes_share_the_work(tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount) -> None:
    shared = {**sandbox.settings, "DATA_DIR": str(tmp_path / "first" / "data")}
    with ExitStack() as running:
        first = running.enter_context(run_backend(tmp_path / "first", shared))
        second = running.enter_context(run_backend(tmp_path / "second", shared))
        account = await create_account(first)
        tasks = []
        for number in range(8):
            account.client.base_url = httpx.URL((first, second)[number % 2].url)
            tasks.append(await submit(account))
        await asyncio.sleep(TASK_SECONDS)
        for task_id in tasks:
            hurry(first, task_id)
        for server in (first, second):
            account.client.base_url = httpx.URL(server.url)
            for state in await asyncio.gather(*(ended(account, task_id) for task_id in tasks)):
                assert (state["task_status"], state["bill"]) == ("SUCCEEDED", "0.0016")
        assert [bills(first, task_id) for task_id in tasks] == [[(4, 0)]] * 8
        assert asked(sandbox, account) <= 2 * len(tasks)
        assert "Traceback" not in first.log + second.log


async def test_a_task_that_the_provider_does_not_know_ends_unknown(
    account: Account, backend: Server, sandbox: Sandbox
) -> None:
    tasks = {"answered": await submit(account), "missing": await submit(account)}
    missing = {"path": f"/api/v1/tasks/{tasks['missing']}", "status": 404, "code": "NotFound", "message": "no task"}
    with sandbox.faults(requests=[told(tasks["answered"], "UNKNOWN"), missing]):
        for task_id in tasks.values():
            state = await ended(account, task_id, hurried=backend)
            assert state.keys() - {"scheduled_time"} == {
                *("task_id", "task_status", "submit_time"),
                *("end_time", "error_message", "bill"),
            }
            assert (state["task_status"], state["bill"]) == ("UNKNOWN", "0")
            assert bills(backend, task_id) == []
    for item in (await account.history())["items"]:
        assert (item["status"], item["bill"]) == ("failed", "0")
        assert "百炼" in item["error_message"]


async def test_a_task_that_is_unknown_for_a_moment_is_not_given_up(
    account: Account, backend: Server, sandbox: Sandbox
) -> None:
    task_id = await submit(account)
    with sandbox.faults(requests=[{**told(task_id, "UNKNOWN"), "count": 2}]):
        assert (await ended(account, task_id, hurried=backend))["task_status"] == "SUCCEEDED"
    assert bills(backend, task_id) == [(4, 0)]


async def test_impatient_polls_do_not_use_up_the_patience(account: Account, backend: Server, sandbox: Sandbox) -> None:
    unknown, unfetched = [await submit(account) for _ in range(2)]
    trouble = [
        told(unknown, "UNKNOWN"),
        told_result(sandbox, unfetched),
        {"path": result_path(unfetched), "status": 503, "body": ""},
    ]
    with sandbox.faults(requests=trouble):
        for task_id in (unknown, unfetched):
            hurry(backend, task_id)
            for _ in range(20):
                assert (await look(account, task_id))["task_status"] in {"PENDING", "RUNNING"}
    for task_id in (unknown, unfetched):
        assert (await ended(account, task_id, hurried=backend))["bill"] == "0.0016"


@pytest.mark.parametrize(
    "struck",
    [
        {"status": 500, "body": "<Error/>", "count": 2},
        {"status": 200, "body": "\x00<html>no JSON</html>", "count": 2},
        {"status": 200, "body": '{"transcripts": "none"}', "count": 1},
        {"how": "close", "count": 2},
    ],
)
async def test_a_result_that_fails_at_first_is_fetched_again(
    account: Account, backend: Server, sandbox: Sandbox, struck: dict[str, Any]
) -> None:
    task_id = await submit(account)
    path = result_path(task_id)
    come_right = {"path": path, "status": 200, "body": json.dumps(RESULT)}
    with sandbox.faults(requests=[told_result(sandbox, task_id), {"path": path, **struck}, come_right]):
        state = await ended(account, task_id, hurried=backend)
    assert (state["task_status"], state["result"]["transcripts"][0]["text"]) == ("SUCCEEDED", "你好。")
    assert bills(backend, task_id) == [(4, 0)]


async def test_a_result_that_stays_garbage_ends_failed_with_the_bill(
    account: Account, backend: Server, sandbox: Sandbox
) -> None:
    garbage = ["", "null", '{"transcripts": [{"sentences": 5}]}', "[" * 100_000]
    tasks = {await submit(account): body for body in garbage}
    telling = [told_result(sandbox, task_id) for task_id in tasks]
    giving = [{"path": result_path(task_id), "status": 200, "body": body} for task_id, body in tasks.items()]
    with sandbox.faults(requests=telling + giving):
        states = await asyncio.gather(*(ended(account, task_id, hurried=backend) for task_id in tasks))
    for state in states:
        task_id = state["task_id"]
        assert (state["task_status"], state["bill"], state["usage"]) == ("FAILED", "0.0016", {"seconds": 4})
        assert state["result"] == {"transcription_url": sandbox.url + result_path(task_id), "transcripts": []}
        assert state["error_message"]
        assert bills(backend, task_id) == [(4, 0)]
        answer = await account.client.get(f"/api/audio/asr/task/{task_id}/subtitle")
        assert refusal(answer) == (409, "NO_TRANSCRIPT")
    for item in (await account.history())["items"]:
        assert (item["status"], item["bill"], item["error_message"]) == ("failed", "0.0016", states[0]["error_message"])


async def test_nothing_is_fetched_from_a_host_that_is_not_the_providers(
    account: Account, backend: Server, sandbox: Sandbox
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        port = listening.getsockname()[1]
        foreign = [
            f"http://127.0.0.1:{port}/result.json",
            f"{sandbox.url}@127.0.0.1:{port}/result.json",
            "file:///etc/passwd",
        ]
        tasks = [await submit(account) for _ in foreign]
        telling = [
            told(task_id, usage={"seconds": 9}, result={"transcription_url": url})
            for task_id, url in zip(tasks, foreign, strict=True)
        ]
        with sandbox.faults(requests=telling):
            states = await asyncio.gather(*(ended(account, task_id, hurried=backend) for task_id in tasks))
        assert [(state["task_status"], state["bill"]) for state in states] == [("FAILED", "0.0036")] * len(tasks)
        assert [bills(backend, task_id) for task_id in tasks] == [[(9, 0)]] * len(tasks)
        with pytest.raises(BlockingIOError):
            listening.accept()


async def test_a_redirect_is_not_followed(account: Account, backend: Server, sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        elsewhere = f"http://127.0.0.1:{listening.getsockname()[1]}/result.json"
        task_id = await submit(account)
        with sandbox.faults(requests=[told_result(sandbox, task_id)], results={"how": "redirect", "url": elsewhere}):
            state = await ended(account, task_id, hurried=backend)
        assert (state["task_status"], state["bill"]) == ("FAILED", "0.0016")
        with pytest.raises(BlockingIOError):
            listening.accept()


async def test_without_a_count_the_length_is_billed_as_an_estimate(
    account: Account, backend: Server, sandbox: Sandbox
) -> None:
    heard, measured = [await submit(account, model=model) for model in (FILETRANS, PARAFORMER)]
    with sandbox.faults(task_queries={"without_usage": True}):
        states = [await ended(account, task_id, hurried=backend) for task_id in (heard, measured)]
    assert [state["task_status"] for state in states] == ["SUCCEEDED"] * 2
    # The end of the last sentence in one kind of result, the length of the file in the other.
    assert [bills(backend, task_id) for task_id in (heard, measured)] == [[(4, 1)], [(4, 1)]]
    assert [state["bill"] for state in states] == ["0.0016"] * 2


async def test_a_task_api_that_stumbles_for_a_while_is_borne(
    account: Account, backend: Server, sandbox: Sandbox
) -> None:
    trouble: list[dict[str, Any]] = [
        {"status": 429, "code": "Throttling.RateQuota", "message": "Requests rate limit exceeded."},
        {"status": 500, "body": "oops"},
        {"how": "close"},
    ]
    tasks = {await submit(account): struck for struck in trouble}
    with sandbox.faults(requests=[{"path": f"/api/v1/tasks/{task_id}", **struck} for task_id, struck in tasks.items()]):
        for task_id in tasks:
            for _ in range(8):
                hurry(backend, task_id)
                assert (await look(account, task_id))["task_status"] == "PENDING"
    for task_id in tasks:
        assert (await ended(account, task_id, hurried=backend))["task_status"] == "SUCCEEDED"
        assert bills(backend, task_id) == [(4, 0)]


async def test_a_key_that_is_away_for_a_while_is_waited_for(account: Account, backend: Server) -> None:
    task_id = await submit(account)
    assert (await account.client.delete("/api/user/apikey")).status_code == 200
    hurry(backend, task_id)
    state = await look(account, task_id)
    assert (state["task_status"], "apikey" in state["error_message"]) == ("PENDING", True)
    [item] = (await account.history())["items"]
    assert item["status"] == "running"
    stored = await account.client.put("/api/user/apikey", json={"api_key": account.api_key})
    assert stored.status_code == 200
    assert (await ended(account, task_id, hurried=backend))["bill"] == "0.0016"
    assert bills(backend, task_id) == [(4, 0)]


async def test_another_account_s_key_does_not_make_the_task_unknown(account: Account, backend: Server) -> None:
    task_id = await submit(account)
    other = await account.client.put("/api/user/apikey", json={"api_key": "sk-of-another-account"})
    assert other.status_code == 200
    for _ in range(8):
        hurry(backend, task_id)
        assert (await look(account, task_id))["task_status"] == "PENDING"
    await account.client.put("/api/user/apikey", json={"api_key": account.api_key})
    assert (await ended(account, task_id, hurried=backend))["task_status"] == "SUCCEEDED"
    assert bills(backend, task_id) == [(4, 0)]


async def test_a_client_that_hangs_up_while_submitting_has_its_task_collected(
    account: Account, sandbox: Sandbox
) -> None:
    slow = {"path": "/api/v1/services/audio/asr/transcription", "how": "delay", "seconds": 0.6}
    with sandbox.faults(requests=[slow]):
        with pytest.raises(httpx.ReadTimeout):
            body = {"model": FILETRANS, "file_url": PUBLIC_URL}
            await account.client.post("/api/audio/asr/transcribe", json=body, timeout=0.3)
        [item] = (await account.history())["items"]
        item = await settled(account, item["id"])
    assert (item["output_text"], item["bill"]) == (STRANGE_SPEECH, "0.0016")
    assert (await account.history())["total"] == 1
