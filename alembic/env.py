"""Runs the migrations: one transaction under the database's own lock, so that two starting processes queue."""

import asyncio
from typing import Literal

from alembic import context
from sqlalchemy import Connection, event, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from app.columns import MONEY_DECIMALS, Money, UtcDateTime
from app.models import Table
from app.settings import Settings

# Any number that no other program on the same PostgreSQL database takes as an advisory lock.
MIGRATION_LOCK = 7_215_044_091
LOCK_TIMEOUT_SECONDS = 60


def render_type(kind: str, item: object, _: object) -> str | Literal[False]:
    """Write our own column types into migrations as what they are in the database."""
    if kind == "type" and isinstance(item, Money):
        return f'sa.Numeric(28, {MONEY_DECIMALS}).with_variant(sa.BigInteger(), "sqlite")'
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    return False


def run(connection: Connection) -> None:
    """Migrate on an open transaction; SQLite holds its write lock, PostgreSQL an advisory lock."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
    context.configure(
        connection=connection,
        target_metadata=Table.metadata,
        render_as_batch=True,
        render_item=render_type,
        compare_server_default=True,
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()


async def main() -> None:
    """Connect to the configured database and migrate it."""
    url = context.config.get_main_option("sqlalchemy.url") or Settings().database_url
    sqlite = make_url(url).get_backend_name() == "sqlite"
    engine = create_async_engine(
        url, poolclass=NullPool, connect_args={"timeout": LOCK_TIMEOUT_SECONDS} if sqlite else {}
    )
    if sqlite:
        event.listen(engine.sync_engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
        event.listen(engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    async with engine.begin() as connection:
        await connection.run_sync(run)
    await engine.dispose()


asyncio.run(main())
