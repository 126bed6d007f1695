"""The rotation of sealing keys, by command, under users who go on."""

import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import update

from app import __main__ as command_line
from app.database import Database
from app.models import ApiKey
from app.security import KeySealer
from app.services.resealing import Resealed, Resealer
from tests.databases import run_apart, sqlite_schema
from tests.traces import create_key, create_user

OLD, NEW, OTHER = "old-" + "1" * 40, "new-" + "2" * 40, "other-" + "3" * 40
API_KEY = "sk-test-0123456789abcdef"


async def fill(database: Database, *keys: str) -> list[uuid.UUID]:
    """Users whose API keys are sealed by these keys."""
    users = [await create_user(database) for _ in keys]
    for user, key in zip(users, keys, strict=True):
        await create_key(database, user, KeySealer((key,)).seal(API_KEY, user))
    return users


async def fill_at(url: str, *keys: str) -> list[uuid.UUID]:
    """The same in a database that nobody has opened."""
    database = Database(url)
    users = await fill(database, *keys)
    await database.close()
    return users


async def test_all_keys_are_sealed_by_the_first_sealing_key(schema_url: str) -> None:
    database = Database(schema_url)
    users = await fill(database, OLD, NEW, OTHER, OLD)
    closed = [users[2]]
    resealer = Resealer(database, KeySealer((NEW, OLD)))
    assert await resealer.renew_all() == Resealed(anew=2, before=1, closed=closed)
    assert await resealer.renew_all() == Resealed(anew=0, before=3, closed=closed)
    new = KeySealer((NEW,))
    async with database.snapshot() as session:
        for user in (users[0], users[1], users[3]):
            row = await session.get(ApiKey, user)
            assert row is not None
            assert new.open(row.sealed, user) == (API_KEY, False)
    await database.close()


async def test_a_key_that_is_replaced_meanwhile_stays(schema_url: str) -> None:
    database = Database(schema_url)
    [user] = await fill(database, OLD)
    sealer = KeySealer((NEW, OLD))
    async with database.snapshot() as session:
        seen = await session.get(ApiKey, user)
    assert seen is not None
    replaced = sealer.seal("sk-test-another", user)
    async with database.transaction() as session:
        await session.execute(update(ApiKey).values(sealed=replaced, updated_at=datetime.now(UTC)))
    await Resealer(database, sealer).renew(seen, API_KEY)
    async with database.snapshot() as session:
        row = await session.get(ApiKey, user)
    assert row is not None
    assert row.sealed == replaced
    await database.close()


def test_the_command_says_what_is_left_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/app.db").write_bytes(sqlite_schema())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CREDENTIAL_KEYS", f"{NEW},{OLD}")
    assert command_line.main(["reseal"]) == 0
    assert "0 API keys were sealed anew" in capsys.readouterr().out
    users = run_apart(fill_at(f"sqlite+aiosqlite:///{tmp_path / 'data/app.db'}", OLD, OTHER))
    assert command_line.main(["reseal"]) == 1
    told = capsys.readouterr()
    assert "1 API keys were sealed anew" in told.out
    assert "1 cannot be opened" in told.err
    assert str(users[1]) in told.err
    assert str(users[0]) not in told.out + told.err
