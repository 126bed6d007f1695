"""What people ask for often stays as cheap, however much they have done: told by plans and counts, never by clocks."""

import itertools
import json
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from types import ModuleType
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import event, func, insert, select, text

from app.database import Database
from app.errors import BudgetExceeded
from app.models import Bill, Record, Subtotal, User
from app.services import budgets, milestones
from app.services.budgets import ADDED_UP_AT_ONCE, BudgetService, require_budget
from app.services.erasure import RECORDS_AT_ONCE, at_rest
from app.services.history import LINES_AT_ONCE, HistoryPage, HistoryService
from app.services.milestones import SETTLED_AFTER, STRIDE
from app.services.period import Period
from app.services.selection import HistoryFilter
from app.services.usage import UsageService
from tests.databases import create_database, drop_database, postgres_url, provider, sqlite_schema
from tests.test_usage import add_user, bill_of, record_at

ZONE = ZoneInfo("Asia/Shanghai")
NOW = datetime.now(ZONE).replace(day=20, hour=12)  # a month of which there is enough before and after
TODAY = NOW.date()
MINE, OTHERS, THEIRS = 16_000, 16, 500
APART = timedelta(minutes=2)
RUNNING = 30
KINDS = (("tts", "cosyvoice-v3-flash"), ("tts", "cosyvoice-v3-plus"), ("asr", "qwen3-asr-flash"))
# The instructions of SQLite's machine, counted by so many; there are about six for an entry of an index that is passed.
STEPS_AT_ONCE, STEPS_PER_ENTRY = 50, 8
WANTED = {
    "ix_records_history": HistoryFilter(),
    "ix_records_history_by_type": HistoryFilter(kind="tts"),
    "ix_records_history_by_model": HistoryFilter(kind="asr", model="qwen3-asr-flash"),
}
Ask = Callable[[], Awaitable[object]]


class Large:
    """A database in which one user has done much and others some. It tells what is executed in it, and how."""

    def __init__(self, url: str) -> None:
        self.database = Database(url)
        self.is_sqlite = url.startswith("sqlite")
        self.mine = uuid.uuid4()
        self.steps = 0
        self._executed: list[tuple[str, Any]] = []
        engine = self.database.engine.sync_engine
        event.listen(engine, "before_cursor_execute", lambda *told: self._executed.append((told[2], told[3])))
        if self.is_sqlite:
            event.listen(engine, "connect", self._count_steps)

    def _count_steps(self, connection: Any, _: object) -> None:
        def counted() -> int:
            self.steps += STEPS_AT_ONCE
            return 0

        connection.run_async(lambda driver: driver.set_progress_handler(counted, STEPS_AT_ONCE))

    async def fill(self) -> None:
        """Write all of it down, as it would be after some months."""
        users = [self.mine, *(uuid.uuid4() for _ in range(OTHERS))]
        calls = [(self.mine, number) for number in range(MINE)]
        calls += [(user, number) for user in users[1:] for number in range(THEIRS)]
        records = [
            _row(user, number, id) for id, (user, number) in enumerate(sorted(calls, key=lambda call: -call[1]), 1)
        ]
        async with self.database.transaction() as session:
            people = [{"id": user, "username": "u", "username_key": user.hex, "password_hash": "-"} for user in users]
            made = {"created_at": NOW, "monthly_budget": Decimal(1000)}
            await session.execute(insert(User), [{**each, **made} for each in people])
            await session.execute(insert(Record), records)
            await session.execute(insert(Bill), [_bill(each) for each in records if each["status"] == "succeeded"])
            if self.is_sqlite:
                return
            # The sequence knows nothing of ids that were given.
            await session.execute(text("SELECT setval('records_id_seq', :last)"), {"last": len(records)})
        async with self.database.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            await connection.exec_driver_sql("VACUUM ANALYZE")

    async def statements(self, ask: Ask) -> list[tuple[str, Any]]:
        """What is executed for something, with its parameters."""
        self._executed.clear()
        self.steps = 0
        await ask()
        return [(sql, values) for sql, values in self._executed if not sql.startswith("BEGIN")]

    async def plan(self, statement: tuple[str, Any]) -> list[str]:
        """The steps of SQLite's plan for a statement, or the nodes of PostgreSQL's with the rows that they touched."""
        sql, values = statement
        how = "EXPLAIN QUERY PLAN " if self.is_sqlite else "EXPLAIN (ANALYZE, FORMAT JSON) "
        async with self.database.engine.connect() as connection:
            rows: Sequence[Any] = (await connection.exec_driver_sql(how + sql, values)).all()
        if self.is_sqlite:
            return [row[3] for row in rows]
        told = rows[0][0]
        return [*_nodes((json.loads(told) if isinstance(told, str) else told)[0]["Plan"])]


