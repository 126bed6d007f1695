"""Databases of both kinds: made with or without the schema of today, provided to servers, looked into by tests."""

import asyncio
import re
import sqlite3
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar

import asyncpg

from app.columns import MONEY_DECIMALS
from app.database import migrate
from app.models import Table
from tests.skipping import skip_without

POSTGRES = "127.0.0.1:5432"
BUSY_SECONDS = 20.0
# Of the servers of all workers together, PostgreSQL bears a hundred connections.
POOL_SIZE = 5
_LEAVE_ALONE = (
    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
)

Row = tuple[Any, ...]
Result = TypeVar("Result")


class Housed(Protocol):
    """What has a database: a server of the tests."""

    @property
    def database_url(self) -> str:
        """Where it is."""


def postgres_url(name: str) -> str:
    """The address of a PostgreSQL database."""
    return f"postgresql+asyncpg://root@{POSTGRES}/{name}"


async def create_database(template: str | None = None) -> str:
    """Make a PostgreSQL database, empty or a copy of another; gives its name.

    The test is skipped where none listens on the loopback.
    """
    name = f"test_{uuid.uuid4().hex}"
    try:
        server = await asyncpg.connect(f"postgresql://root@{POSTGRES}/postgres", timeout=3)
    except (TimeoutError, OSError, asyncpg.PostgresError):
        skip_without(f"PostgreSQL at {POSTGRES}")
    await server.execute(f"CREATE DATABASE {name}" + (f" TEMPLATE {template}" if template else ""))
    await server.close()
    return name


async def drop_database(*names: str) -> None:
    """Remove PostgreSQL databases, whoever uses them; what they held is left as text for the sweep."""
    if provider.dumps is not None:
        for name in names:
            _keep(provider.dumps / f"{name}.xml", await _text_of(name))
    server = await asyncpg.connect(f"postgresql://root@{POSTGRES}/postgres", timeout=3)
    for name in names:
        await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await server.close()


async def _text_of(name: str) -> str:
    database = await _connect(postgres_url(name))
    await database.execute(_LEAVE_ALONE)
    text: str = await database.fetchval("SELECT schema_to_xml('public', false, false, '')::text")
    await database.close()
    return text


