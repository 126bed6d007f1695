"""SQLite without needless trips: on the way to a thread and back goes more time than a statement takes.

SQLAlchemy's own adapter of aiosqlite makes a trip for the cursor, one for the statement, one for its rows and one for
the end of the cursor, and as many for each BEGIN. Here a statement takes one, also the first with its BEGIN.
"""

import asyncio
import sqlite3
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar, TypeVarTuple, cast

from sqlalchemy import Connection, Row, Select, create_engine, event, make_url
from sqlalchemy.dialects.sqlite.aiosqlite import (
    AsyncAdapt_aiosqlite_connection,
    AsyncAdapt_aiosqlite_cursor,
    AsyncAdapt_aiosqlite_dbapi,
)
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import await_

WRITES = "app_writes"
BUSY_TIMEOUT_MS = 10_000
_PRAGMAS = (
    "journal_mode=WAL",
    "synchronous=FULL",  # what was committed survives a power cut too: bills are among it
    "foreign_keys=ON",
)
Begin = Literal["BEGIN", "BEGIN IMMEDIATE"]
Result = TypeVar("Result")
Columns = TypeVarTuple("Columns")


class SqliteCursor(AsyncAdapt_aiosqlite_cursor):
    """A statement and all that came of it: nothing is left on the other side once it is done."""

    __slots__ = ("_description", "_lastrowid", "_rowcount")

    _adapt_connection: "SqliteConnection"

    def __init__(self, adapt_connection: "SqliteConnection") -> None:
        """Nothing is done yet."""
        self._adapt_connection = adapt_connection
        self._rows = deque()
        self._description: Any = None
        self._lastrowid: Any = None
        self._rowcount = -1

    @property
    def description(self) -> Any:
        """The columns of the rows; None where there are none."""
        return self._description

    @property
    def lastrowid(self) -> Any:
        """The last row that was inserted."""
        return self._lastrowid

    @property
    def rowcount(self) -> int:
        """How many rows were changed."""
        return self._rowcount

    async def _async_soft_close(self) -> None:
        """There is nothing to close."""

    def close(self) -> None:
        """Forget the rows."""
        self._rows.clear()

    def execute(self, operation: str, parameters: Any = None) -> None:
        """Do a statement, and fetch all of its rows."""
        self._perform(lambda cursor: cursor.execute(operation, parameters or ()))

    def executemany(self, operation: str, seq_of_parameters: Sequence[Any]) -> None:
        """Do a statement several times."""
        self._perform(lambda cursor: cursor.executemany(operation, seq_of_parameters))

    def _perform(self, statement: Callable[[sqlite3.Cursor], object]) -> None:
        def perform(connection: sqlite3.Connection) -> None:
            cursor = connection.cursor()
            try:
                statement(cursor)
                self._description, self._rowcount = cursor.description, cursor.rowcount
                self._lastrowid = cursor.lastrowid
                self._rows = deque(cursor.fetchall()) if cursor.description else deque()
            finally:
                cursor.close()

        self._adapt_connection.perform(perform)