def _nodes(plan: dict[str, Any]) -> Iterator[str]:
    touched = (plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)) * plan["Actual Loops"]
    index = f" using {plan['Index Name']}" if "Index Name" in plan else ""
    yield f"{plan['Node Type']}{index} on {plan.get('Relation Name')}: {touched:.0f}"
    for child in plan.get("Plans", []):
        yield from _nodes(child)


def touched(plan: list[str], table: str) -> int:
    """How many rows or index entries of a table PostgreSQL looked at."""
    return sum(int(node.rpartition(": ")[2]) for node in plan if f" on {table}: " in node)


def _row(user_id: uuid.UUID, number: int, record_id: int) -> dict[str, Any]:
    """The call of a user that was so many before his last."""
    kind, model = KINDS[number % len(KINDS)]
    return {
        "id": record_id,
        "user_id": user_id,
        "type": kind,
        "model_name": model,
        "status": "running" if number < RUNNING else "succeeded",
        "input_data": "{}",
        "unit": "character",
        "unit_price": Decimal("0.00001"),
        "currency": "CNY",
        "expected_quantity": 0,
        "reserved": Decimal("0.00001"),
        "created_at": NOW - number * APART,
    }


def _bill(record: dict[str, Any]) -> dict[str, Any]:
    same = {name: record[name] for name in ("user_id", "unit", "unit_price", "currency")}
    told = {"record_id": record["id"], "model": record["model_name"], "quantity": 7, "amount": 7 * record["unit_price"]}
    return {**same, **told, "created_at": record["created_at"] + timedelta(seconds=3)}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
async def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Large]:
    """One for all tests of a kind: none of them changes what others look at."""
    name = None
    if request.param == "sqlite":
        file = tmp_path_factory.mktemp("large") / "app.db"
        file.write_bytes(sqlite_schema())
        made = Large(f"sqlite+aiosqlite:///{file}")
    else:
        name = await create_database(provider.template)
        made = Large(postgres_url(name))
    await made.fill()
    yield made
    await made.database.close()
    if name:
        await drop_database(name)


@pytest.fixture(autouse=True)
def _later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the day is: an hour after the last call."""
    for module in (milestones, budgets):
        set_clock(monkeypatch, module, NOW + timedelta(hours=1))


def set_clock(monkeypatch: pytest.MonkeyPatch, module: ModuleType, moment: datetime) -> None:
    """Have it be then, for a module."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return moment.astimezone(tz)

    monkeypatch.setattr(module, "datetime", Clock)


# ---- Plans


