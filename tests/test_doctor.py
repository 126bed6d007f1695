"""`python -m app doctor` on installations that are well, and on those that are not."""

import json
import os
import shutil
import socket
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from app import __main__ as command_line
from app.database import Database, migrate
from app.doctor import Finding, examine
from app.doctor.clock import Clocks
from app.doctor.report import collect_secrets, render
from app.models import ApiKey, GeneratedSecret, LongText, Record, User
from app.security import KeySealer
from app.settings import Settings
from tests.databases import create_database, drop_database, postgres_url, sqlite_schema
from tests.faults import OSS_SECRET, oss_settings
from tests.servers import Sandbox
from tests.test_command_line import run_app

KEY = "sk-test-doctor-0123456789"
REDIS_URL = "redis://127.0.0.1:6379/13"
SEALING_KEY = "the-key-that-seals-0123456789abcdefghij"
TOKEN_KEY = "the-key-that-signs-0123456789abcdefghij"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the program is started: nothing is there yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("DASHSCOPE_API_KEY", raising=False)
    return tmp_path


@pytest.fixture
async def postgresql() -> AsyncIterator[str]:
    """An empty PostgreSQL database."""
    name = await create_database()
    yield postgres_url(name)
    await drop_database(name)


@pytest.fixture
def black_hole() -> Iterator[str]:
    """Somebody who takes connections and never says a word; gives his host and port."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def configured(sandbox: Sandbox, **changes: Any) -> Settings:
    """Settings that use the sandbox as provider."""
    given = {name.lower(): value for name, value in sandbox.settings.items()}
    return Settings(**(given | changes))


def levels(findings: list[Finding], check: str) -> list[str]:
    """How a check went."""
    return [each.level for each in findings if each.check == check]


def told(findings: list[Finding], check: str, level: str) -> str:
    """What was found, and what to do about it."""
    return "\n".join(f"{each.found}. {each.advice}" for each in findings if (each.check, each.level) == (check, level))


def failed(findings: list[Finding]) -> set[str]:
    """The checks that fail."""
    return {each.check for each in findings if each.level == "fail"}


# ---- The command


def test_a_fresh_folder_passes_and_is_left_as_it_was(tmp_path: Path, sandbox: Sandbox) -> None:
    environment = {**sandbox.settings, "DASHSCOPE_API_KEY": KEY}
    done = run_app(tmp_path, "doctor", "--json", settings=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] is True
    assert {each["level"] for each in report["checks"]} <= {"ok", "warn", "skip"}
    assert [each["level"] for each in report["checks"] if each["check"] == "api key"] == ["ok", "ok"]
    assert KEY not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
    assert sandbox.ledger(KEY) == []


def test_where_nothing_answers_it_ends_soon_and_shows_no_secret(tmp_path: Path, black_hole: str) -> None:
    secrets = {name: f"{name}-0123456789abcdefghijklmnop" for name in ("jwt", "sealing", "database", "redis", "oss")}
    environment = {
        "DATABASE_URL": f"postgresql+asyncpg://somebody:{secrets['database']}@{black_hole}/voices",
        "REDIS_URL": f"redis://:{secrets['redis']}@{black_hole}/0",
        "JWT_SECRET": secrets["jwt"],
        "CREDENTIAL_KEYS": secrets["sealing"],
        "DASHSCOPE_WS_URL": f"ws://{black_hole}/api-ws/v1/inference",
        "DASHSCOPE_HTTP_URL": f"http://{black_hole}/api/v1",
        **oss_settings(f"http://{black_hole}"),
        "OSS_ACCESS_KEY_SECRET": secrets["oss"],
    }
    began = time.monotonic()
    done = run_app(tmp_path, "doctor", "--api-key", KEY, settings=environment)
    assert time.monotonic() - began < 25, "15 s, and what a busy machine takes to start it"
    assert done.returncode == 1
    assert done.stderr == ""
    for check in ("database", "redis", "storage", "provider", "api key"):
        assert f"FAIL  {check} " in done.stdout
    assert "no answer within" not in done.stdout, "each check knows by itself what it waited for"
    for secret in (KEY, *secrets.values()):
        assert secret not in done.stdout


def test_unusable_settings_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TIMEZONE", "Nowhere/Nothing")
    monkeypatch.setenv("RATE_LIMIT", "often")
    assert command_line.main(["doctor"]) == 2
    shown = capsys.readouterr()
    assert "TIMEZONE" in shown.err
    assert "RATE_LIMIT" in shown.err
    assert shown.out == ""


def test_no_line_of_the_report_holds_a_secret(folder: Path) -> None:
    settings = Settings(database_url="postgresql+asyncpg://me:pass%40word@host/db", jwt_secret=TOKEN_KEY)
    findings = [Finding("x", "fail", f"said pass@word, pass%40word and {KEY}", TOKEN_KEY)]
    for as_json in (False, True):
        shown = render(findings, collect_secrets(settings, KEY), as_json=as_json)
        assert shown.count("***") == 4
        for secret in ("pass@word", "pass%40word", KEY, TOKEN_KEY):
            assert secret not in shown


# ---- Settings and secrets


async def test_what_is_unsafe_or_misspelt_is_warned_of(folder: Path, sandbox: Sandbox) -> None:
    (folder / ".env").write_text("JWT_SECRETS=x\nDATABASE_URI=y\nPOSTGRES_PASSWORD=z\nTIMEZONE=UTC\n")
    findings = await examine(configured(sandbox, workers=2, cors_origins="*", background_jobs=False))
    warned = told(findings, "settings", "warn")
    for part in ("JWT_SECRET must be set", "not SQLite", "CORS_ORIGINS", "without REDIS_URL", "python -m app worker"):
        assert part in warned
    assert "JWT_SECRETS in .env is not a setting. Did you mean JWT_SECRET?" in warned
    assert "Did you mean DATABASE_URL?" in warned
    assert "POSTGRES_PASSWORD" not in warned
    assert not failed(findings)


async def test_secrets_that_others_may_read_or_guess_are_told(folder: Path, sandbox: Sandbox) -> None:
    data = folder / "data"
    data.mkdir()
    (data / "jwt_secret").write_text(TOKEN_KEY)
    (data / "jwt_secret").chmod(0o644)
    findings = await examine(configured(sandbox, credential_keys="short"))
    assert "chmod 600" in told(findings, "secrets", "warn")
    assert "CREDENTIAL_KEYS is too short" in told(findings, "secrets", "fail")


# ---- Database


async def test_an_sqlite_file_is_judged_and_left_as_it_was(folder: Path, sandbox: Sandbox) -> None:
    data = folder / "data"
    data.mkdir()
    file = data / "app.db"
    file.write_bytes(sqlite_schema())
    with closing(sqlite3.connect(file)) as database:
        database.execute("PRAGMA journal_mode=DELETE")
    before = file.read_bytes()
    findings = await examine(configured(sandbox))
    assert levels(findings, "database") == levels(findings, "migrations") == levels(findings, "jobs") == ["ok"]
    assert file.read_bytes() == before
    assert [each.name for each in data.iterdir()] == ["app.db"]

    file.write_bytes(b"no database at all" * 1000)
    findings = await examine(configured(sandbox))
    assert "restore a backup" in told(findings, "database", "fail")
    assert levels(findings, "migrations") == ["skip"]


async def test_a_schema_behind_or_ahead_is_told(folder: Path, sandbox: Sandbox, postgresql: str) -> None:
    def settings(**changes: Any) -> Settings:
        return configured(sandbox, database_url=postgresql, **changes)

    assert levels(await examine(settings()), "migrations") == ["ok"]
    await migrate(postgresql)
    findings = await examine(settings(database_pool_size=300))
    assert levels(findings, "migrations") == ["ok"]
    assert "DATABASE_POOL_SIZE" in told(findings, "database", "warn")
    assert "PostgreSQL" in told(findings, "clock", "ok")
    await migrate(postgresql, "-1")
    assert levels(await examine(settings()), "migrations") == ["warn"]
    behind = await examine(settings(auto_migrate=False))
    assert "python -m app migrate" in told(behind, "migrations", "fail")
    assert levels(behind, "jobs") == ["skip"]
    await run_sql(postgresql, "UPDATE alembic_version SET version_num = '29991231_9999'")
    assert "newer version" in told(await examine(settings()), "migrations", "fail")
    missing = await examine(configured(sandbox, database_url=f"{postgresql}_missing"))
    assert "does not exist" in told(missing, "database", "fail")
    optional = await examine(configured(sandbox, database_url=f"{postgresql}?sslmode=require"))
    assert "ssl=require" in told(optional, "database", "fail")


async def run_sql(url: str, statement: str) -> None:
    database = Database(url)
    async with database.transaction() as session:
        await (await session.connection()).exec_driver_sql(statement)
    await database.close()


async def test_keys_that_do_not_open_and_work_that_nobody_does_are_told(
    folder: Path, sandbox: Sandbox, schema_url: str
) -> None:
    settings = configured(sandbox, database_url=schema_url, jwt_secret=TOKEN_KEY, credential_keys=SEALING_KEY)
    database, now = Database(schema_url), datetime.now(UTC)
    long_ago = now - timedelta(hours=2)
    user = User(username="u", username_key="u", password_hash="-", created_at=now)
    async with database.transaction() as session:
        session.add(user)
        await session.flush()
        sealed = KeySealer((SEALING_KEY,)).seal(KEY, user.id)
        session.add(ApiKey(user_id=user.id, sealed=sealed, masked="sk-****", region="beijing", updated_at=now))
        session.add(record(user.id, long_ago, lease_expires_at=long_ago))
        spoken = record(user.id, long_ago, lease_expires_at=None)
        session.add(spoken)
        await session.flush()
        waiting = {"record_id": spoken.id, "user_id": user.id, "next_check_at": long_ago}
        session.add(LongText(**waiting, segments_total=1, output_key="audio/x.mp3"))
        session.add(GeneratedSecret(name="jwt_secret", fingerprint="0" * 64))
    await database.close()

    findings = await examine(settings)
    assert levels(findings, "sealed keys") == ["ok"]
    assert "none of 1 users" in told(findings, "admins", "ok")
    assert "1 long texts" in told(findings, "jobs", "fail")
    assert "1 records" in told(findings, "jobs", "warn")
    assert "JWT_SECRET is not the one" in told(findings, "agreement", "warn")
    other = settings.model_copy(update={"credential_keys": settings.jwt_secret, "registration": "invite"})
    findings = await examine(other)
    assert "0 of 1" in told(findings, "sealed keys", "fail")
    assert "nobody can invite" in told(findings, "admins", "warn")


def record(user_id: uuid.UUID, created_at: datetime, **columns: Any) -> Record:
    """A running call."""
    return Record(
        user_id=user_id,
        type="tts",
        model_name="cosyvoice-v3-flash",
        status="running",
        input_data="{}",
        unit="character",
        unit_price=Decimal(1),
        currency="CNY",
        expected_quantity=1,
        created_at=created_at,
        **columns,
    )


# ---- Redis, storage and provider


async def test_redis_is_asked_for_its_version_and_its_time(folder: Path, sandbox: Sandbox) -> None:
    findings = await examine(configured(sandbox, redis_url=REDIS_URL))
    if failed(findings) == {"redis"}:
        pytest.skip(f"there is no Redis at {REDIS_URL}")
    assert levels(findings, "redis") == ["ok"]
    assert "Redis" in told(findings, "clock", "ok")


async def test_the_store_is_tried_and_left_as_it_was(
    folder: Path, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.doctor.objects.uuid", SimpleNamespace(uuid4=lambda: "probe"))
    oss = {name.lower(): value for name, value in oss_settings(sandbox.url).items()} | {"oss_bucket": "doctor-bucket"}
    probe = f"{sandbox.url}/doctor-bucket/doctor/doctor-probe.txt"
    findings = await examine(configured(sandbox, **oss))
    for check in ("storage", "playing", "privacy", "held audio"):
        assert levels(findings, check) == ["ok"]
    assert "OSS" in told(findings, "clock", "ok")
    assert httpx.get(probe).status_code == 404

    findings = await examine(configured(sandbox, **oss | {"oss_access_key_secret": "wrong-secret"}))
    assert "OSS_ACCESS_KEY_SECRET" in told(findings, "storage", "fail")
    assert OSS_SECRET not in render(findings, [])
    findings = await examine(configured(sandbox, **oss | {"oss_bucket": "doctor-private"}))
    assert "OSS_URL_MODE=signed" in told(findings, "playing", "fail")
    signed = oss | {"oss_bucket": "doctor-private", "oss_url_mode": "signed"}
    assert levels(await examine(configured(sandbox, **signed)), "playing") == ["ok"]
    with sandbox.faults(oss={"how": "denied", "method": "DELETE"}):
        findings = await examine(configured(sandbox, **oss))
    assert "doctor/doctor-probe.txt could not be removed" in told(findings, "storage", "warn")
    assert httpx.get(probe).status_code == 200


async def test_the_provider_is_asked_whether_it_takes_the_key(folder: Path, sandbox: Sandbox) -> None:
    taken = await examine(configured(sandbox), api_key=KEY)
    assert levels(taken, "provider") == levels(taken, "api key") == ["ok", "ok"]
    refused = await examine(configured(sandbox), api_key="sk-bad-doctor", region="singapore")
    assert levels(refused, "api key") == ["fail", "fail"]
    assert "--region" in told(refused, "api key", "fail")
    assert "sk-bad-doctor" not in render(refused, [])
    assert sandbox.ledger(KEY) == []


# ---- The rest


async def test_audio_that_waits_for_the_store_and_a_folder_that_takes_nothing_are_told(
    folder: Path, sandbox: Sandbox
) -> None:
    held = folder / "data" / "held"
    held.mkdir(parents=True)
    (held / "0").write_bytes(b"audio")
    (held / "0.json").write_text("{}")
    os.utime(held / "0", (time.time() - 7200,) * 2)
    findings = await examine(configured(sandbox))
    assert "the oldest for 120 min, but STORAGE is local" in told(findings, "held audio", "warn")
    shutil.rmtree(folder / "data")
    (folder / "data").write_text("no folder")
    assert "is a file" in told(await examine(configured(sandbox)), "data folder", "fail")


def test_a_clock_is_judged_by_what_is_sure() -> None:
    now = datetime.now(UTC)
    clocks = Clocks()
    clocks.read("PostgreSQL", now, time.time())
    clocks.read("Redis", now + timedelta(seconds=60), time.time())
    clocks.read("far away", now, time.time() - 20)
    clocks.read("OSS", now - timedelta(seconds=1000), time.time(), strict=True)
    findings = clocks.examine()
    assert told(findings, "clock", "ok") == "agrees with PostgreSQL, far away. "
    assert "60 s behind Redis" in told(findings, "clock", "warn")
    assert "1000 s ahead of OSS" in told(findings, "clock", "fail")
