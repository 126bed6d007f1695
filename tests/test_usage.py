"""What a user's calls counted and cost, summed up: exact on both databases, by the days of a zone."""

import asyncio
import itertools
import random
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from app.database import Database
from app.models import Bill, LongText, Record, User
from app.services.history import HistoryService, RecordedCall
from app.services.period import Period, begin_of
from app.services.selection import HistoryFilter
from app.services.usage import Consumption, Grouping, UsageService, total_of
from tests.conftest import Account
from tests.narrating import begin, padded, record_of
from tests.servers import Sandbox

SHANGHAI, BERLIN, AZORES = map(ZoneInfo, ("Asia/Shanghai", "Europe/Berlin", "Atlantic/Azores"))
PRICES = {"character": Decimal("0.0000143353"), "second": Decimal("0.00022")}
AUTUMN = date(2026, 10, 25)  # when the clocks go back in Europe
SPRING = date(2026, 3, 29)


@pytest.fixture
async def database(schema_url: str) -> AsyncIterator[Database]:
    """A migrated database."""
    database = Database(schema_url)
    yield database
    await database.close()


async def add_user(database: Database) -> uuid.UUID:
    """Somebody whom records can belong to."""
    user = User(username="u", username_key=uuid.uuid4().hex, password_hash="-", created_at=datetime.now(UTC))
    async with database.transaction() as session:
        session.add(user)
    return user.id


def record_at(user_id: uuid.UUID, moment: datetime, unit: str = "character", **fields: Any) -> Record:
    """A record that was opened then."""
    kind, model = ("tts", "cosyvoice-v3-flash") if unit == "character" else ("asr", "qwen3-asr-flash")
    told = {"type": kind, "model_name": model, "status": "succeeded", "input_data": "{}", "expected_quantity": 0}
    price = {"unit": unit, "unit_price": PRICES[unit], "currency": "CNY"}
    return Record(user_id=user_id, created_at=moment, **{**told, **price, **fields})


def bill_of(record: Record, quantity: int, *, estimated: bool = False) -> Bill:
    """Its bill, as it is settled."""
    return Bill(
        record_id=record.id,
        user_id=record.user_id,
        model=record.model_name,
        unit=record.unit,
        quantity=quantity,
        unit_price=record.unit_price,
        amount=quantity * record.unit_price,
        currency="CNY",
        estimated=estimated,
        created_at=record.created_at + timedelta(days=1),
    )


async def fill(database: Database, user_id: uuid.UUID, moments: list[datetime]) -> None:
    """Calls of every sort at these moments: billed, by estimate too, free, and long texts under way."""
    dice = random.Random(7)
    records: dict[str, list[Record]] = {"billed": [], "free": [], "running": []}
    for moment in moments:
        sort = dice.choice(["billed"] * 4 + ["free", "running"])
        record = record_at(user_id, moment, "character" if sort == "running" else dice.choice([*PRICES]))
        record.status = "running" if sort == "running" else "succeeded"
        records[sort].append(record)
    async with database.transaction() as session:
        session.add_all(itertools.chain.from_iterable(records.values()))
        await session.flush()
        for record in records["billed"]:
            session.add(bill_of(record, dice.randrange(1, 10**7), estimated=dice.random() < 0.3))
        for record in records["running"]:
            counted, guessed = dice.randrange(5000), dice.choice([0, 7])
            text = {"record_id": record.id, "user_id": user_id, "segments_total": 3, "output_key": "k"}
            session.add(LongText(**text, characters=counted, guessed=guessed))


def summed(calls: list[RecordedCall]) -> Consumption:
    """What the history shows of these calls, added up one by one."""

    def counted(unit: str) -> int:
        return sum(call.quantity for call in calls if call.record.unit == unit)

    guessed = sum((call.amount for call in calls if call.is_estimated), Decimal(0))
    amount = sum((call.amount for call in calls), Decimal(0))
    return Consumption(len(calls), counted("character"), counted("second"), amount, guessed)


@pytest.mark.parametrize("zone", [SHANGHAI, BERLIN, AZORES], ids=str)
@pytest.mark.parametrize("change", [AUTUMN, SPRING], ids=str)
async def test_the_sums_are_those_of_the_history(database: Database, zone: ZoneInfo, change: date) -> None:
    first, last = change - timedelta(days=4), change + timedelta(days=3)
    period = Period(first, last, zone)
    edges = [begin_of(first + timedelta(days=number), zone) for number in range(-1, 10)]
    tick = timedelta(microseconds=1)
    moments = [moment for edge in edges for moment in (edge - tick, edge, edge + tick)]
    moments += [edges[0] + timedelta(minutes=37 * number) for number in range(350)]
    users = [await add_user(database) for _ in range(2)]
    for user in users:
        await fill(database, user, moments)
    shown = await HistoryService(database).page(users[0], 1, 10_000)
    calls = [call for call in shown.items if first <= call.record.created_at.astimezone(zone).date() <= last]
    usage = UsageService(database)
    keys: dict[Grouping, Any] = {
        "day": lambda record: record.created_at.astimezone(zone).date().isoformat(),
        "model": lambda record: record.model_name,
        "type": lambda record: record.type,
    }
    for grouping, key in keys.items():
        groups = await usage.sum_up(users[0], period, grouping)
        expected = {name: summed([each for each in calls if key(each.record) == name]) for name in groups}
        assert groups == expected
        assert total_of(groups.values()) == summed(calls)
        order = sorted(groups) if grouping == "day" else sorted(groups, key=lambda name: -groups[name].amount)
        assert [*groups] == order
    filtered = await HistoryService(database).page(users[0], 1, 10_000, HistoryFilter(period=period))
    assert {call.record.id for call in filtered.items} == {call.record.id for call in calls}
    assert filtered.total == len(calls) < shown.total


