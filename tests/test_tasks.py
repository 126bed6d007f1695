"""Open tasks on both databases: who may ask, how they end, and how much trouble is borne until then."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import inspect, select, update
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import undefer
from structlog.testing import capture_logs

from app.dashscope import Credential, TaskReport, TranscriptionClient, digest_result
from app.database import Database
from app.errors import (
    AppError,
    ConnectionLost,
    InvalidApiKey,
    NoApiKey,
    TaskNotFound,
    UpstreamError,
    UpstreamTimeout,
)
from app.inflight import InFlight
from app.jobs import CLAIM, NO_KEY_SECONDS, DueRow
from app.models import ApiKey, Bill, Record, Transcription, User
from app.ratelimit import RateLimiter
from app.services.accounts import AccountService
from app.services.calls import OpenRecord, Price, reopened
from app.services.collection import (
    GONE,
    KEPT,
    LONGEST_INTERVAL_SECONDS,
    UNFIT_BELIEVED,
    UNKNOWN_BELIEVED,
    TaskCollector,
)
from app.services.records import RecordService
from app.services.tasks import ClaimedTask, OpenTasks
from app.services.transcription import TranscriptionService

PRICE = Price("second", Decimal("0.0004"), "CNY")
RESULT = json.dumps(
    {
        "transcripts": [
            {"channel_id": 0, "text": "你好。", "sentences": [{"begin_time": 0, "end_time": 900, "text": "你好。"}]}
        ]
    }
).encode()
URL = "https://result.example.com/result.json"
DONE = TaskReport("SUCCEEDED", result_url=URL, seconds=4)
UNKNOWN = TaskReport("UNKNOWN")
RUNNING = TaskReport("RUNNING")
AWAY = OperationalError("UPDATE", None, Exception("away"))
PATIENCE_SECONDS = 10.0

on_sqlite = pytest.mark.parametrize("schema_url", ["sqlite"], indirect=True)


@pytest.fixture
async def database(schema_url: str) -> AsyncIterator[Database]:
    """An empty database with every table."""
    database = Database(schema_url)
    yield database
    await database.close()


async def somebody(database: Database) -> uuid.UUID:
    """A user whom tasks can belong to."""
    user = User(username="u", username_key=uuid.uuid4().hex, password_hash="-", created_at=datetime.now(UTC))
    async with database.transaction() as session:
        session.add(user)
    return user.id


@pytest.fixture
async def user_id(database: Database) -> uuid.UUID:
    """The first of them."""
    return await somebody(database)


class Keys(AccountService):
    """Everybody's key, or what keeps us from it."""

    def __init__(self) -> None:
        self.given: str | AppError = "sk-own"

    async def credential(self, user_id: uuid.UUID, stored: ApiKey | None = None) -> Credential:
        """The key of anybody."""
        if isinstance(self.given, AppError):
            raise self.given
        return key(self.given)


def key(api_key: str) -> Credential:
    return Credential(api_key, "wss://example.com", "https://example.com")


@dataclass
class Provider(TranscriptionClient):
    """Says of every task what it is told to say."""

    report: TaskReport | Exception = RUNNING
    result: bytes | Exception = RESULT
    silent: bool = False
    asked: int = 0
    stalled: bool = False
    fetched: list[str] = field(default_factory=list)

    async def inspect(self, credential: Credential, task_id: str) -> TaskReport:
        """Tell how a task is doing."""
        self.asked += 1
        while self.silent:
            await asyncio.sleep(3600)
        if isinstance(self.report, Exception):
            raise self.report
        return self.report

    async def fetch(self, credential: Credential, url: str, take: Callable[[bytes], Awaitable[None]]) -> None:
        """Give a result file."""
        self.fetched.append(url)
        while self.stalled:
            await asyncio.sleep(3600)
        if isinstance(self.result, Exception):
            raise self.result
        await take(self.result)


