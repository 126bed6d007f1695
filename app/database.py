"""The database engine and its transactions: the only commit in the code is here."""

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, TypeVarTuple, cast

import structlog
from sqlalchemy import Connection, Row, Select, UpdateBase, event, inspect, make_url, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, DisconnectionError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from app.announcements import Announcements
from app.sqlite import WRITES, Sqlite, create_sqlite_engine

if TYPE_CHECKING:
    from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_connection

_PROJECT = Path(__file__).resolve().parent.parent
# Of PostgreSQL, so that one that is away without a word is noticed before callers give up.
CONNECT_SECONDS = 5.0
STATEMENT_SECONDS = 30.0
POOL_SECONDS = 15.0
POOL_SIZE = 10
# Whoever waits for a lock longer than that waits for somebody who hangs.
LOCK_SECONDS = 15.0
# A process that froze, or lost its network, in the middle of a transaction lets go of its locks after this.
IDLE_TRANSACTION_SECONDS = 15.0
# What a database that is busy or away raises: asyncpg's refused connections arrive as plain OSErrors.
UNAVAILABLE = (SQLAlchemyError, OSError)
# What PostgreSQL says when it has no room, is shut down or starts up; connections that break have no such code.
_OUTAGE_STATES = ("08", "53", "57P")
# Longer than a database takes to start again; then whatever was to be written is given up, with a line in the log.
WRITE_RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0)
# What holds whatever the database or its role is set to: the code is written for it.
_SERVER_SETTINGS = {
    "application_name": "ai-voice-backend",
    "default_transaction_isolation": "read committed",
    "jit": "off",  # to compile a statement takes longer than ours do
    "statement_timeout": f"{STATEMENT_SECONDS:.0f}s",
    "lock_timeout": f"{LOCK_SECONDS:.0f}s",
    "idle_in_transaction_session_timeout": f"{IDLE_TRANSACTION_SECONDS:.0f}s",
}
# Two transactions stood in each other's way and this one gave in: done again, it works. A lock that is not let go of
# for long counts as an outage.
_CONFLICT_STATES = ("40001", "40P01")
_LOCK_STATES = ("55P03", "57014")
CONFLICT_TRIES = 5
CONFLICT_PAUSE_SECONDS = 0.02
# A connection that was used so lately is taken to be alive, unless it is known to be closed.
TRUSTED_SECONDS = 2.0
_IDLE_SINCE = "app_idle_since"
Result = TypeVar("Result")
Columns = TypeVarTuple("Columns")
Arguments = ParamSpec("Arguments")
log = structlog.get_logger(__name__)


