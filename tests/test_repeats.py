"""Asking again under the same Idempotency-Key is not ordering again."""

import asyncio
import base64
import json
import os
import uuid
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest
from sqlalchemy import make_url

from app.columns import Money
from app.models import User
from tests.cloning import clone_file, sample
from tests.conftest import Account, CreateAccount
from tests.databases import rows
from tests.hearing import recognize_file, refusal, tone
from tests.repeating import (
    CLONE,
    NARRATE,
    ORDERS,
    OVER_HTTP,
    RECOGNIZE,
    SENTENCE,
    SPEAK,
    STREAM,
    TRANSCRIBE,
    Order,
    ask,
    asked_of,
    bought,
    ended,
    is_repeat,
    new_key,
    record_of,
    rows_of,
    told,
    under_way,
)
from tests.servers import Sandbox, Server
from tests.test_openapi import OPERATIONS
from tests.test_streaming import LONG_TEXT

on_every_route = pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
over_http = pytest.mark.parametrize("order", OVER_HTTP, ids=lambda order: order.name)


def set_budget(server: Server, account: Account, monthly: Decimal) -> None:
    """Allow a user so much a month."""
    column = User.__table__.c.monthly_budget.type
    assert isinstance(column, Money)
    dialect = make_url(server.database_url).get_dialect()()
    stored = column.process_bind_param(monthly, dialect)
    rows(server, "UPDATE users SET monthly_budget = ? WHERE id = ?", stored, uuid.UUID(account.user_id))


# ---- The same answer again


@on_every_route
async def test_the_same_answer_comes_again_even_without_key_and_budget(
    account: Account, backend: Server, sandbox: Sandbox, order: Order
) -> None:
    key = new_key()
    first = await ask(account, order, key)
    again = await ask(account, order, key)
    assert (await account.client.delete("/api/user/apikey")).status_code == 200
    set_budget(backend, account, Decimal(0))
    at_last = await ask(account, order, key)
    assert told(first) == told(again) == told(at_last)
    assert record_of(first) == record_of(again) == record_of(at_last)
    assert [is_repeat(each) for each in (first, again, at_last)] == [False, True, True]
    assert bought(sandbox, account, order.kind) == 1
    assert [record_id for record_id, _, _ in rows_of(backend, account)] == [record_of(first)]


@on_every_route
async def test_twenty_at_once_are_one(account: Account, backend: Server, sandbox: Sandbox, order: Order) -> None:
    key, logged = new_key(), len(backend.log)
    answers = await asyncio.gather(*(ask(account, order, key) for _ in range(20)))
    assert {record_of(each) for each in answers} == {record_of(answers[0])}
    assert all(told(each) == told(answers[0]) for each in answers)
    assert [is_repeat(each) for each in answers].count(False) == 1
    assert bought(sandbox, account, order.kind) == 1
    assert len(rows_of(backend, account)) == 1
    assert "ResourceWarning" not in backend.log[logged:]


async def test_without_a_key_every_request_is_an_order(account: Account, sandbox: Sandbox) -> None:
    answers = [await ask(account, SPEAK, None) for _ in range(2)]
    assert len({record_of(each) for each in answers}) == 2
    assert not any(is_repeat(each) for each in answers)
    assert bought(sandbox, account, "speech") == 2


async def test_a_budget_for_one_call_is_enough_for_its_repeats_at_once(account: Account, backend: Server) -> None:
    set_budget(backend, account, Decimal("0.01"))  # and a call costs 0.0058
    key = new_key()
    answers = await asyncio.gather(*(ask(account, SPEAK, key, text=LONG_TEXT) for _ in range(8)))
    assert len({record_of(each) for each in answers}) == 1
    assert refusal(await ask(account, SPEAK, new_key(), text=LONG_TEXT)) == (403, "BUDGET_EXCEEDED")


