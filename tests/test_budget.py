"""What users allow themselves: refused before the provider is asked, however many ask at once."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import httpx
import pytest

from app.database import Database
from app.errors import BudgetExceeded
from app.models import LongText, User
from app.services.budgets import BudgetService, require_budget
from app.services.calls import Price
from app.services.records import RecordService
from tests.cloning import CREATE, PUBLIC_SAMPLE
from tests.conftest import PASSWORD, Account, CreateAccount
from tests.databases import postgres_url
from tests.servers import Sandbox, Server, run_backend
from tests.talking import SENTENCE as LIVE_SENTENCE
from tests.talking import provider_calls, record, talking
from tests.test_usage import bill_of, record_at

PATH = "/api/user/budget"
SENTENCE = "你好，欢迎使用语音合成服务！"
COST = (26 * Decimal("0.000014335")).normalize()
ZONE = ZoneInfo("Asia/Shanghai")


async def allow(account: Account, monthly: Decimal | str | int) -> dict[str, Any]:
    """Set a user's budget."""
    answer = await account.client.put(PATH, json={"monthly": str(monthly)})
    assert answer.status_code == 200, answer.text
    data: dict[str, Any] = answer.json()["data"]
    return data


async def budget_of(account: Account) -> dict[str, Any]:
    """A user's budget."""
    data: dict[str, Any] = (await account.client.get(PATH)).json()["data"]
    return data


def told(answers: list[httpx.Response]) -> tuple[int, int]:
    """How many were served, and how many were refused for want of money; there are no others."""
    refused = [answer for answer in answers if answer.status_code == 403]
    assert {answer.json()["error"] for answer in refused} <= {"BUDGET_EXCEEDED"}
    assert {answer.status_code for answer in answers} <= {200, 403}
    return len(answers) - len(refused), len(refused)


# ---- Setting it