def test_days_have_as_many_hours_as_their_zone_gives_them() -> None:
    def hours(day: date, zone: ZoneInfo) -> float:
        period = Period(day, day, zone)
        assert period.begins is not None
        assert period.ends is not None
        return (period.ends - period.begins) / timedelta(hours=1)

    assert [hours(AUTUMN, BERLIN), hours(SPRING, BERLIN), hours(AUTUMN, SHANGHAI)] == [25, 23, 24]
    assert [hours(AUTUMN, AZORES), hours(SPRING, AZORES)] == [25, 23]


async def test_a_user_without_calls_has_used_nothing(database: Database) -> None:
    period = Period(AUTUMN, AUTUMN + timedelta(days=365), SHANGHAI)
    assert await UsageService(database).sum_up(await add_user(database), period, "day") == {}


# ---- As clients see it


async def usage_of(account: Account, **query: str) -> dict[str, Any]:
    """The user's usage as the API shows it."""
    answer = await account.client.get("/api/audio/usage", params=query)
    assert answer.status_code == 200, answer.text
    data: dict[str, Any] = answer.json()["data"]
    return data


async def test_the_month_until_today_is_shown_by_day(account: Account) -> None:
    for text in ("你好", "hello"):
        await account.synthesize(text)
    today = datetime.now(SHANGHAI).date()
    total = {"calls": 2, "characters": 9, "seconds": 0, "bill": "0.0001", "estimated_amount": "0"}
    shown = await usage_of(account)
    assert shown == {
        "from": today.replace(day=1).isoformat(),
        "to": today.isoformat(),
        "group_by": "day",
        "currency": "CNY",
        "total": {**total, "amount": shown["total"]["amount"]},
        "groups": [{"key": today.isoformat(), **shown["total"]}],
    }
    items = (await account.history())["items"]
    exact = [(await record_of(account, item["id"]))["usage"]["amount"] for item in items]
    assert Decimal(shown["total"]["amount"]) == sum(map(Decimal, exact))
    assert [group["key"] for group in (await usage_of(account, group_by="type"))["groups"]] == ["tts"]
    assert [group["key"] for group in (await usage_of(account, group_by="model"))["groups"]] == ["cosyvoice-v3-flash"]
    yesterday = (today - timedelta(days=1)).isoformat()
    before = await usage_of(account, **{"from": yesterday, "to": yesterday})
    nothing = {"calls": 0, "characters": 0, "seconds": 0, "bill": "0", "amount": "0", "estimated_amount": "0"}
    assert (before["groups"], before["total"]) == ([], nothing)


async def test_a_long_text_under_way_counts_with_its_cost_so_far(account: Account, sandbox: Sandbox) -> None:
    record_id = await begin(account, padded(3), format="mp3")
    async with asyncio.timeout(30):
        while (await record_of(account, record_id))["status"] == "running":
            progress = (await record_of(account, record_id))["progress"]
            total = (await usage_of(account))["total"]
            later = (await record_of(account, record_id))["progress"]
            assert progress["characters"] <= total["characters"] <= later["characters"]
    counted = sum(call["counted"] for call in sandbox.ledger(account.api_key))
    assert (await usage_of(account))["total"]["characters"] == counted > 0


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ({"from": "2026-11-31"}, "from"),
        ({"from": "2026-1-1"}, "from"),
        ({"from": "20261101"}, "from"),
        ({"from": "2026-W01-1"}, "from"),
        ({"from": ""}, "from"),
        ({"from": "0001-01-01"}, "from"),
        ({"to": "9999-12-31"}, "to"),
        ({"to": "1764547200"}, "to"),
        ({"from": "2026-11-02", "to": "2026-11-01"}, "from"),
        ({"from": "2025-11-01", "to": "2026-11-02"}, "366"),
        ({"group_by": "week"}, "group_by"),
    ],
)
async def test_what_is_no_period_is_refused(account: Account, query: dict[str, str], told: str) -> None:
    paths = ["/api/audio/usage", *([] if "group_by" in query else ["/api/audio/history", "/api/audio/history.csv"])]
    for path in paths:
        answer = await account.client.get(path, params=query)
        assert (answer.status_code, answer.json()["error"]) == (400, "INVALID_REQUEST")
        assert told in answer.json()["message"]


async def test_a_leap_year_and_one_day_alone_are_periods(account: Account) -> None:
    for query in ({"from": "2028-01-01", "to": "2028-12-31"}, {"from": "2026-11-01", "to": "2026-11-01"}):
        assert (await usage_of(account, **query))["total"]["calls"] == 0
