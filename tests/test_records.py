"""Records and bills on both databases: one end, one bill, exact sums."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession

from app.database import Database
from app.errors import NotReady, Throttled
from app.models import Bill, Record, Transcription, User
from app.routers.presentation import show_amount
from app.services.calls import OpenRecord, Price, Status
from app.services.history import HistoryService
from app.services.records import RecordService

PRICE = Price("character", Decimal("0.0000286706"), "CNY")


@pytest.fixture
async def database(schema_url: str) -> AsyncIterator[Database]:
    """A migrated database."""
    database = Database(schema_url)
    yield database
    await database.close()


@pytest.fixture
async def user_id(database: Database) -> uuid.UUID:
    """Somebody whom records can belong to."""
    user = User(username="u", username_key=uuid.uuid4().hex, password_hash="-", created_at=datetime.now(UTC))
    async with database.transaction() as session:
        session.add(user)
    return user.id


async def run(records: RecordService, user_id: uuid.UUID, quantity: int, error: BaseException | None = None) -> int:
    """Run one record to its end."""
    async with records.running(user_id, "tts", "cosyvoice-v3-plus", "{}", PRICE) as record:
        record.quantity = quantity
        if error is not None:
            raise error
    return record.id


async def only_record(database: Database) -> tuple[Record, Bill | None]:
    async with database.snapshot() as session:
        query = select(Record, Bill).outerjoin(Bill, Bill.record_id == Record.id)
        record, bill = (await session.execute(query)).one()
    return record, bill


async def test_a_block_that_ends_well_succeeds_with_an_exact_bill(database: Database, user_id: uuid.UUID) -> None:
    await run(RecordService(database), user_id, 5001)
    record, bill = await only_record(database)
    assert (record.status, record.error, record.lease_expires_at) == ("succeeded", None, None)
    assert bill is not None
    assert (bill.quantity, bill.unit_price, bill.amount) == (5001, PRICE.per_unit, PRICE.per_unit * 5001)
    assert (bill.currency, bill.estimated, bill.model) == ("CNY", False, "cosyvoice-v3-plus")
    assert record.created_at.utcoffset() == timedelta(0)


async def test_a_known_failure_is_recorded_and_what_was_counted_is_billed(
    database: Database, user_id: uuid.UUID
) -> None:
    with pytest.raises(Throttled):
        await run(RecordService(database), user_id, 7, Throttled())
    record, bill = await only_record(database)
    assert (record.status, record.error, record.error_message) == ("failed", "RATE_LIMITED", "百炼平台限流，请稍后重试")
    assert bill is not None
    assert bill.quantity == 7


async def test_an_unknown_failure_tells_nothing_of_itself(database: Database, user_id: uuid.UUID) -> None:
    with pytest.raises(ZeroDivisionError):
        await run(RecordService(database), user_id, 0, ZeroDivisionError("sk-test-secret"))
    record, bill = await only_record(database)
    assert (record.status, record.error) == ("failed", "INTERNAL_ERROR")
    assert "secret" not in (record.error_message or "")
    assert bill is None


async def test_a_cancelled_block_is_settled_as_interrupted(database: Database, user_id: uuid.UUID) -> None:
    records = RecordService(database)
    opened = asyncio.Event()

    async def wait_for_ever() -> None:
        async with records.running(user_id, "tts", "m", "{}", PRICE) as record:
            record.quantity = 3
            opened.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(wait_for_ever())
    await opened.wait()
    for _ in range(5):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    record, bill = await only_record(database)
    assert record.status == "interrupted"
    assert bill is not None
    assert (bill.quantity, bill.estimated) == (3, False)


async def test_two_processes_cannot_settle_one_record_twice(database: Database, user_id: uuid.UUID) -> None:
    services = [RecordService(database) for _ in range(4)]
    record_id = await services[0]._open(user_id, "tts", "m", "{}", PRICE)
    await asyncio.gather(
        *(
            each._settle(OpenRecord(record_id, PRICE, quantity=number + 1), "succeeded", None)
            for number, each in enumerate(services)
        )
    )
    async with database.snapshot() as session:
        assert await session.scalar(select(func.count()).select_from(Bill)) == 1


async def test_a_second_bill_for_a_record_is_impossible(database: Database, user_id: uuid.UUID) -> None:
    await run(RecordService(database), user_id, 1)
    record, _ = await only_record(database)
    line = {"record_id": record.id, "user_id": user_id, "model": "m", "unit": "character", "quantity": 1}
    money = {"unit_price": PRICE.per_unit, "amount": PRICE.per_unit, "currency": "CNY"}
    with pytest.raises(IntegrityError):
        async with database.transaction() as session:
            session.add(Bill(**line, **money, created_at=datetime.now(UTC)))


async def test_records_of_a_dead_process_are_interrupted_with_an_estimate(
    database: Database, user_id: uuid.UUID
) -> None:
    dead, living = RecordService(database), RecordService(database)
    orphan = await dead._open(user_id, "tts", "m", "{}", PRICE)
    other = await living._open(user_id, "tts", "m", "{}", PRICE)
    for record_id in (orphan, other):
        await living.foresee(OpenRecord(record_id, PRICE), 42)
    assert await living.settle_orphans() == 0
    async with database.transaction() as session:
        await session.execute(update(Record).values(lease_expires_at=datetime.now(UTC) - timedelta(seconds=1)))
    await living._renew_leases()
    assert await living.settle_orphans() == 1
    async with database.snapshot() as session:
        statuses = {record.id: record.status for record in await session.scalars(select(Record))}
        [bill] = await session.scalars(select(Bill))
    assert statuses == {orphan: "interrupted", other: "running"}
    assert (bill.record_id, bill.quantity, bill.estimated) == (orphan, 42, True)


async def test_a_record_whose_owner_lives_after_all_is_not_swept(database: Database, user_id: uuid.UUID) -> None:
    owner, sweeper = RecordService(database), RecordService(database)
    record = OpenRecord(await owner._open(user_id, "tts", "m", "{}", PRICE), PRICE, quantity=7)
    expired = Record.lease_expires_at < datetime.now(UTC)
    assert not await sweeper.end(OpenRecord(record.id, PRICE, quantity=100), "interrupted", None, provided=expired)
    await owner._settle(record, "succeeded", None)
    settled, bill = await only_record(database)
    assert settled.status == "succeeded"
    assert bill is not None
    assert (bill.quantity, bill.estimated) == (7, False)


async def test_nothing_is_bought_for_a_record_that_others_have_ended(database: Database, user_id: uuid.UUID) -> None:
    frozen = RecordService(database)
    record = await opened(frozen, user_id)
    await expire_leases(database)
    assert await RecordService(database).settle_orphans() == 1
    with pytest.raises(NotReady):
        await frozen.foresee(record, 42)
    assert not record.is_sent
    kept, bill = await only_record(database)
    assert (kept.status, kept.expected_quantity, kept.sent_at, bill) == ("interrupted", 0, None, None)


async def test_who_is_about_to_buy_is_not_taken_for_dead_any_more(database: Database, user_id: uuid.UUID) -> None:
    slow, sweeper = RecordService(database), RecordService(database)
    record = await opened(slow, user_id)
    await expire_leases(database)
    expired = Record.lease_expires_at < datetime.now(UTC)
    await slow.foresee(record, 42)
    assert not await sweeper.end(OpenRecord(record.id, PRICE), "interrupted", None, provided=expired)
    assert await sweeper.settle_orphans() == 0


async def test_who_looks_for_the_audio_of_the_dead_goes_on_saying_that_he_lives(
    database: Database, user_id: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking, found = asyncio.Semaphore(0), asyncio.Event()

    async def look_slowly(_: Record) -> int | None:
        looking.release()
        await found.wait()
        return None

    dead, living = RecordService(database), RecordService(database, measure_kept=look_slowly)
    orphans = [await opened(dead, user_id) for _ in range(3)]
    for orphan in orphans:
        orphan.planned_key = "audio/tts/20261122/x.mp3"
        await dead.foresee(orphan, 5)
    await expire_leases(database)
    mine = await opened(living, user_id)
    monkeypatch.setattr("app.services.records.HEARTBEAT_SECONDS", 0.01)
    keeping = asyncio.create_task(living.keep_leases())
    async with asyncio.timeout(5):
        for _ in orphans:
            await looking.acquire()  # all at once

    async def lease() -> datetime | None:
        async with database.snapshot() as session:
            return (await session.execute(select(Record.lease_expires_at).where(Record.id == mine.id))).scalar_one()

    before = await lease()
    async with asyncio.timeout(5):
        while await lease() == before:
            await asyncio.sleep(0.01)
    found.set()
    async with asyncio.timeout(5):
        while True:
            async with database.snapshot() as session:
                running = list(await session.scalars(select(Record.id).where(Record.status == "running")))
            if running == [mine.id]:
                break
            await asyncio.sleep(0.01)
    keeping.cancel()
    await asyncio.wait([keeping])


async def test_a_job_gets_no_lease_when_its_count_is_noted(database: Database, user_id: uuid.UUID) -> None:
    records = RecordService(database)
    record = await opened(records, user_id)
    await records.hand_over(record, task_of(record, user_id))
    assert await records.note(record, 42)
    kept, _ = await only_record(database)
    assert (kept.status, kept.lease_expires_at, kept.expected_quantity) == ("running", None, 42)
    await records.end(record, "succeeded", None)
    assert not await records.note(record, 43)


async def test_leases_are_renewed_on_after_whatever_went_wrong(
    database: Database, user_id: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = RecordService(database)
    await records._open(user_id, "tts", "m", "{}", PRICE)
    before, _ = await only_record(database)
    failures = iter([ZeroDivisionError(), ConnectionRefusedError()])
    renew = records._renew_leases

    async def stumble() -> None:
        if failure := next(failures, None):
            raise failure
        await renew()

    monkeypatch.setattr(records, "_renew_leases", stumble)
    monkeypatch.setattr("app.services.records.HEARTBEAT_SECONDS", 0.01)
    keeping = asyncio.create_task(records.keep_leases())
    assert before.lease_expires_at is not None
    async with asyncio.timeout(5):
        while ((await only_record(database))[0].lease_expires_at or before.lease_expires_at) <= before.lease_expires_at:
            await asyncio.sleep(0.01)
    assert not keeping.done()
    keeping.cancel()
    await asyncio.wait([keeping])


async def test_a_death_before_the_work_was_handed_over_costs_nothing(database: Database, user_id: uuid.UUID) -> None:
    records = RecordService(database)
    await records._open(user_id, "tts", "m", "{}", PRICE)
    async with database.transaction() as session:
        await session.execute(update(Record).values(lease_expires_at=datetime.now(UTC) - timedelta(seconds=1)))
    assert await RecordService(database).settle_orphans() == 1
    record, bill = await only_record(database)
    assert record.status == "interrupted"
    assert bill is None


async def test_a_database_that_is_away_for_a_moment_is_waited_for(
    database: Database, user_id: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = RecordService(database)
    end = records.end
    failures = iter([ConnectionRefusedError("away"), PoolTimeout("busy")])

    async def stumble(*arguments: Any) -> None:
        if failure := next(failures, None):
            raise failure
        await end(*arguments)

    monkeypatch.setattr(records, "end", stumble)
    monkeypatch.setattr("app.database.WRITE_RETRY_SECONDS", (0.01, 0.01))
    await run(records, user_id, 9)
    record, bill = await only_record(database)
    assert record.status == "succeeded"
    assert bill is not None
    assert bill.quantity == 9


async def test_the_database_sums_bills_exactly(database: Database, user_id: uuid.UUID) -> None:
    records = RecordService(database)
    for quantity in range(1, 8):
        await run(records, user_id, quantity)
    async with database.snapshot() as session:
        assert await session.scalar(select(func.sum(Bill.amount))) == PRICE.per_unit * 28


async def test_two_hundred_writers_lose_nothing(database: Database, user_id: uuid.UUID) -> None:
    records = RecordService(database)
    gate = asyncio.Semaphore(20)

    async def one() -> None:
        async with gate:
            await run(records, user_id, 1)

    await asyncio.gather(*(one() for _ in range(200)))
    page = await HistoryService(database).page(user_id, 2, 50)
    assert page.total == 200
    ids = [call.record.id for call in page.items]
    assert ids == sorted(ids, reverse=True)
    assert {call.amount for call in page.items} == {PRICE.per_unit}


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        ("0", "0"),
        ("0.0716750", "0.0717"),
        ("0.00025", "0.0003"),
        ("0.00015", "0.0002"),
        ("0.000014335", "0.0000"),
        ("12.34565", "12.3457"),
        ("1E+2", "100.0000"),
    ],
)
def test_amounts_are_shown_half_up_to_four_places(amount: str, shown: str) -> None:
    assert show_amount(Decimal(amount)) == shown


# ---- Tasks that are handed over


def task_of(record: OpenRecord, user_id: uuid.UUID) -> Transcription:
    """A task that the provider has just taken on."""
    now = datetime.now(UTC)
    return Transcription(
        record_id=record.id,
        user_id=user_id,
        task_id="task",
        key_fingerprint="-",
        status="PENDING",
        submitted_at=now,
        checked_at=now,
        next_check_at=now,
    )


async def opened(records: RecordService, user_id: uuid.UUID) -> OpenRecord:
    """A record under way in this process."""
    return OpenRecord(await records._open(user_id, "asr", "paraformer-v2", "{}", PRICE), PRICE)


async def expire_leases(database: Database) -> None:
    """Let the time pass that leases last, where there are any."""
    expired = update(Record).where(Record.lease_expires_at.is_not(None))
    async with database.transaction() as session:
        await session.execute(expired.values(lease_expires_at=datetime.now(UTC) - timedelta(seconds=1)))


async def test_a_lease_that_is_renewed_during_the_hand_over_does_not_come_back(
    database: Database, user_id: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = RecordService(database)
    record = await opened(records, user_id)
    written, committing = asyncio.Event(), asyncio.Event()
    transaction = database.transaction

    @asynccontextmanager
    async def slow_to_commit() -> AsyncIterator[AsyncSession]:
        async with transaction() as session:
            yield session
            await session.flush()
            written.set()
            await committing.wait()

    monkeypatch.setattr(database, "transaction", slow_to_commit)
    handing_over = asyncio.create_task(records.hand_over(record, task_of(record, user_id)))
    await written.wait()
    monkeypatch.setattr(database, "transaction", transaction)
    renewing = asyncio.create_task(records._renew_leases())
    await asyncio.sleep(0.1)
    assert not renewing.done()
    committing.set()
    await asyncio.gather(handing_over, renewing)
    await expire_leases(database)
    assert await RecordService(database).settle_orphans() == 0
    kept, _ = await only_record(database)
    assert (kept.status, kept.lease_expires_at) == ("running", None)


async def test_a_lease_that_is_renewed_after_the_hand_over_does_not_come_back(
    database: Database, user_id: uuid.UUID
) -> None:
    records = RecordService(database)
    record = await opened(records, user_id)
    await records.hand_over(record, task_of(record, user_id))
    records._live.add(record.id)  # as it is until the hand-over returns
    await records._renew_leases()
    await expire_leases(database)
    assert await RecordService(database).settle_orphans() == 0
    kept, _ = await only_record(database)
    assert (kept.status, kept.lease_expires_at) == ("running", None)


async def test_a_record_that_was_handed_over_has_no_lease_here_any_more(database: Database, user_id: uuid.UUID) -> None:
    records = RecordService(database)
    async with records.running(user_id, "asr", "paraformer-v2", "{}", PRICE) as record:
        await records.hand_over(record, task_of(record, user_id))
    assert records._live == set()
    kept, bill = await only_record(database)
    assert (kept.status, kept.finished_at, bill) == ("running", None, None)


async def test_a_sweep_that_saw_the_lease_before_the_hand_over_comes_too_late(
    database: Database, user_id: uuid.UUID
) -> None:
    owner, sweeper = RecordService(database), RecordService(database)
    record = await opened(owner, user_id)
    await expire_leases(database)
    expired = Record.lease_expires_at < datetime.now(UTC)
    await owner.hand_over(record, task_of(record, user_id))
    assert not await sweeper.end(OpenRecord(record.id, PRICE, quantity=9), "interrupted", None, provided=expired)
    kept, bill = await only_record(database)
    assert (kept.status, bill) == ("running", None)


async def test_a_swept_record_is_opened_again_by_its_hand_over(database: Database, user_id: uuid.UUID) -> None:
    owner, sweeper = RecordService(database), RecordService(database)
    record = await opened(owner, user_id)
    await expire_leases(database)
    assert await sweeper.settle_orphans() == 1
    assert (await only_record(database))[0].status == "interrupted"
    for _ in range(2):
        await owner.hand_over(record, task_of(record, user_id))
        kept, bill = await only_record(database)
        assert (kept.status, kept.lease_expires_at, kept.finished_at, bill) == ("running", None, None, None)
        assert (kept.error, kept.error_message) == (None, None)
    assert await sweeper.settle_orphans() == 0
    assert await sweeper.end(OpenRecord(record.id, PRICE, quantity=4), "succeeded", None)
    kept, bill = await only_record(database)
    assert (kept.status, kept.error, kept.error_message) == ("succeeded", None, None)
    assert bill is not None
    assert (bill.quantity, bill.estimated) == (4, False)


async def test_a_hand_over_done_twice_is_one_task(database: Database, user_id: uuid.UUID) -> None:
    records = RecordService(database)
    record = await opened(records, user_id)
    for _ in range(2):
        await records.hand_over(record, task_of(record, user_id))
    kept, bill = await only_record(database)
    assert (kept.status, kept.lease_expires_at, bill) == ("running", None, None)
    async with database.snapshot() as session:
        assert await session.scalar(select(func.count()).select_from(Transcription)) == 1


async def test_a_record_that_has_a_bill_is_not_opened_again(database: Database, user_id: uuid.UUID) -> None:
    owner = RecordService(database)
    record = await opened(owner, user_id)
    await owner.foresee(record, 42)
    await expire_leases(database)
    assert await RecordService(database).settle_orphans() == 1
    before, _ = await only_record(database)
    await owner.hand_over(record, task_of(record, user_id))
    after, bill = await only_record(database)
    assert (after.status, after.finished_at) == ("interrupted", before.finished_at)
    assert bill is not None
    assert (bill.quantity, bill.estimated) == (42, True)


async def test_records_that_ended_otherwise_are_not_opened_again(database: Database, user_id: uuid.UUID) -> None:
    records = RecordService(database)
    ends: list[Status] = ["succeeded", "failed", "abandoned"]
    ended = {(await opened(records, user_id)).id: status for status in ends}
    for record_id, status in ended.items():
        await records.end(OpenRecord(record_id, PRICE), status, None)
        record = OpenRecord(record_id, PRICE)
        await records.hand_over(record, task_of(record, user_id))
    page = await HistoryService(database).page(user_id, 1, 10)
    assert {call.record.id: call.record.status for call in page.items} == ended
    assert all(call.record.finished_at for call in page.items)


async def test_the_hand_over_of_one_record_opens_no_other(database: Database, user_id: uuid.UUID) -> None:
    records = RecordService(database)
    swept, other = await opened(records, user_id), await opened(records, user_id)
    await expire_leases(database)
    assert await RecordService(database).settle_orphans() == 2
    await records.hand_over(swept, task_of(swept, user_id))
    page = await HistoryService(database).page(user_id, 1, 10)
    assert {call.record.id: call.record.status for call in page.items} == {swept.id: "running", other.id: "interrupted"}