async def test_a_budget_is_set_shown_and_removed(account: Account) -> None:
    free = {
        "monthly": None,
        "month": f"{datetime.now(ZONE):%Y-%m}",
        "spent": "0",
        "reserved": "0",
        "remaining": None,
        "currency": "CNY",
    }
    assert await budget_of(account) == free
    assert await allow(account, "10.00") == {**free, "monthly": "10", "remaining": "10"}
    await account.synthesize(SENTENCE)
    left = f"{(10 - COST).normalize():f}"
    assert await budget_of(account) == {**free, "monthly": "10", "spent": "0.00037271", "remaining": left}
    for _ in range(2):
        removed = (await account.client.delete(PATH)).json()["data"]
        assert removed == {**free, "spent": "0.00037271"}
    assert (await account.synthesize(SENTENCE)).status_code == 200


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ('{"monthly": "0"}', "0"),
        ('{"monthly": 0.00}', "0"),
        ('{"monthly": -0.0}', "0"),
        ('{"monthly": 12}', "12"),
        ('{"monthly": 1e2}', "100"),
        ('{"monthly": 0.1}', "0.1"),
        ('{"monthly": 99999999.12345678}', "99999999.12345678"),
        ('{"monthly": "99999999.99999999"}', "99999999.99999999"),
        ('{"monthly": 100000000}', "100000000"),
        ('{"monthly": "0.001118130"}', "0.00111813"),
    ],
)
async def test_an_amount_is_taken_to_its_last_digit(account: Account, body: str, shown: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = await account.client.put(PATH, content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"]["monthly"] == shown
    assert (await budget_of(account))["monthly"] == shown


BAD_AMOUNTS = ['"-1"', "-0.01", '"1e2"', '" 1"', '"１"', '"1."', '""', "true", "null", "[]", "NaN", "Infinity", "1e400"]
BAD_AMOUNTS += ["0.123456789", '"1.0000000000001"', "100000000.00000001", '"100000001"']


@pytest.mark.parametrize("amount", BAD_AMOUNTS)
async def test_what_is_no_amount_is_refused(account: Account, amount: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = await account.client.put(PATH, content=f'{{"monthly": {amount}}}', headers=headers)
    assert (answer.status_code, answer.json()["error"]) == (400, "INVALID_REQUEST")
    assert "monthly" in answer.json()["message"]
    assert (await budget_of(account))["monthly"] is None


@pytest.mark.parametrize("body", ["", "[]", "{}", "{", '{"monthly": 1', f'{{"monthly": {"1" * 5000}}}'])
async def test_what_is_no_body_is_refused(account: Account, body: str) -> None:
    answer = await account.client.put(PATH, content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]) == (400, "INVALID_REQUEST")


# ---- Keeping to it


async def ask_often(accounts: list[Account], times: int = 50) -> list[httpx.Response]:
    """The same sentence many times at once, by several ways in."""
    return await asyncio.gather(*(accounts[n % len(accounts)].synthesize(SENTENCE, format="pcm") for n in range(times)))


async def test_of_fifty_at_once_as_many_are_served_as_there_is_money_for(account: Account, sandbox: Sandbox) -> None:
    await allow(account, 3 * COST)
    answers = await ask_often([account])
    assert told(answers) == (3, 47)
    assert len(sandbox.calls(account.api_key)) == 3
    assert (await account.history())["total"] == 3
    left = await budget_of(account)
    assert (left["spent"], left["reserved"], left["remaining"]) == (f"{(3 * COST).normalize():f}", "0", "0")
    refusal = next(answer for answer in answers if answer.status_code == 403)
    for amount in (3 * COST, COST):
        assert f"{amount.normalize():f} 元" in refusal.json()["message"]
    await allow(account, 4 * COST)
    assert told(await ask_often([account], 3)) == (1, 2)


async def test_two_processes_do_not_spend_the_same_money(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount, schema_copy: str
) -> None:
    shared = {"DATABASE_URL": postgres_url(schema_copy), "DATA_DIR": str(tmp_path / "data")}
    with ExitStack() as stack:
        servers = [
            stack.enter_context(run_backend(tmp_path / name, {**sandbox.settings, **shared})) for name in ("a", "b")
        ]
        first = await create_account(servers[0])
        login = {"username": first.username, "password": PASSWORD}
        token = (await first.client.post("/api/auth/login", json=login)).json()["data"]["access_token"]
        headers = {"Authorization": f"Bearer {token}"}
        async with httpx.AsyncClient(base_url=servers[1].url, headers=headers, timeout=30) as client:
            accounts = [first, Account(client, first.username, first.user_id, first.api_key)]
            await allow(first, 3 * COST)
            assert told(await ask_often(accounts)) == (3, 47)
            assert len(sandbox.calls(first.api_key)) == 3
            assert (await budget_of(accounts[1]))["spent"] == f"{(3 * COST).normalize():f}"


async def test_nothing_allowed_is_nothing_bought_but_what_is_free(account: Account, sandbox: Sandbox) -> None:
    await allow(account, "0")
    long_text = {"model": "cosyvoice-v3-flash", "voice": "longanyang", "text": SENTENCE * 100}
    paid = [
        await account.synthesize(SENTENCE),
        await account.synthesize(SENTENCE, stream=True),
        await account.client.post("/api/audio/tts/synthesize-long", json=long_text),
        await account.client.post(
            "/api/audio/asr/recognize", json={"model": "qwen3-asr-flash", "audio_url": PUBLIC_SAMPLE}
        ),
        await account.client.post(
            "/api/audio/asr/transcribe", json={"model": "qwen3-asr-flash-filetrans", "file_url": PUBLIC_SAMPLE}
        ),
    ]
    assert told(paid) == (0, 5), [answer.text for answer in paid]
    assert sandbox.ledger(account.api_key) == []
    voice = {"audio_url": PUBLIC_SAMPLE, "target_model": "cosyvoice-v3-flash", "prefix": "free"}
    made = await account.client.post(CREATE, json=voice)
    assert made.status_code == 200, made.text
    assert (await account.history())["total"] == 1


async def test_live_text_is_spoken_as_far_as_there_is_money_for(
    backend: Server, account: Account, sandbox: Sandbox
) -> None:
    price = Decimal("0.000014335")
    await allow(account, Decimal("0.0004"))  # two sentences of 13 characters, and not a third one
    async with talking(backend, account) as session:
        await session.say(LIVE_SENTENCE)
        await session.flush()
        await session.hear_some()
        await session.say(LIVE_SENTENCE, LIVE_SENTENCE)
        refusal = await session.refusal()
    assert refusal.brief[:2] == (403, "BUDGET_EXCEEDED")
    [call] = await provider_calls(sandbox, account)
    assert call["text"] in {LIVE_SENTENCE, 2 * LIVE_SENTENCE}
    item = await record(account)
    month = await budget_of(account)
    assert (item["status"], month["reserved"]) == ("failed", "0")
    assert Decimal(month["spent"]) == call["characters"] * price <= 26 * price
    async with talking(backend, account) as session:
        await session.say(LIVE_SENTENCE * 1000)
        assert (await session.refusal()).brief[:2] == (403, "BUDGET_EXCEEDED")
    await provider_calls(sandbox, account)
    await allow(account, 1)
    async with talking(backend, account) as session:
        spoken = await session.speak(LIVE_SENTENCE, LIVE_SENTENCE, LIVE_SENTENCE)
    assert spoken.message["characters"] == 39


# ---- On both databases


PRICE = Price("character", Decimal("0.0000143353"), "CNY")


@pytest.fixture
async def database(schema_url: str) -> AsyncIterator[Database]:
    """A migrated database."""
    database = Database(schema_url)
    yield database
    await database.close()


async def user_with(database: Database, monthly: Decimal | None) -> uuid.UUID:
    """Somebody with a budget."""
    name = uuid.uuid4().hex
    user = User(
        username=name, username_key=name, password_hash="-", monthly_budget=monthly, created_at=datetime.now(UTC)
    )
    async with database.transaction() as session:
        session.add(user)
    return user.id


async def test_calls_that_end_while_others_begin_never_exceed_it_together(database: Database) -> None:
    quantity = 100
    user_id = await user_with(database, 5 * quantity * PRICE.per_unit)
    records = RecordService(database, ZONE)
    refused = 0

    async def call(number: int) -> None:
        nonlocal refused
        await asyncio.sleep(0.003 * (number % 7))
        try:
            async with records.running(user_id, "tts", "m", "{}", PRICE, quantity) as opened:
                await asyncio.sleep(0.002 * (number % 5))
                opened.quantity = quantity
        except BudgetExceeded:
            refused += 1

    await asyncio.gather(*(call(number) for number in range(40)))
    month = await BudgetService(database, ZONE).show(user_id)
    assert (month.spent, month.reserved, refused) == (5 * quantity * PRICE.per_unit, Decimal(0), 35)


async def test_what_is_held_back_grows_and_never_shrinks_while_a_call_goes_on(database: Database) -> None:
    user_id = await user_with(database, 200 * PRICE.per_unit)
    records, budgets = RecordService(database, ZONE), BudgetService(database, ZONE)

    async def held() -> Decimal:
        return (await budgets.show(user_id)).reserved / PRICE.per_unit

    async with records.running(user_id, "tts", "m", "{}", PRICE, 100) as opened:
        for foreseen, expected in ((40, 100), (150, 150), (150, 150)):
            await records.foresee(opened, foreseen)
            assert await held() == expected
        assert await budgets.hold_back(user_id, opened.id, 200 * PRICE.per_unit)
        with pytest.raises(BudgetExceeded):
            await budgets.hold_back(user_id, opened.id, 201 * PRICE.per_unit)
        assert await held() == 200
        await budgets.set(user_id, None)
        assert not await budgets.hold_back(user_id, opened.id, 300 * PRICE.per_unit)
    assert await held() == 0


@pytest.mark.parametrize("schema_url", ["postgresql"], indirect=True)  # SQLite lets one write at a time
async def test_who_settles_does_not_wait_for_who_begins(database: Database) -> None:
    user_id = await user_with(database, Decimal(1))
    records = RecordService(database, ZONE)
    async with records.running(user_id, "tts", "m", "{}", PRICE, 1) as opened, database.transaction() as session:
        await (await session.connection()).run_sync(require_budget, user_id, Decimal(0), ZONE)
        opened.quantity = 1
        async with asyncio.timeout(5):
            assert await records.end(opened, "succeeded", None)


async def test_a_month_begins_in_the_zone_and_counts_the_calls_that_began_in_it(database: Database) -> None:
    user_id = await user_with(database, Decimal(1))
    month_began = datetime.now(ZONE).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    before = month_began.astimezone(UTC) - timedelta(microseconds=1)
    async with database.transaction() as session:
        for moment, quantity, running in ((before, 10_000, 200_000), (month_began, 5, 7)):
            ended, held, text = (record_at(user_id, moment) for _ in range(3))
            held.status = text.status = "running"
            held.reserved = text.reserved = running * ended.unit_price
            session.add_all([ended, held, text])
            await session.flush()
            session.add(bill_of(ended, quantity))
            counted = {"characters": 2 * running, "segments_total": 1, "output_key": "k"}
            session.add(LongText(record_id=text.id, user_id=user_id, **counted))
    month = await BudgetService(database, ZONE).show(user_id)
    price = PRICE.per_unit
    assert (month.spent, month.reserved) == (5 * price, (7 + 14) * price)
    left = 1 - 26 * price
    assert month.remaining == left
    async with database.transaction() as session:
        connection = await session.connection()
        await connection.run_sync(require_budget, user_id, left, ZONE)
        with pytest.raises(BudgetExceeded):
            await connection.run_sync(require_budget, user_id, left + Decimal("1E-12"), ZONE)


async def test_the_largest_budget_is_kept_exactly(database: Database) -> None:
    user_id = await user_with(database, None)
    budgets = BudgetService(database, ZONE)
    for amount in (Decimal(100_000_000), Decimal("99999999.99999999"), Decimal("1E-8")):
        assert (await budgets.set(user_id, amount)).monthly == amount
