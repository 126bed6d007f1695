"""Databases of both kinds, with and without the schema of today."""

import asyncio
import uuid
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import asyncpg

from app.database import migrate
from app.models import Table
from tests.skipping import skip_without

POSTGRES = "127.0.0.1:5432"


def postgres_url(name: str) -> str:
    """The address of a PostgreSQL database."""
    return f"postgresql+asyncpg://root@{POSTGRES}/{name}"


async def create_database() -> str:
    """Make a PostgreSQL database and give its name; the test is skipped where none listens on the loopback."""
    name = f"test_{uuid.uuid4().hex}"
    try:
        server = await asyncpg.connect(f"postgresql://root@{POSTGRES}/postgres", timeout=3)
    except (TimeoutError, OSError, asyncpg.PostgresError):
        skip_without(f"PostgreSQL at {POSTGRES}")
    await server.execute(f"CREATE DATABASE {name}")
    await server.close()
    return name


async def drop_database(name: str) -> None:
    """Remove a PostgreSQL database, whoever uses it."""
    server = await asyncpg.connect(f"postgresql://root@{POSTGRES}/postgres", timeout=3)
    await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await server.close()


def run_apart(work: Coroutine[Any, Any, None]) -> None:
    """Run something asynchronous in a thread, for fixtures of a session: the loops belong to the tests."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work).result()


async def empty_database(name: str) -> None:
    """Delete every row of a PostgreSQL database, once nobody is connected to it any more."""
    database = await asyncpg.connect(f"postgresql://root@{POSTGRES}/{name}", timeout=3)
    await database.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
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