class Desk:
    """Tasks, and a process that looks after them."""

    def __init__(self, database: Database, user_id: uuid.UUID) -> None:
        self.database = database
        self.user_id = user_id
        self.records = RecordService(database)
        self.tasks = OpenTasks(database, self.records)
        self.keys = Keys()
        self.provider = Provider()
        self.in_flight = InFlight()
        self.collector = TaskCollector(
            self.tasks, self.keys, self.records, self.provider, RateLimiter(), self.in_flight
        )

    async def submit(self, *, due_in: float = 0) -> int:
        """Hand a task over; gives its record."""
        now = datetime.now(UTC)
        async with self.records.running(self.user_id, "asr", "paraformer-v2", '{"channel_id": [0]}', PRICE) as record:
            task = Transcription(
                record_id=record.id,
                user_id=self.user_id,
                task_id=f"task-{record.id}",
                key_fingerprint=key("sk-own").fingerprint,
                status="PENDING",
                submitted_at=now,
                checked_at=now,
                next_check_at=now + timedelta(seconds=due_in),
            )
            await self.records.hand_over(record, task)
        return record.id

    async def claim(self, record_id: int) -> ClaimedTask:
        """Claim a task that is free."""
        claimed = await self.tasks.claim(record_id)
        assert claimed is not None
        return claimed

    async def succeed(self, claimed: ClaimedTask, seconds: int = 4) -> None:
        """End a task with its result."""
        record = reopened(claimed)
        record.quantity = seconds
        await self.tasks.succeed(claimed, DONE, digest_result(RESULT), record)

    async def fail(self, claimed: ClaimedTask, seconds: int = 4) -> None:
        """End a task without one."""
        record = reopened(claimed)
        record.quantity = seconds
        await self.tasks.fail(claimed, TaskReport("FAILED"), record, UpstreamError("失败"))

    async def put_back(self, claimed: ClaimedTask) -> None:
        """Leave a task to others."""
        changes = {"status": "RUNNING", "misses": 99, "next_check_at": datetime.now(UTC) + timedelta(hours=1)}
        await self.tasks.put_back(claimed, changes)

    async def change(self, **values: Any) -> None:
        """Change every task behind everybody's back."""
        async with self.database.transaction() as session:
            await session.execute(update(Transcription).values(**values))

    async def expire_claims(self) -> None:
        """Let the time pass that claims last."""
        await self.change(claimed_until=datetime.now(UTC) - timedelta(seconds=1))

    async def grow_old(self, age: timedelta = KEPT + timedelta(minutes=1)) -> None:
        """Let the tasks be this old."""
        async with self.database.transaction() as session:
            await session.execute(update(Record).values(created_at=datetime.now(UTC) - age))

    async def check(self, record_id: int) -> AppError | None:
        """Have the process ask now."""
        return await self.collector.check(record_id)

    async def task(self, record_id: int) -> Transcription:
        """What is known of a task."""
        wanted = select(Transcription).where(Transcription.record_id == record_id)
        everything = undefer(Transcription.transcripts), undefer(Transcription.transcripts_with_words)
        async with self.database.snapshot() as session:
            return (await session.scalars(wanted.options(*everything))).one()

    async def record(self, record_id: int) -> Record:
        """What is known of its record."""
        async with self.database.snapshot() as session:
            return (await session.scalars(select(Record).where(Record.id == record_id))).one()

    async def bills(self, record_id: int) -> list[tuple[int, bool]]:
        """Quantity of every bill line of a record, and whether it is an estimate."""
        wanted = select(Bill).where(Bill.record_id == record_id)
        async with self.database.snapshot() as session:
            return [(bill.quantity, bill.estimated) for bill in await session.scalars(wanted)]

    async def everything(self, record_id: int) -> list[Any]:
        """All that the database holds of a task, to be compared."""
        rows = [await self.task(record_id), await self.record(record_id)]
        values = [{each.key: each.value for each in inspect(row).attrs} for row in rows]
        return [*values, await self.bills(record_id)]

    async def ends(self, record_id: int) -> tuple[str, str, list[tuple[int, bool]]]:
        """How a task has ended: its status, its record's, and the bills."""
        task, record = await self.task(record_id), await self.record(record_id)
        assert (task.next_check_at, task.claimed_by, task.claimed_until) == (None, None, None)
        assert (record.finished_at is None, record.lease_expires_at) == (False, None)
        return task.status, record.status, await self.bills(record_id)

    async def goes_on(self, record_id: int) -> tuple[str, int]:
        """The status of a task that goes on and that nobody holds, and how often it was missed."""
        task = await self.task(record_id)
        assert (task.claimed_by, task.claimed_until, await self.bills(record_id)) == (None, None, [])
        assert task.next_check_at is not None
        assert (await self.record(record_id)).status == "running"
        return task.status, task.misses

    async def waits(self, record_id: int) -> float:
        """The seconds until a task is due again."""
        task = await self.task(record_id)
        assert task.next_check_at is not None
        return (task.next_check_at - datetime.now(UTC)).total_seconds()