def _keep(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


def run_apart(work: Coroutine[Any, Any, Result]) -> Result:
    """Run something asynchronous in a thread, for what has no loop: those there are belong to the tests."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


async def empty_database(name: str) -> None:
    """Delete every row of a PostgreSQL database, once nobody is connected to it any more."""
    database = await asyncpg.connect(f"postgresql://root@{POSTGRES}/{name}", timeout=3)
    await database.execute(_LEAVE_ALONE)
    for table in reversed(Table.metadata.sorted_tables):
        await database.execute(str(table.delete()))
    await database.close()


@cache
def sqlite_schema() -> bytes:
    """An SQLite file with every table and no row: to copy it takes less than most tests, migrations more."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "app.db"
        run_apart(migrate(f"sqlite+aiosqlite:///{file}"))
        return file.read_bytes()


# ---- The databases of servers


class Provider:
    """Gives each folder of data a database of its own, of the kind that `pytest --database` names.

    `dumps` is a folder for the text of PostgreSQL databases that are dropped.
    """

    def __init__(self, kind: str = "sqlite") -> None:
        self.kind = kind
        self.dumps: Path | None = None
        self._template: str | None = None
        self._names: dict[Path, str] = {}
        self._users: dict[Path, int] = {}

    @contextmanager
    def provide(self, data: Path) -> Iterator[dict[str, str]]:
        """Settings that lead a server to its database, which has the schema of today if the folder is new."""
        if self.kind == "sqlite":
            if not data.exists():
                data.mkdir(mode=0o700, parents=True)
                (data / "app.db").write_bytes(sqlite_schema())
            yield {}  # where it looks by itself
            return
        data = data.resolve()
        if data not in self._names:
            self._names[data] = run_apart(create_database(self.template))
        self._users[data] = self._users.get(data, 0) + 1
        try:
            yield {"DATABASE_URL": postgres_url(self._names[data]), "DATABASE_POOL_SIZE": str(POOL_SIZE)}
        finally:
            self._users[data] -= 1

    @property
    def template(self) -> str:
        """The name of a PostgreSQL database with the schema of today and no row, to be copied only."""
        if self._template is None:
            self._template = run_apart(_create_template())
        return self._template

    def drop_unused(self) -> None:
        """Remove the databases that no server uses at the moment."""
        unused = [data for data, users in self._users.items() if not users]
        names = [self._names.pop(data) for data in unused]
        for data in unused:
            del self._users[data]
        if names:
            run_apart(drop_database(*names))

    def close(self) -> None:
        """Remove everything that was made."""
        self.drop_unused()
        if self._template is not None:
            run_apart(drop_database(self._template))
            self._template = None


async def _create_template() -> str:
    name = await create_database()
    await migrate(postgres_url(name))
    return name


provider = Provider()
"""That of this process."""


# ---- Looking into them


def rows(server: Housed, sql: str, *values: Any) -> list[Row]:
    """Run one statement in the database of a server, and commit it; gives its rows.

    Values are `?`, or `$1` and so on, and may be UUIDs and datetimes. The kinds give money and moments as different
    types: `money` and `moment` read either. In the statement, both know `TRUE` and `FALSE`.
    """
    numbers = iter(range(1, len(values) + 1))
    numbered = re.sub(r"\?", lambda _: f"${next(numbers)}", sql)
    file = sqlite_file(server)
    if file is None:
        return run_apart(_fetch(server.database_url, numbered, *values))
    named = {str(number): _as_sqlite_has_it(value) for number, value in enumerate(values, 1)}
    with closing(sqlite3.connect(file, timeout=BUSY_SECONDS)) as database, database:
        return database.execute(numbered, named).fetchall()


async def _connect(url: str) -> Any:
    """Connect to PostgreSQL, once it has room."""
    async with asyncio.timeout(BUSY_SECONDS):
        while True:
            try:
                return await asyncpg.connect(url.replace("+asyncpg", ""), timeout=BUSY_SECONDS)
            except asyncpg.TooManyConnectionsError:
                await asyncio.sleep(0.1)


async def _fetch(url: str, sql: str, *values: Any) -> list[Row]:
    database = await _connect(url)
    try:
        return [tuple(row) for row in await database.fetch(sql, *values)]
    finally:
        await database.close()


def _as_sqlite_has_it(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
    return value.hex if isinstance(value, uuid.UUID) else value


@asynccontextmanager
async def locked(server: Housed) -> AsyncIterator[None]:
    """Keep everybody from writing into the database of a server."""
    file = sqlite_file(server)
    if file is not None:
        with closing(sqlite3.connect(file, timeout=BUSY_SECONDS, isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            yield
            writer.execute("ROLLBACK")
        return
    tables = ", ".join(table.name for table in Table.metadata.sorted_tables)
    intruder = await _connect(server.database_url)
    try:
        async with intruder.transaction():
            await intruder.execute(f"LOCK TABLE {tables} IN EXCLUSIVE MODE")
            yield
    finally:
        await intruder.close()


def money(value: int | Decimal) -> Decimal:
    """An amount that `rows` gave."""
    return value if isinstance(value, Decimal) else Decimal(value).scaleb(-MONEY_DECIMALS)


def moment(value: str | datetime) -> datetime:
    """A moment that `rows` gave."""
    return value if isinstance(value, datetime) else datetime.fromisoformat(value).replace(tzinfo=UTC)


def sqlite_file(server: Housed) -> Path | None:
    """The file that is the database of a server, if it is one."""
    kind, _, path = server.database_url.partition(":///")
    return Path(path) if kind.startswith("sqlite") else None


def written(server: Housed) -> dict[str, bytes]:
    """Everything that the database of a server holds, as it is written there: by file, or by table."""
    file = sqlite_file(server)
    if file is not None:
        return {each.name: each.read_bytes() for each in file.parent.glob(f"{file.name}*")}
    return run_apart(_copy_tables(server.database_url))


async def _copy_tables(url: str) -> dict[str, bytes]:
    copies: dict[str, bytes] = {}
    database = await _connect(url)
    for table in Table.metadata.sorted_tables:
        with BytesIO() as copy:
            await database.copy_from_table(table.name, output=copy, format="binary")
            copies[table.name] = copy.getvalue()
    await database.close()
    return copies
