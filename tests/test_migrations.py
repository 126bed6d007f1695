"""The schema: up, down, and no drift, on SQLite and PostgreSQL."""

import asyncio
import os
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.util.exc import CommandError
from sqlalchemy import inspect

from app.database import Database, alembic_config, create_engine, migrate, require_current_schema
from app.models import Table
from tests.servers import PROJECT


async def table_names(url: str) -> set[str]:
    """The tables that are really there."""
    engine = create_engine(url)
    async with engine.connect() as connection:
        names = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
    await engine.dispose()
    return set(names)


async def test_the_schema_goes_up_without_drift_and_down_to_nothing(database_url: str) -> None:
    await migrate(database_url)
    assert await table_names(database_url) == {*Table.metadata.tables, "alembic_version"}
    await asyncio.to_thread(command.check, alembic_config(database_url))
    await migrate(database_url, "base")
    assert await table_names(database_url) == {"alembic_version"}
    await migrate(database_url)
    await migrate(database_url)


async def test_processes_that_start_together_migrate_once(database_url: str, tmp_path: Path) -> None:
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "app",
            "migrate",
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(PROJECT), "DATABASE_URL": database_url},
        )
        for _ in range(3)
    ]
    assert [await process.wait() for process in processes] == [0, 0, 0]
    assert await table_names(database_url) == {*Table.metadata.tables, "alembic_version"}


async def test_an_old_schema_is_refused_by_name(database_url: str) -> None:
    database = Database(database_url)
    with pytest.raises(RuntimeError, match="python -m app migrate"):
        await require_current_schema(database)
    await migrate(database_url)
    await require_current_schema(database)
    await database.close()


async def test_an_unknown_revision_is_an_error(database_url: str) -> None:
    with pytest.raises(CommandError):
        await migrate(database_url, "no-such-revision")
