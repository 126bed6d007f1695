"""An Idempotency-Key holds across processes: several at once, one that stops, and one that died."""

import asyncio
import time
from datetime import UTC, datetime
from pathlib import Path

import httpx

from tests.conftest import Account, CreateAccount
from tests.databases import postgres_url, rows
from tests.hearing import PATIENCE_SECONDS, refusal
from tests.repeating import (
    CLONE,
    NARRATE,
    ORDERS,
    RECOGNIZE,
    SENTENCE,
    SPEAK,
    STREAM,
    TRANSCRIBE,
    Order,
    ask,
    bought,
    is_repeat,
    new_key,
    record_of,
    rows_of,
    told,
    under_way,
)
from tests.servers import ENDED_GRACEFULLY, NO_AUTHORITIES, Sandbox, Server, run_backend
from tests.test_deployments import oss_settings
from tests.test_streaming import LONG_TEXT

AFTER_THE_DEATH = datetime(2026, 1, 1, tzinfo=UTC)


def let_claims_expire(server: Server) -> None:
    """Let the time pass that a dead process' leases and claims still last."""
    for expiry in (
        "UPDATE records SET lease_expires_at = ? WHERE lease_expires_at IS NOT NULL",
        "UPDATE long_texts SET claimed_until = ? WHERE claimed_until IS NOT NULL",
        "UPDATE enrollments SET claimed_until = ? WHERE claimed_until IS NOT NULL",
        "UPDATE submitted_files SET claimed_until = ? WHERE claimed_until IS NOT NULL",
        "UPDATE submitted_files SET next_check_at = ? WHERE next_check_at IS NOT NULL",
        "UPDATE enrollments SET next_check_at = ? WHERE next_check_at IS NOT NULL",
    ):
        rows(server, expiry, AFTER_THE_DEATH)


def estimates(server: Server) -> list[tuple[int, int]]:
    """The quantity of every bill line, and whether it is an estimate."""
    return [(quantity, estimated) for quantity, estimated in rows(server, "SELECT quantity, estimated FROM bills")]


async def test_two_processes_do_it_once(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount, schema_copy: str
) -> None:
    settings = {
        **sandbox.settings,
        "DATABASE_URL": postgres_url(schema_copy),
        "DATA_DIR": str(tmp_path / "shared"),
        "PUBLIC_BASE_URL": "http://127.0.0.1:9",
    }
    with run_backend(tmp_path / "first", settings) as first, run_backend(tmp_path / "second", settings) as second:
        account = await create_account(first)
        async with httpx.AsyncClient(
            base_url=second.url, headers=account.client.headers, timeout=30, trust_env=False, verify=NO_AUTHORITIES
        ) as client:
            elsewhere = Account(client, account.username, account.user_id, account.api_key)
            for order in ORDERS:
                key, before = new_key(), bought(sandbox, account, order.kind)
                answers = await asyncio.gather(*(ask(each, order, key) for each in (account, elsewhere) * 4))
                assert len({record_of(each) for each in answers}) == 1, order.name
                assert all(told(each) == told(answers[0]) for each in answers)
                assert [is_repeat(each) for each in answers].count(False) == 1
                assert bought(sandbox, account, order.kind) == before + 1
            key = new_key()
            ordered = await asyncio.gather(ask(account, SPEAK, key), ask(elsewhere, SPEAK, key, volume=1))
            assert sorted(each.status_code for each in ordered) == [200, 409]
        assert "Traceback" not in first.log + second.log


