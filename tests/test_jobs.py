"""Rounds over rows that are due: how many are worked on at once, when they begin, and what becomes of failures."""

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, ClassVar

import pytest
from sqlalchemy import inspect, update
from structlog.testing import capture_logs

from app.database import Database
from app.errors import AppError, UpstreamError
from app.inflight import InFlight
from app.jobs import CLAIM, FAILED_CHECK_SECONDS, Claimed, Claims, DueRow, Rounds, again_in
from app.models import LongText, User
from app.services.calls import Price
from app.services.records import RecordService

PRICE = Price("character", Decimal("0.0001"), "CNY")
PATIENCE_SECONDS = 10.0
WHILE_SECONDS = 0.3
DONE: dict[str, Any] = {"next_check_at": None}

on_sqlite = pytest.mark.parametrize("schema_url", ["sqlite"], indirect=True)


class Work(Rounds[LongText]):
    """Works on rows until it is let go on."""

    at_once: ClassVar[int] = 4
    per_user: ClassVar[int] = 2

    def __init__(self, rows: Claims[LongText], in_flight: InFlight) -> None:
        super().__init__(rows, in_flight)
        self.troubles: dict[int, Exception] = {}
        self.begun: list[int] = []
        self.given_up: list[int] = []
        self.under_way: Counter[uuid.UUID] = Counter()
        self.most_at_once = 0
        self.most_per_user = 0
        self.may_end = asyncio.Event()

    async def _ask(self, claimed: Claimed[LongText]) -> dict[str, Any]:
        record_id, user_id = claimed.record.id, claimed.row.user_id
        self.begun.append(record_id)
        if record_id in self.troubles:
            raise self.troubles[record_id]
        self.under_way[user_id] += 1
        self.most_at_once = max(self.most_at_once, self.under_way.total())
        self.most_per_user = max(self.most_per_user, self.under_way[user_id])
        try:
            await self.may_end.wait()
        finally:
            self.under_way[user_id] -= 1
        return DONE

    def _is_hopeless(self, claimed: Claimed[LongText]) -> bool:
        return claimed.age > timedelta(days=1)

    async def _give_up(self, claimed: Claimed[LongText], failure: AppError) -> None:
        self.given_up.append(claimed.record.id)


class Desk:
    """Rows of some users, and a process that works on them."""

    def __init__(self, database: Database, users: list[uuid.UUID]) -> None:
        self.database = database
        self.users = users
        self.records = RecordService(database)
        self.claims = Claims(database, LongText)
        self.in_flight = InFlight()
        self.work = Work(self.claims, self.in_flight)

    async def open(self, user: int = 0, due_in: float = -1) -> int:
        """Have something done for a user; gives its record."""
        user_id, due_at = self.users[user], datetime.now(UTC) + timedelta(seconds=due_in)

        def rows(record_id: int) -> list[LongText]:
            owner: dict[str, Any] = {"record_id": record_id, "user_id": user_id}
            return [LongText(**owner, next_check_at=due_at, segments_total=1, output_key="audio/a.mp3")]

        return await self.records.open_job(user_id, "tts", "m", "{}", PRICE, rows)

    async def claim(self, record_id: int) -> Claimed[LongText]:
        """Claim a row that is free."""
        claimed = await self.claims.claim(record_id)
        assert claimed is not None
        return claimed

    async def take_over(self, record_id: int) -> uuid.UUID:
        """Have another process claim a row; gives its token. At one stroke, since the claim may just be renewed."""
        token = uuid.uuid4()
        await self.change(record_id, claimed_by=token, claimed_until=datetime.now(UTC) + CLAIM)
        return token

    async def change(self, record_id: int, **values: Any) -> None:
        """Change a row behind everybody's back."""
        async with self.database.transaction() as session:
            await session.execute(update(LongText).where(LongText.record_id == record_id).values(**values))

    async def row(self, record_id: int) -> LongText:
        """What is known of a row."""
        async with self.database.snapshot() as session:
            return await session.get_one(LongText, record_id)

    async def everything(self, record_id: int) -> dict[str, Any]:
        """All that the database holds of a row, but for how long it is claimed."""
        row = await self.row(record_id)  # a reference of our own: what inspects it holds none
        values = {each.key: each.value for each in inspect(row).attrs}
        del values["claimed_until"]
        return values

    async def is_done(self, *record_ids: int) -> bool:
        """Whether rows are due no more."""
        return all([(await self.row(each)).next_check_at is None for each in record_ids])

    async def waits(self, record_id: int) -> float:
        """The seconds until a row that nobody holds is due again."""
        row = await self.row(record_id)
        assert (row.claimed_by, row.claimed_until) == (None, None)
        assert row.next_check_at is not None
        return (row.next_check_at - datetime.now(UTC)).total_seconds()

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Have the process go its rounds inside the block."""
        running = asyncio.create_task(self.work.run())
        try:
            yield
            assert not running.done()
        finally:
            running.cancel()
            await asyncio.wait([running])


@pytest.fixture
async def desk(schema_url: str) -> AsyncIterator[Desk]:
    """An empty database with users."""
    database = Database(schema_url)
    now = datetime.now(UTC)
    users = [User(username=name, username_key=name, password_hash="-", created_at=now) for name in "abcdef"]
    async with database.transaction() as session:
        session.add_all(users)
    desk = Desk(database, [user.id for user in users])
    with capture_logs():
        yield desk
        desk.work.may_end.set()
        await desk.in_flight.drain(0)
    await database.close()


@pytest.fixture
def quick_renewals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims are renewed all the time."""
    monkeypatch.setattr("app.jobs.CLAIM_RENEWAL_SECONDS", 0.02)


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = PATIENCE_SECONDS) -> None:
    """Wait for something to come true."""
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.01)


