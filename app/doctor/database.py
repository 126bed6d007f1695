"""The database: whether it is there, sound, and at the schema of this version. Nothing is written or made."""

import os
import sqlite3
import time
from asyncio import to_thread
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from asyncpg import PostgresError
from sqlalchemy import URL, Connection, event, make_url, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from app.database import alembic_config, create_engine
from app.doctor.case import Case
from app.doctor.failures import explain_failure
from app.doctor.finding import Finding, fail, ok, warn

CHECK = "database"
MIGRATIONS = "migrations"
OLDEST_POSTGRESQL = 12
SLOW_MS = 20.0
QUICK_CHECK_SECONDS = 3.0
_RESTORE = "Stop the program, keep a copy of the file, and restore a backup."
_NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "ceph", "fuse.glusterfs", "lustre"}
_FACTS = text(
    "SELECT current_setting('server_version'), current_setting('server_version_num')::int,"
    " current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int,"
    " current_setting('server_encoding'), has_schema_privilege(current_schema(), 'CREATE')"
)


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite address; None for PostgreSQL, and for what is kept in memory."""
    address = make_url(url)
    named = address.get_backend_name() == "sqlite" and address.database not in {None, "", ":memory:"}
    return Path(str(address.database)) if named else None


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[AsyncEngine]:
    """An engine that makes no SQLite file, and leaves one as it is."""
    file = sqlite_file(url)
    if file is None:
        engine = create_engine(url)
    else:
        address = URL.create("sqlite+aiosqlite", database=_uri(file), query={"mode": "rw", "uri": "true"})
        engine = create_async_engine(address, hide_parameters=True)
        event.listen(engine.sync_engine, "connect", _forbid_writing)
    try:
        yield engine
    finally:
        await engine.dispose()


async def examine_database(case: Case, engine: AsyncEngine) -> list[Finding]:
    """Whether the database answers, and is fit for its work."""
    url = case.settings.database_url
    try:
        if not case.settings.uses_sqlite:
            return await _examine_postgresql(case, engine)
        file = sqlite_file(url)
        return await to_thread(_examine_sqlite, file) if file else await _examine_memory(engine)
    except (SQLAlchemyError, PostgresError, OSError) as error:
        return [_unreachable(error)]
    except TypeError:
        advice = "Remove what stands behind the ? of the address; for TLS, write ?ssl=require instead of sslmode."
        return [fail(CHECK, "DATABASE_URL has an option that the driver does not know", advice)]


async def read_revisions(engine: AsyncEngine) -> tuple[str | None, str | None]:
    """The schema's revision, if it has one, and the one that this version needs."""
    async with engine.connect() as connection:
        revision = await connection.run_sync(_current_revision)
    return revision, _scripts().get_current_head()


def examine_migrations(case: Case, revision: str | None, head: str | None) -> list[Finding]:
    """Compare the schema's revision with that of this version."""
    if revision == head:
        return [ok(MIGRATIONS, f"at {head}, as this version needs")]
    if revision is not None and not _is_known(revision):
        found = f"at {revision}, which this version does not know: the database is of a newer version"
        return [fail(MIGRATIONS, found, f"Upgrade the program: this one needs {head} and does not start.")]
    found = "the database is empty" if revision is None else f"at {revision}, behind {head}"
    if not case.settings.auto_migrate:
        return [fail(MIGRATIONS, found, "Run: python -m app migrate (AUTO_MIGRATE is off: no start does it)")]
    if revision is None:
        return [ok(MIGRATIONS, f"{found}: the first start makes the tables")]
    return [warn(MIGRATIONS, found, "The next start brings it up to date; or run: python -m app migrate")]


def find_missing_file(url: str) -> Finding | None:
    """Say so where the SQLite file is not there yet, so that there is nothing to open. It looks at the disk."""
    file = sqlite_file(url)
    if file is None or file.exists():
        return None
    return ok(CHECK, f"{file} is not there yet: the first start makes it")


def examine_address(url: str) -> Finding | None:
    """Say so where the address cannot even be read; it is not shown, for it may hold a password."""
    try:
        address = make_url(url)
        if address.get_backend_name() == "sqlite" or address.host:
            return None
    except (ArgumentError, ValueError):
        pass
    advice = "Write it as postgresql+asyncpg://user:password@host:5432/name, with %40 for @ in the password."
    return fail(CHECK, "DATABASE_URL is malformed", advice)


