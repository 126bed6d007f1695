"""Names of requests, on both databases: who is first, what stays named, what is waited for."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from sqlalchemy import select, update

from app.database import Database
from app.errors import (
    Abandoned,
    AppError,
    AskedBefore,
    ConnectionLost,
    HandshakeTimeout,
    IdempotencyConflict,
    InvalidVoice,
    NotReady,
    StorageError,
    Throttled,
    Unreachable,
    UpstreamError,
    UpstreamTimeout,
)
from app.inflight import InFlight
from app.models import Record, User
from app.services.calls import IdempotencyKey, OpenRecord, Price
from app.services.history import HistoryService, RecordedCall
from app.services.records import RecordService
from app.services.repeats import RepeatService

PRICE = Price("character", Decimal("0.0000286706"), "CNY")
NAME = IdempotencyKey("order-1", "digest-1")
OTHER = IdempotencyKey("order-1", "digest-2")


@pytest.fixture
async def database(schema_url: str) -> AsyncIterator[Database]:
    """A migrated database."""
    database = Database(schema_url)
    yield database
    await database.close()


@pytest.fixture
async def user_id(database: Database) -> uuid.UUID:
    """Somebody who asks."""
    return await add_user(database)


@pytest.fixture
def in_flight() -> InFlight:
    """What a process does."""
    return InFlight()


@pytest.fixture
def repeats(database: Database, in_flight: InFlight) -> RepeatService:
    """Who answers again."""
    return RepeatService(database, HistoryService(database), in_flight)


async def add_user(database: Database) -> uuid.UUID:
    user = User(username="u", username_key=uuid.uuid4().hex, password_hash="-", created_at=datetime.now(UTC))
    async with database.transaction() as session:
        session.add(user)
    return user.id


async def run(
    database: Database,
    user_id: uuid.UUID,
    name: IdempotencyKey | None = NAME,
    failure: BaseException | None = None,
    *,
    quantity: int = 0,
    is_sent: bool = False,
) -> int:
    """Run one call to its end; gives its record."""
    records = RecordService(database)
    async with records.running(user_id, "tts", "m", "{}", PRICE, 5, name) as record:
        if is_sent:
            await records.foresee(record, quantity)
        record.quantity = quantity
        if failure is not None:
            raise failure
    return record.id


async def named(database: Database, key: str = NAME.key) -> list[int]:
    async with database.snapshot() as session:
        return list(await session.scalars(select(Record.id).where(Record.idempotency_key == key).order_by(Record.id)))


async def grow_old(database: Database, age: timedelta) -> None:
    async with database.transaction() as session:
        await session.execute(update(Record).values(created_at=datetime.now(UTC) - age))


def record_id_of(call: RecordedCall) -> int:
    return call.record.id


async def never() -> int:
    raise AssertionError("performed again")


# ---- Who is first


async def test_of_many_at_once_one_has_the_name(database: Database, user_id: uuid.UUID) -> None:
    done = await asyncio.gather(*(run(database, user_id) for _ in range(8)), return_exceptions=True)
    assert [type(each) for each in done].count(AskedBefore) == 7
    [record_id] = [each for each in done if isinstance(each, int)]
    assert await named(database) == [record_id]


async def test_of_many_at_once_one_has_an_outdated_name(database: Database, user_id: uuid.UUID) -> None:
    first = await run(database, user_id)
    await grow_old(database, timedelta(days=1))
    done = await asyncio.gather(*(run(database, user_id) for _ in range(8)), return_exceptions=True)
    assert [type(each) for each in done].count(AskedBefore) == 7
    [record_id] = [each for each in done if isinstance(each, int)]
    assert record_id != first
    assert await named(database) == [record_id]


async def test_the_names_of_users_do_not_meet(database: Database, user_id: uuid.UUID, repeats: RepeatService) -> None:
    others = [await run(database, await add_user(database), name) for name in (NAME, OTHER)]
    mine = await repeats.once(user_id, NAME, lambda: run(database, user_id), record_id_of)
    assert mine[1] is False
    assert mine[0] not in others
    assert await repeats.once(user_id, NAME, never, record_id_of) == (mine[0], True)


async def test_a_job_is_named_with_its_rows_or_not_at_all(database: Database, user_id: uuid.UUID) -> None:
    records = RecordService(database)

    async def open_job() -> int:
        return await records.open_job(user_id, "tts", "m", "{}", PRICE, lambda _: [], 5, NAME)

    first = await open_job()
    with pytest.raises(AskedBefore):
        await open_job()
    async with database.snapshot() as session:
        assert list(await session.scalars(select(Record.id))) == [first]


# ---- What stays named


@pytest.mark.parametrize(
    ("failure", "is_sent", "quantity", "stays"),
    [
        (None, True, 3, True),
        (InvalidVoice(), True, 0, False),
        (Throttled(), True, 0, False),
        (Unreachable(), True, 0, False),
        (HandshakeTimeout(), True, 0, False),
        (UpstreamError(), True, 0, False),
        (StorageError(), False, 0, False),
        (NotReady(), False, 0, False),
        (ZeroDivisionError(), False, 0, False),
        (asyncio.CancelledError(), False, 0, False),
        (InvalidVoice(), True, 3, True),
        (ConnectionLost(), True, 0, True),
        (UpstreamTimeout(), True, 0, True),
        (StorageError(), True, 0, True),
        (ZeroDivisionError(), True, 0, True),
        (asyncio.CancelledError(), True, 0, True),
    ],
)
async def test_only_a_call_that_surely_bought_nothing_lets_go_of_its_name(
    database: Database, user_id: uuid.UUID, failure: BaseException | None, is_sent: bool, quantity: int, stays: bool
) -> None:
    with suppress(*([type(failure)] if failure else [])):
        await run(database, user_id, failure=failure, is_sent=is_sent, quantity=quantity)
    assert bool(await named(database)) is stays


async def test_a_server_error_of_the_provider_keeps_its_name(database: Database, user_id: uuid.UUID) -> None:
    failure = UpstreamError()
    failure.is_its_fault = True
    with pytest.raises(UpstreamError):
        await run(database, user_id, failure=failure, is_sent=True)
    assert await named(database)


@pytest.mark.parametrize("is_sent", [True, False])
async def test_a_dead_process_leaves_the_name_of_what_it_sent(
    database: Database, user_id: uuid.UUID, repeats: RepeatService, is_sent: bool
) -> None:
    dead = RecordService(database)
    record_id = await dead._open(user_id, "tts", "m", "{}", PRICE, 5, NAME)
    if is_sent:
        await dead.foresee(OpenRecord(record_id, PRICE), 0)

    async def order_anew() -> int:
        assert not is_sent
        return 7

    waiting = asyncio.create_task(repeats.once(user_id, NAME, order_anew, _fail))
    await asyncio.sleep(0.1)
    async with database.transaction() as session:
        await session.execute(update(Record).values(lease_expires_at=datetime.now(UTC) - timedelta(seconds=1)))
    assert await RecordService(database).settle_orphans() == 1
    if is_sent:
        with pytest.raises(NotReady) as told:
            await waiting
        assert told.value.is_repeat
    else:
        assert await waiting == (7, False)
    assert await named(database) == ([record_id] if is_sent else [])


def _fail(call: RecordedCall) -> int:
    raise call.failure


# ---- Giving a name to an earlier order


async def test_an_order_takes_a_name_once(database: Database, user_id: uuid.UUID, repeats: RepeatService) -> None:
    nameless = await run(database, user_id, None)
    await repeats.give_name(user_id, nameless, NAME)
    assert await repeats.once(user_id, NAME, never, record_id_of) == (nameless, True)
    another = await run(database, user_id, None)
    with pytest.raises(AskedBefore):
        await repeats.give_name(user_id, another, NAME)
    await grow_old(database, timedelta(days=1))
    await repeats.give_name(user_id, another, NAME)
    assert await named(database) == [another]


# ---- Waiting


async def test_who_was_slower_is_answered_by_who_was_quicker(
    database: Database, user_id: uuid.UUID, repeats: RepeatService
) -> None:
    first: list[int] = []

    async def be_late() -> int:
        first.append(await run(database, user_id))
        return await run(database, user_id)

    closed: list[bool] = []
    answer = await repeats.once(user_id, NAME, be_late, record_id_of, otherwise=lambda: closed.append(True))
    assert answer == (first[0], True)
    assert closed == []  # who performs lets go of what he has himself


async def test_who_was_slower_with_another_request_is_refused(
    database: Database, user_id: uuid.UUID, repeats: RepeatService
) -> None:
    async def be_late() -> int:
        await run(database, user_id)
        return await run(database, user_id, OTHER)

    with pytest.raises(IdempotencyConflict) as refused:
        await repeats.once(user_id, OTHER, be_late, record_id_of)
    assert not isinstance(refused.value, AskedBefore)


async def test_who_was_slower_than_a_call_that_is_refused_is_told_to_come_back(
    database: Database, user_id: uuid.UUID, repeats: RepeatService
) -> None:
    async def be_late() -> int:
        with pytest.raises(Throttled):
            await run(database, user_id, failure=Throttled())
        raise AskedBefore

    with pytest.raises(NotReady) as told:
        await repeats.once(user_id, NAME, be_late, record_id_of)
    assert told.value.retry_after_seconds == 1
    assert (await repeats.once(user_id, NAME, lambda: run(database, user_id), record_id_of))[1] is False


async def test_a_repeat_waits_until_the_first_has_its_end(
    database: Database, user_id: uuid.UUID, repeats: RepeatService
) -> None:
    records, closed = RecordService(database), list[bool]()
    async with records.running(user_id, "tts", "m", "{}", PRICE, 5, NAME) as record:
        waiting = asyncio.create_task(
            repeats.once(user_id, NAME, never, record_id_of, otherwise=lambda: closed.append(True))
        )
        await asyncio.sleep(0.3)
        assert not waiting.done()
        assert closed == []
    assert await asyncio.wait_for(waiting, 2) == (record.id, True)
    assert closed == [True]


@pytest.mark.parametrize("reason", ["stop", "hang-up", "cancellation"])
async def test_a_repeat_does_not_wait_for_ever(
    database: Database, user_id: uuid.UUID, repeats: RepeatService, in_flight: InFlight, reason: str
) -> None:
    gone, closed = asyncio.Event(), list[bool]()

    async def has_left() -> bool:
        return gone.is_set()

    async with RecordService(database).running(user_id, "tts", "m", "{}", PRICE, 5, NAME):
        waiting = asyncio.create_task(
            repeats.once(user_id, NAME, never, record_id_of, otherwise=lambda: closed.append(True), has_left=has_left)
        )
        await asyncio.sleep(0.1)
        expected: type[BaseException] = {"stop": NotReady, "hang-up": Abandoned}.get(reason, asyncio.CancelledError)
        {"stop": in_flight.hurry, "hang-up": gone.set}.get(reason, waiting.cancel)()
        with pytest.raises(expected) as told:
            await asyncio.wait_for(waiting, 2)
    assert closed == [True]
    assert not (isinstance(told.value, AppError) and told.value.is_repeat)
