"""What a unit of work costs on the way to the database and back, and that short ways are no worse than long ones."""

import asyncio
import sqlite3
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiosqlite
import asyncpg
import pytest
from sqlalchemy import Connection, bindparam, func, insert, select, text, update
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_connection
from sqlalchemy.exc import IntegrityError, OperationalError

from app import database as database_module
from app.database import Database, migrate
from app.models import Login, User
from tests.databases import postgres_url

NAMED = select(User.id, User.username).where(User.id == bindparam("user_id"))


@pytest.fixture
async def database(schema_url: str) -> AsyncIterator[Database]:
    """A migrated database."""
    database = Database(schema_url)
    yield database
    await database.close()


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[Database]:
    """A migrated SQLite file."""
    await migrate(url := f"sqlite+aiosqlite:///{tmp_path / 'app.db'}")
    database = Database(url)
    yield database
    await database.close()


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Database]:
    """A database for a while."""
    database = Database(url)
    try:
        yield database
    finally:
        await database.close()


def somebody(name: str = "u") -> dict[str, Any]:
    """A user as the table has it."""
    now = datetime.now(UTC)
    return {"id": uuid.uuid4(), "username": name, "username_key": name, "password_hash": "-", "created_at": now}


@contextmanager
def counted_trips(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """How often a connection's thread is waited for inside the block."""
    trips: list[Any] = []
    execute = aiosqlite.Connection._execute

    async def counting(connection: aiosqlite.Connection, work: Any, *arguments: Any, **named: Any) -> Any:
        trips.append(work)
        return await execute(connection, work, *arguments, **named)  # type: ignore[no-untyped-call]

    with monkeypatch.context() as patched:
        patched.setattr(aiosqlite.Connection, "_execute", counting)
        yield trips


async def test_each_statement_is_one_trip_and_so_is_the_end(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    async with sqlite.snapshot() as session:
        await session.scalar(text("SELECT 1"))  # connects
    with counted_trips(monkeypatch) as trips:
        async with sqlite.snapshot() as session:
            assert list(await session.scalars(select(User))) == []
        assert len(trips) == 1
    with counted_trips(monkeypatch) as trips:
        async with sqlite.transaction() as session:
            session.add(User(**somebody()))
            await session.flush()
            assert await session.scalar(select(func.count()).select_from(User)) == 1
        assert len(trips) == 3
    with counted_trips(monkeypatch) as trips:
        async with sqlite.transaction():
            pass
        async with sqlite.snapshot():
            pass
        assert trips == []


async def test_a_unit_and_a_look_wait_for_no_connection(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    user = somebody()
    with counted_trips(monkeypatch) as trips:
        await sqlite.write(lambda connection: connection.execute(insert(User), user))
        found = await sqlite.look_up(NAMED, user_id=user["id"])
        assert found is not None
        assert found.username == "u"
        assert trips == []


async def test_a_unit_is_written_whole_or_not_at_all(database: Database) -> None:
    user = somebody()

    def write(connection: Connection) -> str:
        connection.execute(insert(User), user)
        return connection.execute(update(User).values(username="v").returning(User.username)).scalar_one()

    assert await database.write(write) == "v"
    other = somebody("other")

    def fail(connection: Connection) -> None:
        connection.execute(insert(User), other)
        connection.execute(insert(User), user)

    with pytest.raises(IntegrityError):
        await database.write(fail)
    assert await database.look_up(NAMED, user_id=other["id"]) is None
    assert await database.look_up(NAMED, user_id=user["id"]) is not None


async def test_a_look_sees_at_once_what_was_committed_and_nothing_else(database: Database) -> None:
    user = somebody()
    async with database.transaction() as session:
        await session.execute(insert(User), user)
        assert await database.look_up(NAMED, user_id=user["id"]) is None
    for name in ("a", "b", "c"):
        renamed = update(User).values(username=name)
        await database.write(lambda connection, renamed=renamed: connection.execute(renamed))  # type: ignore[misc]
        found = await database.look_up(NAMED, user_id=user["id"])
        assert found is not None
        assert found.username == name


async def test_units_of_all_kinds_at_once_lose_nothing(database: Database) -> None:
    user = somebody("0")
    await database.write(lambda connection: connection.execute(insert(User), user))

    def count_up(connection: Connection) -> None:
        before = connection.execute(select(User.username).with_for_update()).scalar_one()
        connection.execute(update(User).values(username=str(int(before) + 1)))

    async def count_up_by_session() -> None:
        async with database.transaction() as session:
            before = await session.scalar(select(User.username).with_for_update())
            await session.execute(update(User).values(username=str(int(before or 0) + 1)))

    await asyncio.gather(*(database.write(count_up) for _ in range(50)), *(count_up_by_session() for _ in range(50)))
    found = await database.look_up(NAMED, user_id=user["id"])
    assert found is not None
    assert found.username == "100"


async def test_a_unit_that_nobody_waits_for_any_more_is_written_all_the_same(sqlite: Database) -> None:
    user = somebody()
    loop, begun = asyncio.get_running_loop(), asyncio.Event()

    def write(connection: Connection) -> None:
        connection.execute(insert(User), user)
        loop.call_soon_threadsafe(begun.set)

    writing = asyncio.create_task(sqlite.write(write))
    await begun.wait()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    await sqlite.write(lambda _: None)  # the next one comes after it
    assert await sqlite.look_up(NAMED, user_id=user["id"]) is not None


async def test_what_cannot_be_committed_locks_nobody_out(sqlite: Database) -> None:
    now = datetime.now(UTC)
    orphan = {"id": uuid.uuid4(), "user_id": uuid.uuid4(), "created_at": now, "refreshed_at": now, "expires_at": now}

    def fail(connection: Connection) -> None:
        connection.exec_driver_sql("PRAGMA defer_foreign_keys=ON")
        connection.execute(insert(Login), {**orphan, "generation": 0})

    with pytest.raises(IntegrityError):
        await sqlite.write(fail)
    user = somebody()
    await sqlite.write(lambda connection: connection.execute(insert(User), user))
    async with sqlite.transaction() as session:
        assert await session.scalar(select(func.count()).select_from(User)) == 1
        assert await session.scalar(select(func.count()).select_from(Login)) == 0


async def test_a_look_at_a_locked_file_waits_in_a_thread(tmp_path: Path) -> None:
    user = somebody()
    await migrate(url := f"sqlite+aiosqlite:///{tmp_path / 'app.db'}")
    async with opened(url) as database:
        await database.write(lambda connection: connection.execute(insert(User), user))
    async with opened(url) as database:
        with closing(sqlite3.connect(tmp_path / "app.db", isolation_level=None)) as owner:
            owner.execute("PRAGMA locking_mode=EXCLUSIVE")
            owner.execute("UPDATE users SET username = 'v'")
            looking = asyncio.create_task(database.look_up(NAMED, user_id=user["id"]))
            await asyncio.sleep(0.2)  # the loop is free meanwhile
            assert not looking.done()
        found = await looking
        assert found is not None
        assert found.username == "v"


async def test_a_look_changes_nothing(sqlite: Database) -> None:
    await sqlite.look_up(NAMED, user_id=uuid.uuid4())
    assert sqlite._sqlite is not None
    with pytest.raises(OperationalError):
        sqlite._sqlite._looking.connection.execute(insert(User), somebody())


async def test_a_connection_that_was_closed_is_replaced_unseen(schema_copy: str) -> None:
    database = Database(postgres_url(schema_copy))
    try:
        await asyncio.gather(*(database.look_up(NAMED, user_id=uuid.uuid4()) for _ in range(5)))
        intruder = await asyncpg.connect(host="127.0.0.1", user="root", database="postgres")
        ended = await intruder.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", schema_copy
        )
        await intruder.close()
        assert ended
        await asyncio.sleep(0.2)
        await asyncio.gather(*(database.look_up(NAMED, user_id=uuid.uuid4()) for _ in range(5)))
        await database.write(lambda connection: connection.execute(select(1)))
    finally:
        await database.close()


async def test_only_a_connection_that_was_long_idle_is_asked_whether_it_lives(
    schema_copy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(postgres_url(schema_copy))
    asked: list[str] = []
    ping, start = AsyncAdapt_asyncpg_connection._async_ping, asyncpg.transaction.Transaction.start

    async def ping_noted(connection: AsyncAdapt_asyncpg_connection) -> None:
        asked.append("ping")
        await ping(connection)  # type: ignore[no-untyped-call]

    async def start_noted(transaction: Any) -> None:
        asked.append("begin")
        await start(transaction)

    monkeypatch.setattr(AsyncAdapt_asyncpg_connection, "_async_ping", ping_noted)
    monkeypatch.setattr(asyncpg.transaction.Transaction, "start", start_noted)
    try:
        await database.check()
        asked.clear()
        for _ in range(3):
            await database.look_up(NAMED, user_id=uuid.uuid4())
            async with database.snapshot() as session:
                await session.scalar(select(User.id))
        assert asked == []
        await database.write(lambda connection: connection.execute(select(1)))
        assert asked == ["begin"]
        monkeypatch.setattr(database_module, "TRUSTED_SECONDS", 0.0)
        await database.look_up(NAMED, user_id=uuid.uuid4())
        assert "ping" in asked
    finally:
        await database.close()