async def test_a_repeat_of_what_is_under_way_waits_for_it(
    realtime_backend: Server, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(realtime_backend)
    keys = {order: new_key() for order in (SPEAK, STREAM, NARRATE)}
    firsts = {order: asyncio.create_task(ask(account, order, key)) for order, key in keys.items()}
    async with asyncio.timeout(10):
        while bought(realtime_sandbox, account, "speech") < len(keys):
            await asyncio.sleep(0.02)
    repeats = {order: asyncio.create_task(ask(account, order, key)) for order, key in keys.items()}
    background = await ask(account, NARRATE, new_key(), **{"async": True})
    assert not any(each.done() for each in (*firsts.values(), *repeats.values()))
    assert told(background)["status"] == "running"
    for order in keys:
        first, again = await firsts[order], await repeats[order]
        assert (told(first), record_of(first)) == (told(again), record_of(again))
        assert (is_repeat(first), is_repeat(again)) == (False, True)
    assert bought(realtime_sandbox, account, "speech") == len(keys) + 1


async def test_a_repeat_whose_client_leaves_waits_no_longer(
    realtime_backend: Server, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account, orders = await create_account(realtime_backend), (SPEAK, STREAM, *OVER_HTTP)
    keys: dict[Order, str] = {order: new_key() for order in orders}
    late = [{"path": order.bought_at, "how": "delay", "seconds": 2} for order in OVER_HTTP]
    with realtime_sandbox.faults(requests=late):
        firsts = [asyncio.create_task(ask(account, order, keys[order])) for order in orders]
        async with asyncio.timeout(10):
            while len(rows_of(realtime_backend, account)) < len(orders):
                await asyncio.sleep(0.02)
        account.client.timeout = httpx.Timeout(0.4)
        gone = await asyncio.gather(*(ask(account, order, keys[order]) for order in orders), return_exceptions=True)
        account.client.timeout = httpx.Timeout(30)
        assert all(isinstance(each, httpx.ReadTimeout) for each in gone)
        records = [record_of(each) for each in await asyncio.gather(*firsts)]
    await asyncio.sleep(0.6)
    lines = [json.loads(line) for line in realtime_backend.log.splitlines() if '"request_repeated"' in line]
    assert not {line["record_id"] for line in lines} & set(records)


async def test_a_background_text_is_begun_once(account: Account, sandbox: Sandbox) -> None:
    key = new_key()
    first, again = [await ask(account, NARRATE, key, **{"async": True}) for _ in range(2)]
    assert told(first) == told(again) == {"record_id": record_of(first), "segments": 1, "status": "running"}
    assert is_repeat(again)
    assert refusal(await ask(account, NARRATE, key)) == (409, "IDEMPOTENCY_CONFLICT")
    await under_way(sandbox, account, NARRATE)
    assert bought(sandbox, account, "speech") == 1


# ---- Streams


async def test_a_named_stream_is_spoken_to_its_end_although_its_client_leaves(
    realtime_backend: Server, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account, key = await create_account(realtime_backend), new_key()
    heard = b""
    async with account.client.stream("POST", STREAM.path, json=STREAM.body, headers={"Idempotency-Key": key}) as answer:
        async for chunk in answer.aiter_raw():
            heard = chunk
            break
    whole = await ask(account, STREAM, key)
    [call] = realtime_sandbox.calls(account.api_key)
    assert (call["outcome"], call["audio_bytes"]) == ("finished", len(whole.content))
    assert len(heard) < len(whole.content)
    assert whole.content.startswith(heard)
    [item] = (await account.history())["items"]
    assert int(whole.headers["x-record-id"]) == int(answer.headers["x-record-id"]) == item["id"]
    assert "status" not in item
    assert is_repeat(whole)


async def test_a_replayed_stream_is_the_file_that_was_stored(account: Account) -> None:
    key = new_key()
    first, again = [await ask(account, STREAM, key, format="wav", text=LONG_TEXT) for _ in range(2)]
    [item] = (await account.history())["items"]
    assert again.content == (await account.client.get(item["output_url"])).content
    assert again.content[44:] == first.content[44:]
    assert again.headers["content-type"] == first.headers["content-type"] == "audio/wav"
    assert again.headers["cache-control"] == "no-store"


async def test_a_replay_of_what_is_gone_from_the_store_is_an_error(account: Account, backend: Server) -> None:
    key = new_key()
    await ask(account, STREAM, key)
    for file in (backend.folder / "data" / "media").rglob("*.pcm"):
        file.unlink()
    assert refusal(await ask(account, STREAM, key)) == (404, "NOT_FOUND")


# ---- What failed


@pytest.mark.parametrize("order", [SPEAK, STREAM, NARRATE], ids=lambda order: order.name)
async def test_what_the_provider_refuses_frees_its_key(
    account: Account, backend: Server, sandbox: Sandbox, order: Order
) -> None:
    key, unfit = new_key(), {"model": "cosyvoice-v3-plus", "voice": "longyingjing_v3"}
    first, again = [await ask(account, order, key, **unfit) for _ in range(2)]
    assert refusal(first) == refusal(again) == (400, "INVALID_VOICE")
    assert not is_repeat(first)
    assert not is_repeat(again)
    assert asked_of(sandbox, account, order) == 2
    assert record_of(await ask(account, order, key))
    assert len(rows_of(backend, account)) == 3


async def test_a_throttled_call_frees_its_key(account: Account, sandbox: Sandbox) -> None:
    key = new_key()
    with sandbox.faults(throttle_tasks=-1):
        assert refusal(await ask(account, SPEAK, key)) == (429, "RATE_LIMITED")
    answer = await ask(account, SPEAK, key)
    assert record_of(answer)
    assert not is_repeat(answer)


@over_http
async def test_a_refused_request_frees_its_key(account: Account, sandbox: Sandbox, order: Order) -> None:
    key = new_key()
    fault = {"path": order.bought_at, "action": "create_voice" if order is CLONE else None, "count": 1}
    with sandbox.faults(requests=[{**fault, "status": 400, "code": "InvalidParameter"}]):
        assert (await ask(account, order, key)).status_code == 502
    answer = await ask(account, order, key)
    assert record_of(answer)
    assert not is_repeat(answer)
    assert bought(sandbox, account, order.kind) == 1


@on_every_route
async def test_a_call_without_api_key_is_tried_anew_once_there_is_one(
    backend: Server, create_account: CreateAccount, order: Order
) -> None:
    account, key = await create_account(backend, api_key=None), new_key()
    assert refusal(await ask(account, order, key)) == (403, "NO_API_KEY")
    stored = await account.client.put("/api/user/apikey", json={"api_key": f"sk-test-{new_key()}"})
    assert stored.status_code == 200
    answer = await ask(account, order, key)
    assert record_of(answer)
    assert not is_repeat(answer)


@pytest.mark.parametrize("how", ["close", "fail"])
@pytest.mark.parametrize("frames", [2, 60])  # before and after the first count is told
async def test_speech_that_broke_after_work_fails_the_same_again(
    account: Account, backend: Server, sandbox: Sandbox, how: str, frames: int
) -> None:
    key = new_key()
    with sandbox.faults(break_tasks=1, break_after_frames=frames, break_how=how):
        first = await ask(account, SPEAK, key, text=LONG_TEXT)
    again, at_last = [await ask(account, SPEAK, key, text=LONG_TEXT) for _ in range(2)]
    assert refusal(first) == refusal(again) == (502, "UPSTREAM_ERROR")
    assert told(again) == told(at_last)
    assert [is_repeat(each) for each in (first, again, at_last)] == [False, True, True]
    assert bought(sandbox, account, "speech") == 1
    [(_, status, quantity)] = rows_of(backend, account)
    assert (status, bool(quantity)) == ("failed", frames == 60)


async def test_a_stream_that_broke_after_work_fails_as_json_when_asked_again(
    account: Account, sandbox: Sandbox
) -> None:
    key = new_key()
    with sandbox.faults(break_tasks=1, break_after_frames=2), pytest.raises(httpx.RemoteProtocolError):
        await ask(account, STREAM, key, text=LONG_TEXT)
    again = await ask(account, STREAM, key, text=LONG_TEXT)
    assert refusal(again) == (502, "UPSTREAM_ERROR")
    assert is_repeat(again)
    assert bought(sandbox, account, "speech") == 1


@over_http
async def test_a_call_that_may_have_worked_fails_the_same_again(
    account: Account, sandbox: Sandbox, order: Order
) -> None:
    key = new_key()
    fault = {"path": order.bought_at, "action": "create_voice" if order is CLONE else None, "count": 1}
    with sandbox.faults(requests=[{**fault, "status": 500}]):
        first = await ask(account, order, key)
    again = await ask(account, order, key)
    assert first.status_code == 502
    assert told(first) == told(again)
    assert (is_repeat(first), is_repeat(again)) == (False, True)
    assert asked_of(sandbox, account, order) == 1


async def test_a_cancelled_text_is_cancelled_for_who_asks_again(
    realtime_backend: Server, realtime_sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account, key = await create_account(realtime_backend), new_key()
    first = asyncio.create_task(ask(account, NARRATE, key, text=LONG_TEXT))
    await under_way(realtime_sandbox, account, NARRATE)
    [(record_id, _, _)] = rows_of(realtime_backend, account)
    assert (await account.client.post(f"/api/audio/records/{record_id}/cancel")).status_code == 200
    again = await ask(account, NARRATE, key, text=LONG_TEXT)
    assert refusal(await first) == refusal(again) == (409, "CANCELLED")
    assert is_repeat(again)
    assert bought(realtime_sandbox, account, "speech") == 1


async def test_a_voice_whose_answer_was_lost_is_not_made_again(account: Account, sandbox: Sandbox) -> None:
    key, lost = new_key(), {"path": CLONE.bought_at, "action": "create_voice", "how": "close_after", "count": 1}
    with sandbox.faults(requests=[lost]):
        answers = await asyncio.gather(*(ask(account, CLONE, key) for _ in range(2)))
        answers.append(await ask(account, CLONE, key))
    [voice] = sandbox.voices(account.api_key)
    assert {told(each)["voice_id"] for each in answers} == {voice["voice_id"]}
    assert sorted(is_repeat(each) for each in answers) == [False, True, True]
    assert asked_of(sandbox, account, CLONE) == 1


# ---- What is the same request


@pytest.mark.parametrize(
    ("order", "changes"),
    [
        (SPEAK, {"text": "明天见。"}),
        (SPEAK, {"volume": 51}),
        (SPEAK, {"stream": True}),
        (STREAM, {"stream": False}),
        (NARRATE, {"subtitle": "srt"}),
        (RECOGNIZE, {"enable_itn": True}),
        (TRANSCRIBE, {"channel_id": [0, 1]}),
        (CLONE, {"prefix": "other"}),
    ],
)
async def test_another_request_under_the_same_key_is_refused(
    account: Account, sandbox: Sandbox, order: Order, changes: dict[str, Any]
) -> None:
    key = new_key()
    first = await ask(account, order, key)
    assert refusal(await ask(account, order, key, **changes)) == (409, "IDEMPOTENCY_CONFLICT")
    assert record_of(await ask(account, order, key)) == record_of(first)
    assert bought(sandbox, account, order.kind) == 1


async def test_another_route_under_the_same_key_is_refused(account: Account, backend: Server) -> None:
    key = new_key()
    first = record_of(await ask(account, SPEAK, key))
    for order in (NARRATE, RECOGNIZE, TRANSCRIBE, CLONE):
        assert refusal(await ask(account, order, key)) == (409, "IDEMPOTENCY_CONFLICT"), order.name
    assert [record_id for record_id, _, _ in rows_of(backend, account)] == [first]


@pytest.mark.parametrize("order", [SPEAK, RECOGNIZE], ids=lambda order: order.name)
async def test_a_request_is_the_same_however_it_is_written(account: Account, order: Order) -> None:
    key = new_key()
    first = await ask(account, order, key)
    fields = dict(reversed(order.body.items())) | ({"speech_rate": 1, "stream": False} if order is SPEAK else {})
    headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
    written = json.dumps(fields, indent=4, ensure_ascii=True)
    again = await account.client.post(order.path, content=written, headers=headers)
    assert told(first) == told(again)
    assert is_repeat(again)


async def test_a_file_is_the_same_under_any_name_and_in_any_wrapping(account: Account, sandbox: Sandbox) -> None:
    key, audio = new_key(), tone(2)
    account.client.headers["Idempotency-Key"] = key
    first = await recognize_file(account, audio, "one.wav")
    renamed = await recognize_file(account, audio, "two.wav")
    inline = await ask(account, Order("", RECOGNIZE.path, {"model": RECOGNIZE.body["model"]}, ""), key,
                       audio_base64=base64.b64encode(audio).decode())  # fmt: skip
    assert told(first) == told(renamed) == told(inline)
    assert [is_repeat(each) for each in (first, renamed, inline)] == [False, True, True]
    assert refusal(await recognize_file(account, tone(3), "one.wav")) == (409, "IDEMPOTENCY_CONFLICT")
    assert bought(sandbox, account, "recognition") == 1


async def test_a_sample_is_the_same_under_any_name(account: Account, sandbox: Sandbox) -> None:
    account.client.headers["Idempotency-Key"] = new_key()
    first, again = [await clone_file(account, name=name) for name in ("one.wav", "two.wav")]
    assert told(first) == told(again)
    assert is_repeat(again)
    assert refusal(await clone_file(account, sample(7.0))) == (409, "IDEMPOTENCY_CONFLICT")
    assert len(sandbox.voices(account.api_key)) == 1


async def test_a_key_is_its_users_own(backend: Server, sandbox: Sandbox, create_account: CreateAccount) -> None:
    key, accounts = new_key(), [await create_account(backend) for _ in range(2)]
    answers = await asyncio.gather(*(ask(each, SPEAK, key) for each in accounts))
    assert len({record_of(each) for each in answers}) == 2
    assert not any(is_repeat(each) for each in answers)
    assert [bought(sandbox, each, "speech") for each in accounts] == [1, 1]


async def test_a_key_is_free_again_after_a_day(account: Account, backend: Server, sandbox: Sandbox) -> None:
    key = new_key()
    first = record_of(await ask(account, SPEAK, key))
    for age, is_same in ((timedelta(hours=23, minutes=59), True), (timedelta(hours=24, seconds=1), False)):
        rows(backend, "UPDATE records SET created_at = ? WHERE id = ?", datetime.now(UTC) - age, first)
        answer = await ask(account, SPEAK, key, text=SENTENCE if is_same else "明天见。")
        assert (record_of(answer) == first, is_repeat(answer)) == (is_same, is_same)
    assert record_of(await ask(account, SPEAK, key, text="明天见。")) == record_of(answer)
    assert bought(sandbox, account, "speech") == 2


@on_every_route
async def test_a_key_that_is_none_is_refused(account: Account, backend: Server, order: Order) -> None:
    for key in (b"", b"x" * 256, "名".encode(), b"\xe9", b"a\tb"):
        answer = await account.client.post(order.path, json=order.body, headers={b"Idempotency-Key": key})
        assert refusal(answer) == (400, "INVALID_REQUEST"), key
        assert "Idempotency-Key" in answer.json()["message"]
    assert rows_of(backend, account) == []


@pytest.mark.parametrize("key", ["x", "~" * 255, "a b!\"'\\"])
async def test_a_key_of_any_printable_characters_is_taken(account: Account, key: str) -> None:
    first, again = [await ask(account, SPEAK, key) for _ in range(2)]
    assert record_of(first) == record_of(again)


# ---- What is held, and what is told


async def test_no_file_stays_open_after_a_repeat(account: Account, backend: Server) -> None:
    """The server treats a file that is left to the garbage collector as an error, and says so in its log."""
    logged = len(backend.log)
    audio, voice = tone(11, rate=48000, channels="tt"), tone(12, rate=48000)
    assert min(len(audio), len(voice)) > 1024 * 1024  # which no spool keeps in memory
    for send, content in ((recognize_file, audio), (clone_file, voice)):
        account.client.headers["Idempotency-Key"] = new_key()
        answers = await asyncio.gather(*(send(account, content) for _ in range(3)))
        assert len({record_of(each) for each in answers}) == 1
        assert refusal(await send(account, sample())) == (409, "IDEMPOTENCY_CONFLICT")
    await ended(backend, account, 2)
    folder = f"/proc/{backend.process.pid}/fd"
    async with asyncio.timeout(5):
        while any("(deleted)" in os.readlink(f"{folder}/{number}") for number in os.listdir(folder)):
            await asyncio.sleep(0.05)
    assert "ResourceWarning" not in backend.log[logged:]


async def test_browsers_may_send_the_key_and_see_the_mark(account: Account) -> None:
    wanted = {"Origin": "https://app.example.com", "Access-Control-Request-Method": "POST"}
    allowed = await account.client.options(
        SPEAK.path, headers={**wanted, "Access-Control-Request-Headers": "idempotency-key"}
    )
    assert allowed.status_code == 200
    assert "idempotency-key" in allowed.headers["access-control-allow-headers"].lower()
    answer = await account.client.get("/health/live", headers={"Origin": wanted["Origin"]})
    assert "Idempotency-Replayed" in answer.headers["access-control-expose-headers"]


@pytest.mark.parametrize("path", sorted({order.path for order in ORDERS}))
def test_the_header_and_its_refusal_are_documented(path: str) -> None:
    operation = OPERATIONS[f"POST {path}"]
    [header] = [each for each in operation["parameters"] if each["in"] == "header"]
    assert (header["name"], header["required"]) == ("Idempotency-Key", False)
    assert "409" in operation["responses"]