async def test_a_killed_process_leaves_answers_for_who_asks_again(
    tmp_path: Path, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    settings = {**realtime_sandbox.settings, "UPSTREAM_RATE": "1/minute"}
    orders = (SPEAK, STREAM, NARRATE, RECOGNIZE, TRANSCRIBE, CLONE)
    keys: dict[Order, str] = {order: new_key() for order in orders}
    unsent = new_key()
    late = [{"path": order.bought_at, "how": "delay", "seconds": 60} for order in (RECOGNIZE, TRANSCRIBE)]
    late.append({"path": CLONE.bought_at, "action": "create_voice", "how": "delay", "seconds": 60})
    longer = {SPEAK: LONG_TEXT, STREAM: LONG_TEXT, NARRATE: SENTENCE * 3}
    texts = {order: {"text": text} for order, text in longer.items()}
    accounts: dict[Order, Account] = {}

    async def ask_anew(order: Order) -> httpx.Response:
        return await ask(accounts[order], order, keys[order], **texts.get(order, {}))

    with run_backend(tmp_path, settings) as backend:
        accounts |= {order: await create_account(backend) for order in orders}
        with realtime_sandbox.faults(requests=late):
            first = [asyncio.create_task(ask_anew(order)) for order in orders]
            await asyncio.gather(*(under_way(realtime_sandbox, accounts[order], order) for order in orders))
            first.append(asyncio.create_task(ask(accounts[SPEAK], SPEAK, unsent, text="稍后再说。")))
            async with asyncio.timeout(PATIENCE_SECONDS):
                while len(rows_of(backend, accounts[SPEAK])) < 2:
                    await asyncio.sleep(0.02)
            backend.kill()
            gone = await asyncio.gather(*first, return_exceptions=True)
        assert all(isinstance(each, httpx.TransportError) for each in gone)
    let_claims_expire(backend)
    with run_backend(tmp_path, settings) as restarted:
        for account in accounts.values():
            account.client.base_url = httpx.URL(restarted.url)
        answers = dict(zip(orders, await asyncio.gather(*map(ask_anew, orders)), strict=True))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while answers[TRANSCRIBE].status_code == 503:  # its task is still looked for in the provider's list
                await asyncio.sleep(0.5)
                answers[TRANSCRIBE] = await ask_anew(TRANSCRIBE)
        assert all(map(is_repeat, answers.values()))
        for order in (SPEAK, STREAM, RECOGNIZE):
            assert refusal(answers[order]) == (503, "NOT_READY"), order.name
        for order in (NARRATE, TRANSCRIBE, CLONE):
            assert answers[order].status_code == 200, answers[order].text
        for order in orders:
            again = await ask_anew(order)
            assert (told(again), is_repeat(again)) == (told(answers[order]), True)
            # A text is a job: the try that nobody knows the end of is made again, and the record is the same.
            assert bought(realtime_sandbox, accounts[order], order.kind) == (2 if order is NARRATE else 1), order.name
            assert len(rows_of(restarted, accounts[order])) == (2 if order is SPEAK else 1)
        anew = await ask(accounts[SPEAK], SPEAK, unsent, text="稍后再说。")
        assert (anew.status_code, is_repeat(anew)) == (200, False)
        assert len(realtime_sandbox.voices(accounts[CLONE].api_key)) == 1


async def test_a_death_between_the_speech_and_its_settlement_buys_nothing_twice(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    key = new_key()
    with run_backend(tmp_path, oss_settings(sandbox)) as backend:
        account = await create_account(backend)
        with sandbox.faults(oss={"how": "slow", "seconds": 30, "method": "PUT"}):
            first = asyncio.create_task(ask(account, SPEAK, key))
            async with asyncio.timeout(PATIENCE_SECONDS):
                while [work["ended"] for work in sandbox.ledger(account.api_key)] != ["finished"]:
                    await asyncio.sleep(0.01)
            backend.kill()
            assert isinstance((await asyncio.gather(first, return_exceptions=True))[0], httpx.TransportError)
    let_claims_expire(backend)
    with run_backend(tmp_path, oss_settings(sandbox)) as restarted:
        account.client.base_url = httpx.URL(restarted.url)
        again, at_last = [await ask(account, SPEAK, key) for _ in range(2)]
        assert refusal(again) == (503, "NOT_READY")
        assert told(again) == told(at_last)
        assert is_repeat(again)
        [(_, status, quantity)] = rows_of(restarted, account)
    [work] = sandbox.ledger(account.api_key)
    assert (status, quantity) == ("interrupted", work["counted"])


async def test_a_process_that_stops_keeps_nobody_waiting_and_remembers_what_it_broke_off(
    tmp_path: Path, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    key, settings = new_key(), {**realtime_sandbox.settings, "DRAIN_SECONDS": "2"}
    with run_backend(tmp_path, settings) as backend:
        account = await create_account(backend)
        first = asyncio.create_task(ask(account, SPEAK, key, text=LONG_TEXT))
        await under_way(realtime_sandbox, account, SPEAK)
        repeat = asyncio.create_task(ask(account, SPEAK, key, text=LONG_TEXT))
        await asyncio.sleep(0.7)
        assert not repeat.done()
        terminated_at = time.monotonic()
        backend.process.terminate()
        waited = await repeat
        assert time.monotonic() - terminated_at < 1.8
        assert refusal(waited) == (503, "NOT_READY")
        assert int(waited.headers["retry-after"]) >= 1
        assert not is_repeat(waited)
        assert refusal(await first) == (503, "NOT_READY")
        assert await asyncio.to_thread(backend.stop) in ENDED_GRACEFULLY
        assert "Traceback" not in backend.log
    [(_, status, quantity)] = rows_of(backend, account)
    assert status == "interrupted"
    with run_backend(tmp_path, settings) as restarted:
        account.client.base_url = httpx.URL(restarted.url)
        again = await ask(account, SPEAK, key, text=LONG_TEXT)
        assert refusal(again) == (503, "NOT_READY")
        assert is_repeat(again)
        assert rows_of(restarted, account) == [(1, "interrupted", quantity)]
        assert estimates(restarted) == [(quantity, 0)]
    assert bought(realtime_sandbox, account, "speech") == 1