async def until_begun(work: Work, record_ids: Collection[int], seconds: float = PATIENCE_SECONDS) -> None:
    """Wait until all of these were begun."""

    async def begun() -> bool:
        return set(record_ids) <= set(work.begun)

    await until(begun, seconds)


# ---- Claims


@pytest.mark.usefixtures("quick_renewals")
async def test_who_loses_his_claim_to_another_is_told_once(desk: Desk) -> None:
    stale = await desk.claim(await desk.open())
    losses: list[str] = []
    async with desk.claims.kept(stale, lambda: losses.append("lost")):
        await asyncio.sleep(0.1)
        assert losses == []
        await desk.take_over(stale.record.id)

        async def lost() -> bool:
            return bool(losses)

        await until(lost)
        await asyncio.sleep(0.1)
    assert losses == ["lost"]


@pytest.mark.usefixtures("quick_renewals")
@pytest.mark.parametrize("changes", [DONE, again_in(0)], ids=["ended", "put back"])
async def test_who_gives_his_claim_back_has_not_lost_it(desk: Desk, changes: dict[str, Any]) -> None:
    claimed = await desk.claim(await desk.open())
    losses: list[str] = []
    async with desk.claims.kept(claimed, lambda: losses.append("lost")):
        await desk.claims.put_back(claimed, changes)
        await asyncio.sleep(WHILE_SECONDS)
    assert losses == []


@on_sqlite
@pytest.mark.usefixtures("quick_renewals")
async def test_work_whose_claim_is_lost_is_broken_off_and_changes_nothing(desk: Desk) -> None:
    record_id = await desk.open()
    checking = desk.work.check(record_id)
    await until_begun(desk.work, [record_id])
    token = await desk.take_over(record_id)
    before = await desk.everything(record_id)
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await checking is None
    assert desk.work.under_way.total() == 0
    assert await desk.everything(record_id) == before
    assert before["claimed_by"] == token


# ---- How many


@on_sqlite
async def test_no_more_is_begun_than_there_is_room_for(desk: Desk) -> None:
    record_ids = [await desk.open(user) for user in range(len(desk.users))]
    assert len(record_ids) > Work.at_once
    async with desk.working():
        await until_begun(desk.work, record_ids[: Work.at_once])
        desk.work.wake()
        await asyncio.sleep(WHILE_SECONDS)
        assert desk.work.begun == record_ids[: Work.at_once]
        desk.work.may_end.set()
        await until_begun(desk.work, record_ids)
        await until(lambda: desk.is_done(*record_ids))
    assert desk.work.most_at_once == Work.at_once
    assert len(desk.work.begun) == len(record_ids)


@on_sqlite
async def test_a_user_with_much_to_do_leaves_room_for_the_others(desk: Desk) -> None:
    many = [await desk.open(0) for _ in range(2 * Work.at_once)]
    one = await desk.open(1)
    async with desk.working():
        await until_begun(desk.work, many[: Work.per_user])
        desk.work.wake()
        await until_begun(desk.work, [one])
        await asyncio.sleep(WHILE_SECONDS)
        assert desk.work.begun == [*many[: Work.per_user], one]
        desk.work.may_end.set()
        await until(lambda: desk.is_done(one, *many))
    assert desk.work.most_per_user == Work.per_user
    assert sorted(desk.work.begun) == [*many, one]