class Database:
    """Short units of work on one engine: `transaction()` writes, `snapshot()` reads."""

    def __init__(self, url: str, pool_size: int = POOL_SIZE) -> None:
        """Connect when first used. On PostgreSQL `pool_size` connections are kept, and as many more for a while."""
        self.engine = create_engine(url, pool_size)
        self.announcements = Announcements(url)
        is_sqlite = self.engine.dialect.name == "sqlite"
        self._pulse_engine = self.engine if is_sqlite else create_engine(url, pool_size=1)
        # On PostgreSQL each statement sees what was committed before it, whether or not there is a BEGIN.
        self._singly = self.engine if is_sqlite else self.engine.execution_options(isolation_level="AUTOCOMMIT")
        self._writing = _writing(self.engine)
        self._sqlite = Sqlite(url) if is_sqlite else None
        self._read = async_sessionmaker(self._singly, expire_on_commit=False)
        self._write = async_sessionmaker(self._writing, expire_on_commit=False)
        self._pulse = async_sessionmaker(_writing(self._pulse_engine), expire_on_commit=False)
        # SQLite lets whoever looks next have the lock: under load some writers would never get it.
        self._queue: AbstractAsyncContextManager[object] = asyncio.Lock() if is_sqlite else nullcontext()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        """One write unit: committed when the block ends, rolled back when it raises. Never remote calls inside."""
        async with self._queue, self._write.begin() as session:
            yield session

    @asynccontextmanager
    async def pulse(self) -> AsyncIterator[AsyncSession]:
        """A write unit that says that this process lives: it has a connection even when all others are taken."""
        async with self._queue, self._pulse.begin() as session:
            yield session

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncSession]:
        """One read unit, which leaves nothing behind; each statement with all of its rows."""
        async with self._read() as session:
            yield session

    async def check(self) -> None:
        """Ask the database for an answer. Raises SQLAlchemyError when it has none."""
        async with self.snapshot() as session:
            await session.execute(text("SELECT 1"))

    async def write(self, unit: Callable[[Connection], Result]) -> Result:
        """One write unit, like `transaction()`, given as a function: it needs no more than one trip to SQLite."""
        if self._sqlite is not None:
            async with self._queue:
                return await self._sqlite.write(unit)
        async with self._writing.begin() as connection:
            return await connection.run_sync(unit)

    @property
    def tells_every_outcome(self) -> bool:
        """Whether it is always known if something was written: no answer of an embedded database is ever lost."""
        return self._sqlite is not None

    async def change(self, statement: UpdateBase, parameters: Mapping[str, object]) -> bool:
        """One write unit of one statement, which tells what it found; says whether that was anything."""
        if self._sqlite is not None:
            return await self.write(lambda connection: connection.execute(statement, parameters).first() is not None)
        async with self._singly.connect() as connection:  # where a statement is a transaction of its own
            return (await connection.execute(statement, parameters)).first() is not None

    async def look_up(self, query: Select[*Columns], **parameters: object) -> Row[*Columns] | None:
        """The one row of a query by primary keys, if there is one: what every request asks for.

        On SQLite it is read where it is asked for, on the event loop: rows that are always in memory are found in less
        time than the loop needs to wake a thread. Should the file be locked, a thread waits for it.
        """
        if self._sqlite is not None:
            try:
                return self._sqlite.look_up(query, parameters)
            except OperationalError as error:
                log.info("database_looked_up_in_thread", error=type(error.orig).__name__)
        async with self._singly.connect() as connection:
            return (await connection.execute(query, parameters)).one_or_none()

    async def close(self) -> None:
        """Close every connection."""
        if self._sqlite is not None:
            await self._sqlite.close()
        await self.engine.dispose()
        await self._pulse_engine.dispose()


def _writing(engine: AsyncEngine) -> AsyncEngine:
    return engine.execution_options(**{WRITES: True})


def is_outage(error: Exception) -> bool:
    """Whether the database was busy or away, so that the same may work in a moment."""
    if isinstance(error, DBAPIError):
        state = str(getattr(error.orig, "sqlstate", None) or "")
        return (
            isinstance(error, OperationalError | InterfaceError)
            or error.connection_invalidated
            or state.startswith((*_OUTAGE_STATES, *_CONFLICT_STATES, *_LOCK_STATES))
        )
    return isinstance(error, PoolTimeout | OSError)


def once_more(
    write: Callable[Arguments, Coroutine[Any, Any, Result]],
) -> Callable[Arguments, Coroutine[Any, Any, Result]]:
    """Have a function that is one transaction done again when the database made it give way to another.

    PostgreSQL ends one of two transactions that wait for each other; nothing of it was done then.
    """

    @wraps(write)
    async def written(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        for tries in range(1, CONFLICT_TRIES):
            try:
                return await write(*args, **kwargs)
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) not in _CONFLICT_STATES:
                    raise
                log.warning("transaction_gave_way", write=write.__qualname__, tries=tries)
                await asyncio.sleep(random.uniform(0, CONFLICT_PAUSE_SECONDS * 2**tries))  # noqa: S311 - parts them
        return await write(*args, **kwargs)

    return written


async def queue_up(session: AsyncSession, line: int) -> None:
    """Wait until every other transaction that stands in the same line is over; on SQLite each is alone anyway."""
    if session.get_bind().dialect.name == "postgresql":
        await session.execute(text("SELECT pg_advisory_xact_lock(:line)"), {"line": line})