class SqliteConnection(AsyncAdapt_aiosqlite_connection):
    """A connection whose transactions begin on the way to their first statement."""

    __slots__ = ("_begun", "_wanted")

    _cursor_cls = SqliteCursor  # type: ignore[assignment]

    def __init__(self, *arguments: Any) -> None:
        """Nothing is begun yet."""
        super().__init__(*arguments)
        self._wanted: Begin | None = None
        self._begun: Begin | None = None

    def begin(self, begin: Begin) -> None:
        """Begin a transaction with whatever statement comes next."""
        self._wanted = begin

    def perform(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """Do something in the connection's thread, in its transaction. Raises sqlite3.Error."""
        connection, begin = self._connection._conn, self._wanted

        def in_transaction() -> Result:
            if begin is not None:
                connection.execute(begin).close()
            return work(connection)

        self._begun, self._wanted = begin or self._begun, None
        try:
            result: Result = await_(self._connection._execute(in_transaction))
        except Exception as error:
            self._handle_exception(error)
        return result

    def commit(self) -> None:
        """End the transaction, if it was begun at all."""
        if self._begun is not None:
            super().commit()
        self._begun = self._wanted = None

    def rollback(self) -> None:
        """End the transaction, if it was begun at all; nobody waits for the end of one that only reads."""
        if self._begun == "BEGIN" and self._connection._connection:
            self._connection._tx.put_nowait((None, self._connection._conn.rollback))
        elif self._begun is not None:
            super().rollback()
        self._begun = self._wanted = None


class SqliteModule(AsyncAdapt_aiosqlite_dbapi):
    """What SQLAlchemy takes for the driver."""

    def __init__(self) -> None:
        """Load aiosqlite: here, so that who has PostgreSQL does not pay for it."""
        import aiosqlite

        super().__init__(aiosqlite, sqlite3)

    def connect(self, *arguments: Any, **named: Any) -> SqliteConnection:
        """Open a connection, whose thread ends with the process."""
        connection = self.aiosqlite.connect(*arguments, **named)
        connection._thread.daemon = True
        return SqliteConnection(self, await_(connection))


class Sqlite:
    """One file besides the connections of the engine: a thread that writes, and a look from the event loop.

    Both keep their connection: to take one from a pool and give it back costs as much as a statement.
    """

    def __init__(self, url: str) -> None:
        """Connect when first used."""
        self._writing = _Kept(url, f"busy_timeout={BUSY_TIMEOUT_MS}", *_PRAGMAS)
        self._looking = _Kept(url, "busy_timeout=0", *_PRAGMAS, "query_only=ON")
        self._thread = ThreadPoolExecutor(1, "sqlite")

    async def write(self, unit: Callable[[Connection], Result]) -> Result:
        """Do a write unit in the thread, with one trip for all of it. Who is cancelled does not hear its outcome."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._write, unit)

    def _write(self, unit: Callable[[Connection], Result]) -> Result:
        connection = self._writing.connection
        driver = cast(sqlite3.Connection, connection.connection.dbapi_connection)
        try:
            driver.execute("BEGIN IMMEDIATE").close()
        except sqlite3.Error as error:
            raise OperationalError("BEGIN IMMEDIATE", None, error) from error
        try:
            with connection.begin():
                return unit(connection)
        finally:
            if driver.in_transaction:  # what could neither be ended nor undone would lock the file for ever
                connection.invalidate()

    def look_up(self, query: Select[*Columns], parameters: Mapping[str, object]) -> Row[*Columns] | None:
        """The one row of a query, if there is one, read here and now. Raises OperationalError of a locked file."""
        return self._looking.connection.execute(query, parameters).one_or_none()

    async def close(self) -> None:
        """Wait for what is under way, and disconnect."""
        self._looking.close()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._writing.close)
        self._thread.shutdown()


class _Kept:
    """A connection of the standard library's, opened when it is first used by one thread at a time."""

    def __init__(self, url: str, *pragmas: str) -> None:
        self._engine = create_engine(
            make_url(url).set(drivername="sqlite"), hide_parameters=True, connect_args={"check_same_thread": False}
        )
        event.listen(self._engine, "connect", _configured_by(*pragmas))
        self._connection: Connection | None = None

    @property
    def connection(self) -> Connection:
        """Open. Raises OperationalError."""
        if self._connection is None or self._connection.invalidated:
            self._connection = self._engine.connect()
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._engine.dispose()


def create_sqlite_engine(url: str) -> AsyncEngine:
    """Make an engine that is safe for read-then-write: a write unit, by its option WRITES, takes the lock at once."""
    engine = create_async_engine(url, hide_parameters=True, module=SqliteModule())

    def begin(connection: Connection) -> None:
        driver = cast("SqliteConnection", connection.connection.dbapi_connection)
        driver.begin("BEGIN IMMEDIATE" if connection.get_execution_options().get(WRITES) else "BEGIN")

    event.listen(engine.sync_engine, "connect", _configured_by(f"busy_timeout={BUSY_TIMEOUT_MS}", *_PRAGMAS))
    event.listen(engine.sync_engine, "begin", begin)
    return engine


def _configured_by(*pragmas: str) -> Callable[[DBAPIConnection, ConnectionPoolEntry], None]:
    def configure(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself
        cursor = connection.cursor()
        for pragma in pragmas:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    return configure