@pytest.fixture
async def desk(database: Database, user_id: uuid.UUID, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    """Tasks, and a process that looks after them."""
    monkeypatch.setattr("app.services.collection.QUERY_RATE", "1000/second")
    desk = Desk(database, user_id)
    with capture_logs():  # tracebacks are slow to lay out
        yield desk
        await desk.in_flight.drain(0)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for something to come true."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await condition():
            await asyncio.sleep(0.01)


# ---- Claims


async def test_of_twenty_who_claim_at_once_one_gets_it(desk: Desk) -> None:
    record_id = await desk.submit()
    others = [OpenTasks(desk.database, desk.records) for _ in range(20)]
    [claimed] = [each for each in await asyncio.gather(*(other.claim(record_id) for other in others)) if each]
    task = await desk.task(record_id)
    assert (task.claimed_by, claimed.row.task_id, claimed.record.id) == (claimed.token, task.task_id, record_id)
    assert task.claimed_until is not None
    assert timedelta(0) < task.claimed_until - datetime.now(UTC) <= CLAIM


async def test_a_claim_is_of_one_task_only(desk: Desk) -> None:
    first, second = await desk.submit(), await desk.submit()
    await desk.claim(first)
    assert (await desk.claim(second)).row.record_id == second
    assert await desk.tasks.claim(first + second + 1) is None


async def test_a_claim_runs_out_and_goes_to_another(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.jobs.CLAIM", timedelta(seconds=0.3))
    record_id = await desk.submit()
    first = await desk.claim(record_id)
    assert await desk.tasks.claim(record_id) is None
    assert await desk.tasks.due(10) == []
    await asyncio.sleep(0.35)
    assert [due.record_id for due in await desk.tasks.due(10)] == [record_id]
    second = await desk.claim(record_id)
    assert second.token != first.token
    assert (await desk.task(record_id)).claimed_by == second.token


async def test_a_claim_that_is_given_back_can_be_taken_at_once(desk: Desk) -> None:
    record_id = await desk.submit()
    await desk.put_back(await desk.claim(record_id))
    task = await desk.task(record_id)
    assert (task.status, task.misses, task.claimed_by, task.claimed_until) == ("RUNNING", 99, None, None)
    await desk.claim(record_id)


async def test_who_slept_while_another_took_the_claim_changes_nothing(desk: Desk) -> None:
    for act in (desk.put_back, desk.succeed, desk.fail):
        record_id = await desk.submit()
        stale = await desk.claim(record_id)
        await desk.expire_claims()
        fresh = await desk.claim(record_id)
        before = await desk.everything(record_id)
        await act(stale)
        assert await desk.everything(record_id) == before
        await desk.succeed(fresh, 5)
        assert await desk.ends(record_id) == ("SUCCEEDED", "succeeded", [(5, False)])


async def test_who_slept_until_the_task_had_ended_changes_nothing(desk: Desk) -> None:
    for end in (desk.succeed, desk.fail):
        record_id = await desk.submit()
        stale = await desk.claim(record_id)
        await desk.expire_claims()
        fresh = await desk.claim(record_id)
        await end(fresh, 5)
        before = await desk.everything(record_id)
        assert before[-1] == [(5, False)]
        for act in (desk.put_back, desk.succeed, desk.fail):
            for claimed in (stale, fresh):
                await act(claimed)
                assert await desk.everything(record_id) == before


async def test_two_who_believe_that_it_is_theirs_make_one_end(desk: Desk) -> None:
    record_id = await desk.submit()
    stale = await desk.claim(record_id)
    await desk.expire_claims()
    fresh = await desk.claim(record_id)
    await asyncio.gather(*(desk.succeed(claimed, 5 if claimed is fresh else 9) for claimed in [stale, fresh] * 5))
    assert await desk.ends(record_id) == ("SUCCEEDED", "succeeded", [(5, False)])


async def test_a_claim_is_kept_up_while_the_work_lasts(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.jobs.CLAIM_RENEWAL_SECONDS", 0.02)
    claimed = await desk.claim(await desk.submit())
    record_id = claimed.record.id
    moments = [(await desk.task(record_id)).claimed_until]

    async def renewed() -> bool:
        moments.append((await desk.task(record_id)).claimed_until)
        return len(set(moments)) > 3

    async with desk.tasks.kept(claimed):
        await until(renewed)
    assert all(one is not None and other is not None and one <= other for one, other in pairwise(moments))
    last = (await desk.task(record_id)).claimed_until
    await asyncio.sleep(0.1)
    assert (await desk.task(record_id)).claimed_until == last


async def test_a_claim_is_kept_up_through_a_failing_database(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.jobs.CLAIM_RENEWAL_SECONDS", 0.02)
    claimed = await desk.claim(await desk.submit())
    before = (await desk.task(claimed.record.id)).claimed_until
    failures: list[Exception] = [AWAY, ConnectionRefusedError()]
    pulse = desk.database.pulse

    @asynccontextmanager
    async def stumble() -> AsyncIterator[AsyncSession]:
        if failures:
            raise failures.pop()
        async with pulse() as session:
            yield session

    async def renewed() -> bool:
        return (await desk.task(claimed.record.id)).claimed_until != before

    monkeypatch.setattr(desk.database, "pulse", stumble)
    async with desk.tasks.kept(claimed):
        await until(renewed)
    assert failures == []


async def test_a_claim_that_was_lost_is_not_kept_up(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.jobs.CLAIM_RENEWAL_SECONDS", 0.02)
    taken, ended = await desk.submit(), await desk.submit()
    stale = [await desk.claim(taken), await desk.claim(ended)]
    await desk.expire_claims()
    await desk.claim(taken)
    await desk.succeed(await desk.claim(ended))
    before = [await desk.everything(taken), await desk.everything(ended)]
    async with desk.tasks.kept(stale[0]), desk.tasks.kept(stale[1]):
        await asyncio.sleep(0.2)
    assert [await desk.everything(taken), await desk.everything(ended)] == before


async def test_a_keeper_who_does_not_hear_ends_all_the_same(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.jobs.CLAIM_RENEWAL_SECONDS", 0.01)
    pulse, deaf = desk.database.pulse, 2

    @asynccontextmanager
    async def not_hearing() -> AsyncIterator[AsyncSession]:
        nonlocal deaf
        while deaf:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)
            deaf -= 1
        async with pulse() as session:
            yield session

    claimed = await desk.claim(await desk.submit())
    monkeypatch.setattr(desk.database, "pulse", not_hearing)
    async with asyncio.timeout(10), desk.tasks.kept(claimed):
        await asyncio.sleep(0.1)
    assert deaf == 0


# ---- Which are due


async def test_the_soonest_are_due_first(desk: Desk) -> None:
    third, first, second, last = [await desk.submit(due_in=seconds) for seconds in (30, -20, 0, 90)]
    due = await desk.tasks.due(3)
    assert [each.record_id for each in due] == [first, second, third]
    for each in due:
        assert each.due_at == (await desk.task(each.record_id)).next_check_at
    await desk.claim(first)
    assert [each.record_id for each in await desk.tasks.due(10)] == [second, third, last]
    assert len(await desk.tasks.due(1)) == 1
    assert await desk.tasks.due(10, without={desk.user_id}) == []


async def test_what_has_ended_is_never_due(desk: Desk) -> None:
    for end in (desk.succeed, desk.fail):
        record_id = await desk.submit()
        await end(await desk.claim(record_id))
        assert await desk.tasks.due(10) == []
        assert await desk.tasks.claim(record_id) is None


# ---- Ends


async def test_a_success_is_record_bill_and_transcripts(desk: Desk) -> None:
    record_id = await desk.submit()
    await desk.succeed(await desk.claim(record_id))
    assert await desk.ends(record_id) == ("SUCCEEDED", "succeeded", [(4, False)])
    task = await desk.task(record_id)
    assert json.loads(task.transcripts or "")[0]["text"] == "你好。"
    assert (task.transcripts_with_words, task.result_url) == (None, URL)


async def test_a_success_whose_bill_is_refused_writes_nothing(desk: Desk) -> None:
    record_id = await desk.submit()
    line = {"record_id": record_id, "user_id": desk.user_id, "model": "m", "unit": "second", "quantity": 1}
    money = {"unit_price": PRICE.per_unit, "amount": PRICE.per_unit, "currency": "CNY"}
    async with desk.database.transaction() as session:
        session.add(Bill(**line, **money, created_at=datetime.now(UTC)))
    claimed = await desk.claim(record_id)
    before = await desk.everything(record_id)
    with pytest.raises(IntegrityError):
        await desk.succeed(claimed)
    assert await desk.everything(record_id) == before


async def test_a_success_whose_transcripts_are_refused_writes_nothing(desk: Desk) -> None:
    record_id = await desk.submit()
    claimed = await desk.claim(record_id)
    before = await desk.everything(record_id)
    naive = TaskReport("SUCCEEDED", ended_at=datetime(2026, 1, 1))  # noqa: DTZ001 - no database takes it
    with pytest.raises(Exception, match="without zone"):
        await desk.tasks.succeed(claimed, naive, digest_result(RESULT), OpenRecord(record_id, PRICE, quantity=4))
    assert await desk.everything(record_id) == before


async def test_a_task_whose_record_has_its_end_is_closed_without_a_second_bill(desk: Desk) -> None:
    for end in (desk.succeed, desk.fail):
        record_id = await desk.submit()
        await desk.records.end(OpenRecord(record_id, PRICE, quantity=7, estimated=True), "interrupted", None)
        before = await desk.everything(record_id)
        await end(await desk.claim(record_id))
        assert (await desk.everything(record_id))[1:] == before[1:]
        assert (await desk.ends(record_id))[1:] == ("interrupted", [(7, True)])
        assert await desk.tasks.due(10) == []


async def test_an_id_that_no_database_takes_is_no_task(desk: Desk) -> None:
    nobody: Any = None
    service = TranscriptionService(
        nobody,
        desk.database,
        desk.keys,
        desk.records,
        desk.provider,
        nobody,
        desk.collector,
        desk.in_flight,
        nobody,
        nobody,
    )
    for task_id in ("abc\0def", "\ud800", "任务", ""):
        with pytest.raises(TaskNotFound):
            await service.look(desk.user_id, task_id)


# ---- What is believed


@on_sqlite
async def test_unknown_is_believed_in_the_end(desk: Desk) -> None:
    record_id = await desk.submit()
    desk.provider.report = UNKNOWN
    for misses in range(1, UNKNOWN_BELIEVED):
        assert await desk.check(record_id) is None
        assert await desk.goes_on(record_id) == ("PENDING", misses)
    assert await desk.check(record_id) is None
    assert await desk.ends(record_id) == ("UNKNOWN", "failed", [])
    assert (await desk.record(record_id)).error_message == GONE
    assert desk.provider.asked == UNKNOWN_BELIEVED


@on_sqlite
async def test_unknown_by_another_key_says_nothing_until_the_task_is_gone(desk: Desk) -> None:
    record_id = await desk.submit()
    desk.provider.report, desk.keys.given = UNKNOWN, "sk-of-another-account"
    for _ in range(2 * UNKNOWN_BELIEVED):
        assert await desk.check(record_id) is None
    assert await desk.goes_on(record_id) == ("PENDING", 0)
    desk.keys.given = "sk-own"
    await desk.check(record_id)
    assert await desk.goes_on(record_id) == ("PENDING", 1)
    desk.keys.given = "sk-of-another-account"
    await desk.check(record_id)
    assert await desk.goes_on(record_id) == ("PENDING", 1)
    await desk.grow_old()
    await desk.check(record_id)
    assert await desk.ends(record_id) == ("UNKNOWN", "failed", [])


@on_sqlite
@pytest.mark.parametrize("api_key", [None, "sk-other"], ids=["same key", "another key"])
async def test_trouble_with_the_result_lends_no_weight_to_unknown(desk: Desk, api_key: str | None) -> None:
    record_id = await desk.submit()
    desk.provider.report, desk.provider.result = DONE, ConnectionLost()
    for _ in range(UNKNOWN_BELIEVED):
        await desk.check(record_id)
    desk.provider.report = UNKNOWN
    if api_key:
        desk.keys.given = api_key
    await desk.check(record_id)
    await desk.goes_on(record_id)


@on_sqlite
async def test_trouble_with_the_result_lends_no_weight_to_an_unfit_one(desk: Desk) -> None:
    record_id = await desk.submit()
    desk.provider.report, desk.provider.result = DONE, ConnectionLost()
    for _ in range(UNFIT_BELIEVED):
        await desk.check(record_id)
    desk.provider.result = b"null"
    await desk.check(record_id)
    await desk.goes_on(record_id)


@on_sqlite
async def test_what_the_last_check_learns_is_billed(desk: Desk) -> None:
    record_id = await desk.submit()
    await desk.grow_old()
    desk.provider.report, desk.provider.result = DONE, ConnectionLost()
    await desk.check(record_id)
    assert await desk.ends(record_id) == ("UNKNOWN", "failed", [(4, False)])


@on_sqlite
async def test_a_hand_over_that_is_repeated_after_the_end_changes_nothing(desk: Desk) -> None:
    record_id = await desk.submit()
    await desk.succeed(await desk.claim(record_id))
    before = await desk.everything(record_id)
    now = datetime.now(UTC)
    again = Transcription(
        record_id=record_id,
        user_id=desk.user_id,
        task_id=f"task-{record_id}",
        key_fingerprint="-",
        status="PENDING",
        submitted_at=now,
        checked_at=now,
        next_check_at=now,
    )
    await desk.records.hand_over(OpenRecord(record_id, PRICE), again)
    assert await desk.everything(record_id) == before


@on_sqlite
async def test_one_user_s_slow_results_leave_room_for_the_others(desk: Desk) -> None:
    desk.provider.report, desk.provider.stalled = DONE, True
    slow = [await desk.submit() for _ in range(TaskCollector.per_user + 4)]
    async with collecting(desk):
        async with asyncio.timeout(10):
            while len(desk.provider.fetched) < TaskCollector.per_user:
                await asyncio.sleep(0.01)
        desk.provider.stalled = False
        desk.user_id = await somebody(desk.database)
        quick = await desk.submit()
        async with asyncio.timeout(10):
            while (await desk.task(quick)).status != "SUCCEEDED":
                await asyncio.sleep(0.01)
        assert len(desk.provider.fetched) == TaskCollector.per_user + 1
        assert {(await desk.task(each)).status for each in slow} == {"PENDING"}


@on_sqlite
async def test_unknown_now_and_then_is_not_believed(desk: Desk) -> None:
    record_id = await desk.submit()
    for _ in range(UNKNOWN_BELIEVED):
        for desk.provider.report in (UNKNOWN, RUNNING):
            await desk.check(record_id)
    assert await desk.goes_on(record_id) == ("RUNNING", 0)


@on_sqlite
async def test_what_was_foreseen_is_billed_when_the_task_is_gone(desk: Desk) -> None:
    record_id = await desk.submit()
    desk.provider.report, desk.provider.result = DONE, ConnectionLost()
    await desk.check(record_id)
    await desk.change(misses=0)
    desk.provider.report = UNKNOWN
    for _ in range(UNKNOWN_BELIEVED):
        await desk.check(record_id)
    assert await desk.ends(record_id) == ("UNKNOWN", "failed", [(4, False)])


@on_sqlite
@pytest.mark.parametrize("trouble", [ConnectionLost("挂断"), UpstreamTimeout("沉默")])
async def test_a_result_that_does_not_come_is_waited_for_until_it_is_gone(desk: Desk, trouble: AppError) -> None:
    record_id = await desk.submit()
    desk.provider.report, desk.provider.result = DONE, trouble
    tries = 3 * UNFIT_BELIEVED
    for misses in range(1, tries + 1):
        assert await desk.check(record_id) is None
        assert await desk.goes_on(record_id) == ("RUNNING", misses)
        assert await desk.waits(record_id) <= LONGEST_INTERVAL_SECONDS
    assert desk.provider.fetched == [URL] * tries
    await desk.grow_old()
    assert await desk.check(record_id) is trouble
    assert await desk.ends(record_id) == ("UNKNOWN", "failed", [(4, False)])
    assert trouble.message in ((await desk.record(record_id)).error_message or "")


@on_sqlite
async def test_a_result_that_comes_at_last_is_kept(desk: Desk) -> None:
    record_id = await desk.submit()
    desk.provider.report, desk.provider.result = DONE, ConnectionLost()
    for _ in range(2 * UNFIT_BELIEVED):
        await desk.check(record_id)
    await desk.grow_old()
    desk.provider.result = RESULT
    await desk.check(record_id)
    assert await desk.ends(record_id) == ("SUCCEEDED", "succeeded", [(4, False)])
    assert (await desk.record(record_id)).output_text == "你好。"


@on_sqlite
@pytest.mark.parametrize("result", [b"null", b"[" * 100_000, UpstreamError("转写结果无法下载（HTTP 302）")])
async def test_a_result_that_stays_unfit_ends_failed_with_the_bill(desk: Desk, result: bytes | Exception) -> None:
    record_id = await desk.submit()
    desk.provider.report, desk.provider.result = DONE, result
    for misses in range(1, UNFIT_BELIEVED):
        assert await desk.check(record_id) is None
        assert await desk.goes_on(record_id) == ("RUNNING", misses)
    assert await desk.check(record_id) is None
    assert await desk.ends(record_id) == ("FAILED", "failed", [(4, False)])
    assert "转写结果" in ((await desk.record(record_id)).error_message or "")
    assert (await desk.task(record_id)).transcripts is None


@on_sqlite
async def test_misses_without_number_are_borne(desk: Desk) -> None:
    record_id = await desk.submit()
    await desk.change(misses=5000)
    desk.provider.report, desk.provider.result = DONE, ConnectionLost()
    assert await desk.check(record_id) is None
    assert await desk.goes_on(record_id) == ("RUNNING", 5001)
    assert LONGEST_INTERVAL_SECONDS - 5 < await desk.waits(record_id) <= LONGEST_INTERVAL_SECONDS


@on_sqlite
async def test_misses_make_the_waits_longer(desk: Desk) -> None:
    record_id = await desk.submit()
    desk.provider.report, desk.provider.result = DONE, ConnectionLost()
    waits = []
    for _ in range(4):
        await desk.check(record_id)
        waits.append(await desk.waits(record_id))
    assert all(1.5 * one < other for one, other in pairwise(waits))


@on_sqlite
async def test_what_runs_longer_than_any_task_ends(desk: Desk) -> None:
    record_id = await desk.submit()
    await desk.grow_old(KEPT - timedelta(minutes=1))
    assert await desk.check(record_id) is None
    assert await desk.goes_on(record_id) == ("RUNNING", 0)
    await desk.grow_old()
    assert isinstance(await desk.check(record_id), UpstreamTimeout)
    assert await desk.ends(record_id) == ("UNKNOWN", "failed", [])
    assert "一直没有结束" in ((await desk.record(record_id)).error_message or "")


@on_sqlite
@pytest.mark.parametrize(
    ("trouble", "waits"),
    [
        (ConnectionLost(), 10.0),
        (UpstreamTimeout(), 10.0),
        (InvalidApiKey(), NO_KEY_SECONDS),
        (NoApiKey(), NO_KEY_SECONDS),
    ],
)
async def test_a_task_that_cannot_be_asked_about_waits_until_it_is_gone(
    desk: Desk, trouble: AppError, waits: float
) -> None:
    record_id = await desk.submit()
    if isinstance(trouble, NoApiKey):
        desk.keys.given = trouble
    else:
        desk.provider.report = trouble
    for _ in range(2 * UNFIT_BELIEVED):
        assert await desk.check(record_id) is trouble
    assert await desk.goes_on(record_id) == ("PENDING", 0)
    assert waits - 5 < await desk.waits(record_id) <= waits
    await desk.grow_old()
    assert await desk.check(record_id) is trouble
    assert await desk.ends(record_id) == ("UNKNOWN", "failed", [])
    assert trouble.message in ((await desk.record(record_id)).error_message or "")


@on_sqlite
async def test_a_failure_that_the_provider_tells_is_believed_at_once(desk: Desk) -> None:
    record_id = await desk.submit()
    desk.provider.report = TaskReport("FAILED", code="FILE_TOO_LARGE", message="too large")
    assert await desk.check(record_id) is None
    assert await desk.ends(record_id) == ("FAILED", "failed", [])
    assert desk.provider.fetched == []


# ---- A process in trouble


@asynccontextmanager
async def collecting(desk: Desk) -> AsyncIterator[None]:
    """Have the process look after its tasks by itself inside the block."""
    running = asyncio.create_task(desk.collector.run())
    try:
        yield
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.wait([running])


@on_sqlite
async def test_a_check_that_breaks_is_put_off(desk: Desk) -> None:
    broken = [await desk.submit() for _ in range(3)]
    desk.provider.report = ZeroDivisionError("sk-test-secret")
    async with collecting(desk):

        async def all_asked() -> bool:
            return desk.provider.asked >= len(broken)

        await until(all_asked)
        await asyncio.sleep(0.3)
        assert desk.provider.asked == len(broken)
        for record_id in broken:
            assert await desk.goes_on(record_id) == ("PENDING", 0)
            assert 5 < await desk.waits(record_id) <= 10
        told = await desk.check(broken[0])
        assert (type(told), str(told)) == (AppError, AppError.default_message)
        desk.provider.report = DONE
        await desk.change(next_check_at=datetime.now(UTC))
        desk.collector.wake()

        async def all_ended() -> bool:
            return not await desk.tasks.due(10) and all([await desk.bills(record_id) for record_id in broken])

        await until(all_ended)


@on_sqlite
@pytest.mark.parametrize("writes_before", [0, 1, 2])
async def test_a_database_that_refuses_writes_makes_nobody_spin(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, writes_before: int
) -> None:
    for _ in range(3):
        await desk.submit()
    desk.provider.report = DONE
    transaction, due = desk.database.transaction, desk.tasks.due
    rounds, writes = 0, 0

    @asynccontextmanager
    async def refuse() -> AsyncIterator[AsyncSession]:
        nonlocal writes
        writes += 1
        if writes > writes_before:
            raise AWAY
        async with transaction() as session:
            yield session

    async def count(limit: int, without: Collection[uuid.UUID]) -> list[DueRow]:
        nonlocal rounds
        rounds += 1
        return await due(limit, without)

    monkeypatch.setattr(desk.database, "transaction", refuse)
    monkeypatch.setattr(desk.tasks, "due", count)
    async with collecting(desk):
        await asyncio.sleep(0.5)
    assert 1 <= rounds <= 2
    assert writes <= 4 * 3


@on_sqlite
async def test_a_database_that_refuses_reads_makes_nobody_spin(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = 0

    async def refuse(limit: int, without: Collection[uuid.UUID]) -> list[DueRow]:
        nonlocal rounds
        rounds += 1
        raise AWAY

    monkeypatch.setattr(desk.tasks, "due", refuse)
    async with collecting(desk):
        await asyncio.sleep(0.3)
    assert rounds == 1


@pytest.mark.parametrize("how", ["stopped", "cancelled"])
async def test_a_process_that_ends_gives_its_claims_back(desk: Desk, how: str) -> None:
    record_id = await desk.submit()
    before = await desk.task(record_id)
    desk.provider.silent = True
    checking = desk.collector.check(record_id)

    async def asked() -> bool:
        return desk.provider.asked == 1

    await until(asked)
    assert await desk.tasks.claim(record_id) is None
    if how == "cancelled":
        checking.cancel()
        await asyncio.wait([checking])
        assert checking.cancelled()
    else:
        async with asyncio.timeout(5):
            await desk.in_flight.drain(0)
        assert await checking is None
        assert (await desk.task(record_id)).next_check_at == before.next_check_at
    assert await desk.goes_on(record_id) == ("PENDING", 0)
    await desk.claim(record_id)


@on_sqlite
async def test_a_claim_lasts_as_long_as_the_provider_thinks(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.jobs.CLAIM_RENEWAL_SECONDS", 0.02)
    record_id = await desk.submit()
    desk.provider.silent = True
    desk.collector.check(record_id)

    async def asked() -> bool:
        return desk.provider.asked == 1

    await until(asked)
    before = (await desk.task(record_id)).claimed_until

    async def renewed() -> bool:
        return (await desk.task(record_id)).claimed_until != before

    await until(renewed)