async def outlast(write: Callable[[], Awaitable[Result]], **facts: object) -> Result:
    """Do what must not be lost: a database that is busy or away is waited for, half a minute long.

    `facts` name it in the log. Raises what the last try raised.
    """
    for delay_seconds in WRITE_RETRY_SECONDS:
        try:
            return await write()
        except UNAVAILABLE as error:
            if not is_outage(error):
                raise
            log.warning("database_waited_for", error=type(error).__name__, **facts)
            await asyncio.sleep(delay_seconds)
    return await write()


def create_engine(url: str, pool_size: int = POOL_SIZE) -> AsyncEngine:
    """Make an engine that is safe for read-then-write on SQLite and pooled on PostgreSQL.

    Its errors never show parameters: those are texts, hashes and sealed keys.
    """
    if make_url(url).get_backend_name() != "sqlite":
        engine = create_async_engine(
            url,
            pool_size=pool_size,
            max_overflow=pool_size,
            pool_timeout=POOL_SECONDS,
            hide_parameters=True,
            connect_args={
                "timeout": CONNECT_SECONDS,
                "command_timeout": STATEMENT_SECONDS + 1.0,
                "server_settings": _SERVER_SETTINGS,
            },
        )
        event.listen(engine.sync_engine, "checkin", _note_idle)
        event.listen(engine.sync_engine, "checkout", _require_life)
        return engine
    _make_folder(url)
    return create_sqlite_engine(url)


def _note_idle(_: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
    entry.info[_IDLE_SINCE] = time.monotonic()


def _require_life(connection: DBAPIConnection, entry: ConnectionPoolEntry, _: PoolProxiedConnection) -> None:
    """Have the pool replace a connection that was closed, or does not answer after a while in which it was not used.

    To ask it each time would cost as many round trips as the transaction itself.
    """
    driver = cast("AsyncAdapt_asyncpg_connection", connection)
    if driver.driver_connection.is_closed():
        raise DisconnectionError
    if time.monotonic() - entry.info.get(_IDLE_SINCE, math.inf) > TRUSTED_SECONDS:
        try:
            driver.ping()  # type: ignore[no-untyped-call]
        except Exception as error:  # whatever keeps it from answering
            raise DisconnectionError from error


def _make_folder(url: str) -> None:
    """SQLite makes its file, but not the folder that it lies in."""
    address = make_url(url)
    if address.get_backend_name() == "sqlite" and address.database and address.database != ":memory:":
        Path(address.database).parent.mkdir(mode=0o700, parents=True, exist_ok=True)


async def migrate(url: str, revision: str = "head") -> None:
    """Bring the schema to `revision`. Several processes may call it at once: the first one does the work."""
    await asyncio.to_thread(_run_alembic, url, revision)


def _run_alembic(url: str, revision: str) -> None:
    from alembic import command

    _make_folder(url)
    config = alembic_config(url)
    if revision.startswith("-") or revision == "base":
        command.downgrade(config, revision)
    else:
        command.upgrade(config, revision)


async def require_current_schema(database: Database) -> None:
    """Refuse to run on a schema of another version. Raises RuntimeError that says what to do."""
    revision, head = await find_revision(database), head_revision()
    if revision != head:
        raise RuntimeError(
            f"the database is at revision {revision}, this version needs {head}: run `python -m app migrate`"
        )


async def find_revision(database: Database) -> str | None:
    """The revision that the schema has, as the last migration that was committed has left it."""
    async with database.engine.connect() as connection:
        if not await connection.run_sync(lambda sync: inspect(sync).has_table("alembic_version")):
            return None
        found = await connection.scalars(text("SELECT version_num FROM alembic_version"))
        return ", ".join(sorted(found)) or None


def head_revision() -> str:
    """The revision that this version needs, by the names of the migrations: Alembic takes 0.1 s to load them."""
    return max(file.stem.split("_")[1] for file in (_PROJECT / "alembic" / "versions").glob("[0-9]*_*.py"))


def alembic_config(url: str) -> Any:
    """The Alembic configuration of this project for the database at `url`."""
    from alembic.config import Config

    config = Config(_PROJECT / "alembic.ini")
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config