async def _examine_postgresql(case: Case, engine: AsyncEngine) -> list[Finding]:
    async with engine.connect() as connection:
        version, number, available, encoding, may_create = (await connection.execute(_FACTS)).one()
        asked_at, began = time.time(), time.perf_counter()
        now = await connection.scalar(text("SELECT clock_timestamp()"))
        latency_ms = (time.perf_counter() - began) * 1000
    case.clocks.read("PostgreSQL", now, asked_at)
    found = f"PostgreSQL {version.split()[0]} answers in {latency_ms:.1f} ms"
    findings = [
        warn(CHECK, found, "Every request asks it several times: bring it nearer.")
        if latency_ms > SLOW_MS
        else ok(CHECK, found)
    ]
    if number < OLDEST_POSTGRESQL * 10_000:
        findings.append(fail(CHECK, f"PostgreSQL {version} is too old", f"Upgrade to {OLDEST_POSTGRESQL} or later."))
    if encoding != "UTF8":
        advice = "Make the database anew: CREATE DATABASE name ENCODING 'UTF8' TEMPLATE template0"
        findings.append(fail(CHECK, f"its encoding is {encoding}, which cannot hold every text", advice))
    # Each process also has one for announcements.
    wanted = (case.settings.database_pool_size * 2 + 1) * case.processes
    if wanted > available:
        found = (
            f"{case.processes} processes may take {wanted} connections (twice DATABASE_POOL_SIZE and one each), "
            f"PostgreSQL has {available}"
        )
        findings.append(warn(CHECK, found, "Lower DATABASE_POOL_SIZE, or raise max_connections. Count every machine."))
    if not may_create:
        found = "its user may not make tables, so that migrations fail"
        findings.append(warn(CHECK, found, "GRANT CREATE ON SCHEMA public TO the user of DATABASE_URL."))
    return findings


async def _examine_memory(engine: AsyncEngine) -> list[Finding]:
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
    return [warn(CHECK, "SQLite in memory: everything is lost at the end", "Unset DATABASE_URL, or name a file.")]


def _examine_sqlite(file: Path) -> list[Finding]:
    """Look at the file by a connection that can be broken off. It blocks."""
    try:
        mode, verdict = _check_sqlite(file)
    except sqlite3.OperationalError as error:
        return [fail(CHECK, f"SQLite cannot read {file}: {error}", "See who uses the file, its rights and its disk.")]
    except sqlite3.DatabaseError as error:
        return [fail(CHECK, f"{file} cannot be read: {error}", _RESTORE)]
    if verdict not in {"ok", None}:
        return [fail(CHECK, f"{file} is damaged: {verdict}", _RESTORE)]
    if not (_is_writable(file) and _is_writable(file.absolute().parent)):
        advice = "Give the file and its folder to the user that serves (chown)."
        return [fail(CHECK, f"{file} or its folder cannot be written", advice)]
    soundness = "sound" if verdict else f"not checked whole in {QUICK_CHECK_SECONDS:g} s"
    size = f"{file.stat().st_size / 1024**2:.1f} MB"
    findings = [ok(CHECK, f"SQLite {sqlite3.sqlite_version}, {file}, {size}, journal {mode}, {soundness}")]
    if (kind := _file_system(file.resolve())) in _NETWORK_FILE_SYSTEMS:
        advice = "Move it to a local disk, or use PostgreSQL: SQLite's locks do not hold over a network."
        findings.append(warn(CHECK, f"{file} is on a network file system ({kind})", advice))
    return findings


def _check_sqlite(file: Path) -> tuple[str, str | None]:
    """The journal's mode, and what SQLite says of the file: None where it takes too long to say."""
    deadline = time.monotonic() + QUICK_CHECK_SECONDS
    with closing(sqlite3.connect(f"{_uri(file)}?mode=rw", uri=True, timeout=QUICK_CHECK_SECONDS)) as database:
        database.execute("PRAGMA query_only=ON")
        (mode,) = database.execute("PRAGMA journal_mode").fetchone()
        database.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
        try:
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.OperationalError:
            if time.monotonic() < deadline:
                raise
            return mode, None
    return mode, verdict


def _is_writable(path: Path) -> bool:
    return os.access(path, os.W_OK)


def _file_system(file: Path) -> str:
    """The kind of file system that a file is on, as Linux tells it; nothing elsewhere."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return ""
    kinds = {Path(fields[1].replace("\\040", " ")): fields[2] for fields in mounts if len(fields) > 2}
    return next((kinds[folder] for folder in file.parents if folder in kinds), "")


def _uri(file: Path) -> str:
    return file.absolute().as_uri()


def _forbid_writing(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA query_only=ON")
    cursor.close()


def _current_revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _is_known(revision: str) -> bool:
    try:
        return _scripts().get_revision(revision) is not None
    except CommandError:
        return False


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(alembic_config(""))


def _unreachable(error: Exception) -> Finding:
    """What PostgreSQL says of its own accord is told; it names users and databases, but no password."""
    original: Any = error.orig if isinstance(error, DBAPIError) else error
    state = str(getattr(original, "sqlstate", None) or "")
    if state:
        told = str(original.__cause__ or original)
        if state == "3D000":
            return fail(CHECK, f"PostgreSQL refuses: {told}", "Make it (CREATE DATABASE), or correct DATABASE_URL.")
        if state.startswith("28"):
            return fail(CHECK, f"PostgreSQL refuses: {told}", "Correct user and password in DATABASE_URL.")
        if state.startswith("53"):
            return fail(CHECK, f"PostgreSQL refuses: {told}", "Raise max_connections, or lower DATABASE_POOL_SIZE.")
        return fail(CHECK, f"PostgreSQL refuses: {told}", "Look into its log; try again once it is up.")
    found, advice = explain_failure(original)
    return fail(CHECK, f"the database cannot be reached: {found}", f"{advice} The address is DATABASE_URL.")