@pytest.mark.parametrize("index", WANTED)
@pytest.mark.parametrize("days", [None, 18])
async def test_every_page_is_as_near_as_the_first(large: Large, index: str, days: int | None) -> None:
    wanted = WANTED[index]
    if days:
        period = Period(TODAY - timedelta(days=days), TODAY, ZONE)
        wanted = HistoryFilter(wanted.kind, wanted.model, period)
    history = HistoryService(large.database)
    first = await large.statements(lambda: history.page(large.mine, 1, 20, wanted))
    assert len(first) == 4  # what is known from then on is looked for once
    if large.is_sqlite:
        assert large.steps < 2 * MINE * STEPS_PER_ENTRY
    total = (await history.page(large.mine, 1, 20, wanted)).total
    assert total == expected_total(wanted)
    last, at_first = -(-total // 20), 0
    for page in (1, last // 4, last // 2, last - last // 4, last, last + 1):
        statements = await large.statements(partial(history.page, large.mine, page, 20, wanted))
        assert len(statements) == (2 if page <= last else 1)
        steps = large.steps
        plans = [await large.plan(each) for each in statements]
        if large.is_sqlite:
            at_first = at_first or steps
            assert steps <= at_first + STRIDE // 2 * STEPS_PER_ENTRY < 4 * STRIDE * STEPS_PER_ENTRY, page
            assert all(any(f"SEARCH records USING COVERING INDEX {index} (" in step for step in plan) for plan in plans)
            assert not [step for plan in plans for step in plan if "SCAN" in step and "anon" not in step]
            # Nothing is sorted but the twenty that are shown.
            assert [plan.count("USE TEMP B-TREE FOR ORDER BY") for plan in plans] == [0, 1][: len(plans)]
        else:
            reads = [node for plan in plans for node in plan if " on records: " in node]
            assert all(f"Index Only Scan using {index}" in node or "using pk_records" in node for node in reads), reads
            assert sum(touched(plan, "records") for plan in plans) <= 3 * STRIDE + 20
            assert all(touched(plan, "bills") <= 20 for plan in plans)


def expected_total(wanted: HistoryFilter) -> int:
    """How many of the calls are wanted."""
    numbers = [number for number in range(MINE) if (wanted.kind or KINDS[number % 3][0]) == KINDS[number % 3][0]]
    begins = wanted.period.begins if wanted.period else None
    return sum(begins is None or NOW - number * APART >= begins for number in numbers)


async def test_the_file_is_written_at_the_same_pace_to_its_end(large: Large) -> None:
    history = HistoryService(large.database)
    for wanted in (HistoryFilter(), HistoryFilter(period=Period(TODAY - timedelta(days=20), TODAY, ZONE))):
        paces, number = [], 0
        batches = history.lines(large.mine, wanted)
        async with aclosing(batches):  # type: ignore[type-var]
            while number < 60:
                statements = await large.statements(partial(anext, batches))
                number += 1
                assert len(statements) == 1
                if number in {1, 2, 60}:
                    paces.append((large.steps, await large.plan(statements[0])))
        for steps, plan in paces:
            if large.is_sqlite:
                assert steps < LINES_AT_ONCE * 400
                assert any("SEARCH records USING INDEX ix_records_history (" in step for step in plan)
                assert not any("TEMP B-TREE" in step or step.startswith("SCAN") for step in plan)
            else:
                assert any("Index Scan using ix_records_history on records" in node for node in plan)
                assert touched(plan, "records") <= LINES_AT_ONCE + 1
                assert not any(node.startswith(("Sort", "Incremental Sort")) for node in plan)


async def test_a_day_of_usage_is_found_by_its_index(large: Large) -> None:
    usage = UsageService(large.database)
    yesterday = Period(TODAY - timedelta(days=1), TODAY - timedelta(days=1), ZONE)
    for grouping in ("day", "model", "type"):
        statements = await large.statements(partial(usage.sum_up, large.mine, yesterday, grouping))
        [plan] = [await large.plan(each) for each in statements]
        assert any(f"ix_records_history{end}" in step for step in plan for end in (" (", " on ")), plan
        assert large.is_sqlite or touched(plan, "records") <= 24 * 30


async def test_a_paid_call_adds_up_what_is_new_alone(large: Large) -> None:
    service = BudgetService(large.database, ZONE)
    month = [number for number in range(MINE) if (NOW - number * APART).month == NOW.month]
    assert len(month) > 10 * ADDED_UP_AT_ONCE

    async def require() -> None:
        async with large.database.transaction() as session:
            connection = await session.connection()
            assert await connection.run_sync(require_budget, large.mine, Decimal(1), ZONE)

    await require()
    for ask, times in ((require, 2), (lambda: service.show(large.mine), 2)):
        statements = await large.statements(ask)
        assert len(statements) == times
        steps, plan = large.steps, await large.plan(statements[-1])
        if large.is_sqlite:
            assert steps < ADDED_UP_AT_ONCE * 50
            assert any("SEARCH records USING INDEX ix_records_running (" in step for step in plan), plan
            assert any("SEARCH bills USING INDEX ix_bills_user_id_created_at (" in step for step in plan), plan
            assert not any(step.startswith("SCAN") for step in plan)
        else:
            assert any("using ix_records_running" in node for node in plan), plan
            assert any("using ix_bills_user_id_created_at" in node for node in plan)
            assert touched(plan, "bills") + touched(plan, "records") <= 2 * ADDED_UP_AT_ONCE
    shown = await service.show(large.mine)
    price = Decimal("0.00001")
    assert (shown.spent, shown.reserved) == ((len(month) - RUNNING) * 7 * price, RUNNING * price)


async def test_the_next_records_to_erase_are_not_looked_for_among_all(large: Large) -> None:
    async def look() -> None:
        async with large.database.snapshot() as session:
            await session.execute(at_rest(large.mine, NOW))

    [statement] = await large.statements(look)
    steps, plan = large.steps, await large.plan(statement)
    if large.is_sqlite:
        assert steps < RECORDS_AT_ONCE * 100
        assert any("SEARCH records USING INDEX ix_records_history (" in step for step in plan), plan
    else:
        assert touched(plan, "records") <= RECORDS_AT_ONCE, plan


async def test_a_name_is_looked_up_by_its_own_index(large: Large) -> None:
    named = select(Record.id).where(Record.user_id == large.mine, Record.idempotency_key == "mine")

    async def look() -> None:
        async with large.database.snapshot() as session:
            await session.execute(named.where(Record.created_at <= NOW))

    [statement] = await large.statements(look)
    assert any("uq_records_user_id_idempotency_key" in step for step in await large.plan(statement))


# ---- To the last record and the last digit


@pytest.fixture
async def database(schema_url: str) -> AsyncIterator[Database]:
    """A migrated database of the test's own."""
    database = Database(schema_url)
    yield database
    await database.close()


async def every_page(history: HistoryService, user_id: uuid.UUID, size: int, wanted: HistoryFilter) -> list[int]:
    """All pages put together; each tells the same total, and shows the latest id first."""
    pages: list[HistoryPage] = []
    while not pages or pages[-1].items:
        pages.append(await history.page(user_id, len(pages) + 1, size, wanted))
    for page in pages:
        ids = [call.record.id for call in page.items]
        assert ids == sorted(ids, reverse=True)
        page.items.sort(key=lambda call: (call.record.created_at, call.record.id), reverse=True)
    ids = [call.record.id for page in pages for call in page.items]
    assert {page.total for page in pages} == {len(ids)}
    assert all(len(page.items) == size for page in pages[:-2])
    return ids


async def test_pages_miss_nothing_wherever_milestones_are(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milestones, "STRIDE", 7)
    dice = random.Random(5)
    mine, other = await add_user(database), await add_user(database)
    now, made = NOW, 0
    services = [HistoryService(database) for _ in range(2)]  # as on two machines
    since = Period((NOW + timedelta(hours=2)).date(), None, ZONE)
    filters = [HistoryFilter(), HistoryFilter(kind="asr"), HistoryFilter(model="cosyvoice-v3-flash", period=since)]
    for _ in range(4):
        now += timedelta(hours=5)
        set_clock(monkeypatch, milestones, now)
        async with database.transaction() as session:
            for _ in range(dice.randrange(10, 40)):
                # Many at the same moment, and some that come late: they were dated before others that are here already.
                moment = now - timedelta(minutes=dice.randrange(0, int(SETTLED_AFTER.total_seconds() // 60), 5))
                session.add(record_at(dice.choice([mine, mine, other]), moment, dice.choice(["character", "second"])))
                made += 1
        for wanted in filters:
            newest_first = select(Record.id).where(*wanted.conditions(mine))
            newest_first = newest_first.order_by(Record.created_at.desc(), Record.id.desc())
            async with database.snapshot() as session:
                expected = list(await session.scalars(newest_first))
            for history, size in itertools.product(services, (5, 7, 100)):
                assert await every_page(history, mine, size, wanted) == expected
    assert made > 7 * 8


async def afford(database: Database, user_id: uuid.UUID, cost: Decimal) -> bool:
    return await database.write(lambda connection: require_budget(connection, user_id, cost, ZONE))


async def test_what_was_added_up_before_is_counted_once(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "ADDED_UP_AT_ONCE", 4)
    dice = random.Random(6)
    user_id, service = await add_user(database), BudgetService(database, ZONE)
    await service.set(user_id, Decimal(1000))
    now = NOW
    kept: set[datetime] = set()
    for _ in range(25):
        now += timedelta(hours=dice.randrange(1, 30))
        set_clock(monkeypatch, budgets, now)
        month_began = now.astimezone(ZONE).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        async with database.transaction() as session:
            for _ in range(dice.randrange(6)):
                # Some calls took long: they began in the month before.
                record = record_at(user_id, now - timedelta(minutes=dice.choice([1, 40, 60 * 24 * 9])))
                session.add(record)
                await session.flush()
                bill = bill_of(record, dice.randrange(1, 10**6))
                # Written by now, by a process that dated it a while ago.
                bill.created_at = now - timedelta(minutes=dice.randrange(30))
                session.add(bill)
        everything = select(func.sum(Bill.amount)).join(Record, Record.id == Bill.record_id)
        async with database.snapshot() as session:
            expected = await session.scalar(everything.where(Record.created_at >= month_began)) or Decimal(0)
        if dice.random() < 0.5:
            assert await afford(database, user_id, 1000 - expected)
            with pytest.raises(BudgetExceeded):
                await afford(database, user_id, 1000 - expected + Decimal("1E-12"))
        assert (await service.show(user_id)).spent == expected
        async with database.snapshot() as session:
            kept.update(await session.scalars(select(Subtotal.billed_before)))
    assert len(kept) > 5
    assert (now - NOW) > timedelta(days=12)  # into the next month


def test_no_more_milestones_are_remembered_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milestones, "REMEMBERED_PLACES", 10)
    surveyor = milestones.Surveyor()
    users = [uuid.uuid4() for _ in range(9)]
    for user_id in [*users, users[-1]]:
        surveyor._remember(user_id, HistoryFilter(), [(NOW, number) for number in range(4)], 0.0)
    assert [user_id for user_id, _ in surveyor._known] == users[-2:]
    assert surveyor._places == 8
