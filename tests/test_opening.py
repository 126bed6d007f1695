"""Records that are opened while the provider gets ready: at the latest together with what is at stake."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Connection, UpdateBase, delete, update
from sqlalchemy.exc import OperationalError

from app.database import Database
from app.errors import Abandoned, NotReady, Throttled, Unauthorized
from app.models import Bill, Record, User
from app.services import records as records_module
from app.services.calls import OpenRecord, Price
from app.services.records import RecordService
from tests.databases import postgres_url
from tests.test_records import only_record
from tests.test_usage import add_user

PRICE = Price("character", Decimal("0.0000286706"), "CNY")
CALL = ("tts", "cosyvoice-v3-plus", "{}", PRICE, 28)


@pytest.fixture
async def database(schema_url: str) -> AsyncIterator[Database]:
    """A migrated database."""
    database = Database(schema_url)
    yield database
    await database.close()


@pytest.fixture
async def user_id(database: Database) -> uuid.UUID:
    """Somebody whom records can belong to."""
    return await add_user(database)


@pytest.fixture
def units(database: Database, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The write units that were done so far."""
    done: list[Any] = []
    write, change = database.write, database.change

    async def counted(unit: Callable[[Connection], Any]) -> Any:
        done.append(unit)
        return await write(unit)

    async def counted_alone(statement: UpdateBase, parameters: Mapping[str, object]) -> bool:
        done.append(statement)
        return await change(statement, parameters)

    monkeypatch.setattr(database, "write", counted)
    if database.engine.dialect.name == "postgresql":  # on SQLite it is a unit like any other
        monkeypatch.setattr(database, "change", counted_alone)
    return done


async def test_what_is_at_stake_soon_is_written_together_with_the_record(
    database: Database, user_id: uuid.UUID, units: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_module, "OPENED_AFTER_SECONDS", 60.0)
    records, told = RecordService(database), list[int]()
    async with records.running(user_id, *CALL, is_awaited=False) as opened:  # type: ignore[arg-type]
        opened.when_open(told.append)
        opened.planned_key = "audio/tts/20261122/a.mp3"
        await asyncio.sleep(0.05)
        if database.tells_every_outcome:
            assert (opened.id, units) == (0, [])
        await records.foresee(opened, 28)
        assert opened.is_sent
        record, _ = await only_record(database)
        assert (record.id, record.status, record.expected_quantity) == (opened.id, "running", 28)
        assert record.planned_key == "audio/tts/20261122/a.mp3"
        assert record.sent_at is not None
        assert record.lease_expires_at is not None
        opened.quantity = 28
    assert told == [opened.id]
    # Where an answer can be lost, what is at stake is noted only in a record that is known to be there.
    assert len(units) == (2 if database.tells_every_outcome else 3)
    record, bill = await only_record(database)
    assert (record.status, bill and bill.quantity) == ("succeeded", 28)


async def test_a_provider_that_takes_its_time_finds_the_record_open(
    database: Database, user_id: uuid.UUID, units: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_module, "OPENED_AFTER_SECONDS", 0.0)
    records = RecordService(database)
    async with records.running(user_id, *CALL, is_awaited=False) as opened:  # type: ignore[arg-type]
        assert opened.opening is not None
        await asyncio.wait([opened.opening])
        record, _ = await only_record(database)
        assert (record.id, record.expected_quantity, record.sent_at) == (opened.id, 0, None)
        assert not opened.is_sent
        await records.foresee(opened, 28)
        record, _ = await only_record(database)
        assert (record.expected_quantity, record.sent_at is None) == (28, False)
    assert len(units) == 3


