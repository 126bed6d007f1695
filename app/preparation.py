"""Finding out, before anybody is served, whatever would keep this process from serving."""

import asyncio
from pathlib import Path
from tempfile import TemporaryFile

from sqlalchemy import make_url, select
from sqlalchemy.exc import IntegrityError

from app.catalog import load_prices
from app.database import UNAVAILABLE, Database, find_revision, head_revision, migrate, require_current_schema
from app.models import GeneratedSecret
from app.security import fingerprint_secret
from app.settings import Secrets, Settings, load_secrets
from app.storage import create_storage


async def prepare(settings: Settings) -> None:
    """Try everything that a start needs. Raises ValueError, OSError or RuntimeError that say what is wrong."""
    await asyncio.to_thread(_require_writable, settings.data_dir)
    secrets = load_secrets(settings)
    try:
        load_prices(settings.prices_file)
    except OSError as error:
        raise RuntimeError(f"PRICES_FILE {settings.prices_file} cannot be read: {error.strerror}") from error
    storage = await asyncio.to_thread(create_storage, settings, secrets)
    await storage.close()
    database = Database(settings.database_url)
    try:
        await prepare_database(database, settings, secrets)
    finally:
        await database.close()


async def prepare_database(database: Database, settings: Settings, secrets: Secrets) -> None:
    """Bring the database to today's schema, or see that it has it, and that it is used with the same secrets.

    Raises RuntimeError that says what is wrong.
    """
    # Without the query: it may hold a password, too.
    shown = make_url(settings.database_url).set(query={}).render_as_string(hide_password=True)
    try:
        if not settings.auto_migrate:
            await require_current_schema(database)
        elif await find_revision(database) != head_revision():
            await _migrate(settings.database_url, shown)
        if not settings.uses_sqlite:
            await _require_same_secrets(database, settings, secrets)
    except UNAVAILABLE as error:
        raise RuntimeError(f"the database {shown} cannot be used: {_reason(error)}") from error


async def _migrate(url: str, shown: str) -> None:
    from alembic.util.exc import CommandError  # here, because most starts find nothing to migrate

    try:
        await migrate(url)
    except CommandError as error:
        raise RuntimeError(f"the database {shown} cannot be migrated, is it of a newer version? {error}") from error


async def _require_same_secrets(database: Database, settings: Settings, secrets: Secrets) -> None:
    """Refuse a secret that this machine made while another machine of the same database made another."""
    made = {
        "jwt_secret": None if settings.jwt_secret else ",".join(secrets.jwt_secrets),
        "credential_keys": None if settings.credential_keys else ",".join(secrets.credential_keys),
    }
    for name, secret in made.items():
        if secret is not None and await _agreed(database, name, ours := fingerprint_secret(secret)) != ours:
            raise RuntimeError(
                f"another machine made a secret for this database that is not the one under {settings.data_dir}:"
                f" set {name.upper()} to the same value on every machine"
            )


async def _agreed(database: Database, name: str, ours: str) -> str | None:
    """The fingerprint of the secret that the first machine made: ours, if that is this one."""
    known = select(GeneratedSecret.fingerprint).where(GeneratedSecret.name == name)
    async with database.snapshot() as session:
        if fingerprint := await session.scalar(known):
            return fingerprint
    try:
        async with database.transaction() as session:
            session.add(GeneratedSecret(name=name, fingerprint=ours))
    except IntegrityError:
        async with database.snapshot() as session:
            return await session.scalar(known)
    return ours


def _require_writable(folder: Path) -> None:
    """Raise RuntimeError when no audio could be kept in a folder."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RuntimeError(f"DATA_DIR {folder} cannot be written to: {error.strerror}") from error


def _reason(error: Exception) -> str:
    origin = getattr(error, "orig", None) or error
    origin = origin.__cause__ or origin
    return f"{type(origin).__name__}: {origin}".strip(": ").splitlines()[0]