@on_sqlite
async def test_a_row_that_is_about_to_be_claimed_counts_once(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    claim, hold, rounds = desk.claims.claim, asyncio.Event(), 0
    due = desk.claims.due

    async def claim_slowly(record_id: int) -> Claimed[LongText] | None:
        await hold.wait()
        return await claim(record_id)

    async def count(limit: int, without: Collection[uuid.UUID]) -> list[DueRow]:
        nonlocal rounds
        rounds += 1
        return await due(limit, without)

    async def looked_often() -> bool:
        desk.work.wake()
        return rounds > 2 * Work.per_user

    monkeypatch.setattr(desk.claims, "claim", claim_slowly)
    monkeypatch.setattr(desk.claims, "due", count)
    first = await desk.open()
    async with desk.working():
        await until(looked_often)
        hold.set()
        await until_begun(desk.work, [first])
        second = await desk.open()
        desk.work.wake()
        await until_begun(desk.work, [first, second], 1)


@on_sqlite
async def test_who_asks_for_the_same_row_asks_once(desk: Desk) -> None:
    record_id = await desk.open()
    checks = {desk.work.check(record_id) for _ in range(3)}
    assert len(checks) == 1
    desk.work.may_end.set()
    assert await asyncio.gather(*checks) == [None]
    assert desk.work.begun == [record_id]
    assert await desk.work.check(record_id) is None  # it is done
    assert desk.work.begun == [record_id]


# ---- When


@on_sqlite
async def test_a_round_begins_at_once_when_it_is_woken(desk: Desk) -> None:
    async with desk.working():
        await asyncio.sleep(0.1)
        record_id = await desk.open()
        await asyncio.sleep(WHILE_SECONDS)
        assert desk.work.begun == []
        desk.work.wake()
        await until_begun(desk.work, [record_id], 1)


@on_sqlite
async def test_who_is_woken_during_a_round_goes_another(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    due = desk.claims.due
    new: list[int] = []

    async def look_too_early(limit: int, without: Collection[uuid.UUID]) -> list[DueRow]:
        found = await due(limit, without)
        if not new:
            new.append(await desk.open())
            desk.work.wake()
        return found

    async def looked() -> bool:
        return bool(new)

    monkeypatch.setattr(desk.claims, "due", look_too_early)
    async with desk.working():
        await until(looked)
        await until_begun(desk.work, new, 1)
    assert len(new) == 1


@on_sqlite
async def test_a_row_begins_when_it_is_due(desk: Desk) -> None:
    now = await desk.open()
    soon = await desk.open(due_in=0.5)
    later = await desk.open(due_in=60)
    async with desk.working():
        await until_begun(desk.work, [now])
        await asyncio.sleep(0.1)
        assert desk.work.begun == [now]
        await until_begun(desk.work, [soon], 2)
        assert (await desk.row(soon)).next_check_at is not None
    assert later not in desk.work.begun


@on_sqlite
async def test_nothing_is_begun_once_the_process_is_about_to_end(desk: Desk) -> None:
    under_way = await desk.open()
    async with desk.working():
        await until_begun(desk.work, [under_way])
        desk.in_flight.hurry()
        waiting = await desk.open(1)
        desk.work.wake()
        await asyncio.sleep(WHILE_SECONDS)
        desk.work.may_end.set()
        await until(lambda: desk.is_done(under_way))
        desk.work.wake()
        await asyncio.sleep(WHILE_SECONDS)
    assert desk.work.begun == [under_way]
    row = await desk.row(waiting)
    assert (row.claimed_by, row.next_check_at is None) == (None, False)


# ---- Failures


@on_sqlite
@pytest.mark.parametrize("trouble", [ZeroDivisionError("broken"), UpstreamError("失败")], ids=["broken", "refused"])
async def test_a_job_that_fails_is_due_again_and_holds_up_nobody(desk: Desk, trouble: Exception) -> None:
    failing = [await desk.open(0) for _ in range(Work.per_user)]
    other = await desk.open(1)
    desk.work.troubles = dict.fromkeys(failing, trouble)
    desk.work.may_end.set()
    async with desk.working():
        await until(lambda: desk.is_done(other))
        await until_begun(desk.work, failing)

        async def put_back() -> bool:
            return all([(await desk.row(each)).claimed_by is None for each in failing])

        await until(put_back)
        for each in failing:
            assert FAILED_CHECK_SECONDS - 5 < await desk.waits(each) <= FAILED_CHECK_SECONDS
        desk.work.wake()
        await asyncio.sleep(WHILE_SECONDS)
        assert sorted(desk.work.begun) == sorted([*failing, other])
        desk.work.troubles = {}
        for each in failing:
            await desk.change(each, next_check_at=datetime.now(UTC))
        desk.work.wake()
        await until(lambda: desk.is_done(*failing))
    assert sorted(desk.work.begun) == sorted([*failing, *failing, other])
    assert desk.work.given_up == []


# ---- When the database was away


async def test_a_claim_that_ran_out_while_nobody_could_renew_it_is_not_taken_at_once(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, free = await desk.open(), await desk.open()
    await desk.take_over(held)
    await desk.change(held, claimed_until=datetime.now(UTC) - timedelta(seconds=1))
    assert [row.record_id for row in await desk.claims.due(5)] == [held, free]
    monkeypatch.setattr("app.jobs.TRUST_AFTER", timedelta(seconds=0.5))
    desk.claims.doubt_expiry()
    assert [row.record_id for row in await desk.claims.due(5)] == [free]
    assert await desk.claims.claim(held) is None
    await asyncio.sleep(0.6)
    assert await desk.claims.claim(held) is not None


async def test_the_next_claim_to_run_out_is_known(desk: Desk) -> None:
    assert await desk.claims.next_expiry() is None
    first, second = await desk.open(), await desk.open()
    await desk.take_over(second)
    soon = datetime.now(UTC) + timedelta(seconds=3)
    await desk.change(first, claimed_by=uuid.uuid4(), claimed_until=soon)
    assert await desk.claims.next_expiry() == soon