async def test_an_opening_whose_answer_is_lost_costs_nothing(schema_copy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(postgres_url(schema_copy))
    user_id, write = await add_user(database), database.write

    async def lose_answer(unit: Callable[[Connection], Any]) -> Any:
        await write(unit)
        raise OperationalError("COMMIT", None, ConnectionError())

    monkeypatch.setattr(records_module, "LEASE", timedelta(seconds=-1))
    records = RecordService(database)
    with pytest.raises(OperationalError), monkeypatch.context() as broken:
        broken.setattr(database, "write", lose_answer)
        async with records.running(user_id, *CALL, is_awaited=False) as opened:  # type: ignore[arg-type]
            await records.foresee(opened, 28)
            pytest.fail("the text would be sent")
    assert await records.settle_orphans() == 1
    record, bill = await only_record(database)
    assert (record.status, bill) == ("interrupted", None)
    await database.close()


async def test_a_lease_begins_when_the_record_is_written(
    database: Database, user_id: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_module, "LEASE", timedelta(seconds=1))
    write = database.write

    async def write_late(unit: Callable[[Connection], Any]) -> Any:
        await asyncio.sleep(1.2)
        return await write(unit)

    records = RecordService(database)
    with monkeypatch.context() as slow:
        slow.setattr(database, "write", write_late)
        async with records.running(user_id, *CALL, is_awaited=False) as opened:  # type: ignore[arg-type]
            opened.is_due.set()
            assert opened.opening is not None
            await opened.opening
            slow.undo()
            record, _ = await only_record(database)
            assert record.lease_expires_at is not None
            assert record.lease_expires_at > datetime.now(UTC)


async def test_work_that_cannot_be_written_down_is_stopped_at_once(
    database: Database, user_id: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_module, "OPENED_AFTER_SECONDS", 0.0)
    await database.write(lambda connection: connection.execute(update(User).values(is_active=False)))
    stopped = asyncio.Event()
    with pytest.raises(Unauthorized):
        async with RecordService(database).running(user_id, *CALL, is_awaited=False) as opened:  # type: ignore[arg-type]
            opened.unless_open(stopped.set)
            await asyncio.wait_for(stopped.wait(), 5)
            raise Abandoned


@pytest.mark.parametrize("seconds", [0.0, 60.0])
async def test_a_call_that_fails_before_that_is_in_the_history(
    database: Database, user_id: uuid.UUID, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(records_module, "OPENED_AFTER_SECONDS", seconds)
    with pytest.raises(Throttled):
        async with RecordService(database).running(user_id, *CALL, is_awaited=False):  # type: ignore[arg-type]
            raise Throttled
    record, bill = await only_record(database)
    assert (record.status, record.error, record.sent_at, bill) == ("failed", "RATE_LIMITED", None, None)


async def test_a_call_that_is_cancelled_before_that_is_interrupted(database: Database, user_id: uuid.UUID) -> None:
    async def call() -> None:
        async with RecordService(database).running(user_id, *CALL, is_awaited=False):  # type: ignore[arg-type]
            await asyncio.Event().wait()

    calling = asyncio.create_task(call())
    await asyncio.sleep(0)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    record, bill = await only_record(database)
    assert (record.status, bill) == ("interrupted", None)


@pytest.mark.parametrize("seconds", [0.0, 60.0])
async def test_what_cannot_be_opened_is_not_bought(
    database: Database, user_id: uuid.UUID, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(records_module, "OPENED_AFTER_SECONDS", seconds)
    await database.write(lambda connection: connection.execute(update(User).values(is_active=False)))
    records, told = RecordService(database), list[int]()
    with pytest.raises(Unauthorized):
        async with records.running(user_id, *CALL, is_awaited=False) as opened:  # type: ignore[arg-type]
            opened.when_open(told.append)
            await records.foresee(opened, 28)
            pytest.fail("the text would be sent")
    assert told == []
    async with database.snapshot() as session:
        assert await session.get(Record, 1) is None


async def test_another_try_is_noted_again(database: Database, user_id: uuid.UUID) -> None:
    records = RecordService(database)
    opened: OpenRecord
    async with records.running(user_id, *CALL, is_awaited=False) as opened:  # type: ignore[arg-type]
        await records.foresee(opened, 28)
        await records.foresee(opened, 30)
        record, _ = await only_record(database)
        assert record.expected_quantity == 30
        await database.write(lambda connection: connection.execute(update(Record).values(status="interrupted")))
        with pytest.raises(NotReady):
            await records.foresee(opened, 30)
    await database.write(lambda connection: connection.execute(delete(Bill)))
