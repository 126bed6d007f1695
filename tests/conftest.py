"""What the tests share: real servers, users who are logged in, databases of both kinds."""

import itertools
import sqlite3
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.database import migrate
from app.security import TokenSigner
from tests.databases import create_database, drop_database, empty_database, postgres_url, run_apart, sqlite_schema
from tests.servers import NO_AUTHORITIES, Sandbox, Server, run_backend, run_sandbox

PASSWORD = "correct-horse-battery"
_numbers = itertools.count(1)


# The files that take longest, working or waiting: begun first, so that no worker is alone with one at last.
LONGEST = (
    "test_faults_store", "test_faults_provider", "test_faults_kills", "test_faults_database", "test_long_text",
    "test_voice_follow", "test_live", "test_voices", "test_repeats", "test_long_text_jobs", "test_live_endings",
    "test_collection", "test_repeat_crashes", "test_deployments", "test_tasks", "test_synthesis", "test_cloning",
    "test_voicebook", "test_crashes", "test_recognition", "test_command_line", "test_live_pause", "test_samples",
    "test_transcription", "test_uploads", "test_records", "test_voice_crashes", "test_enrollments", "test_budget",
    "test_storage_outage", "test_faults_clients", "test_lost_tasks",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first."""
    places = {f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@dataclass
class Account:
    """A registered user with a client that is logged in."""

    client: httpx.AsyncClient
    username: str
    user_id: str
    api_key: str

    async def synthesize(self, text: str, **fields: Any) -> httpx.Response:
        """Ask for a synthesis with the usual model and voice."""
        body = {"model": "cosyvoice-v3-flash", "voice": "longanyang", "text": text, **fields}
        return await self.client.post("/api/audio/tts/synthesize", json=body)

    async def history(self, **query: Any) -> dict[str, Any]:
        """The user's history as the API shows it."""
        answer = await self.client.get("/api/audio/history", params=query)
        assert answer.status_code == 200, answer.text
        data: dict[str, Any] = answer.json()["data"]
        return data


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run asynchronous tests on asyncio, as the server does."""
    return "asyncio"


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A provider that answers as fast as it can."""
    with run_sandbox(tmp_path_factory.mktemp("sandbox")) as running:
        yield running


@pytest.fixture(scope="session")
def realtime_sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A provider that sends audio as fast as it plays."""
    with run_sandbox(tmp_path_factory.mktemp("realtime_sandbox"), "--realtime") as running:
        yield running


@pytest.fixture(scope="session")
def backend(tmp_path_factory: pytest.TempPathFactory, sandbox: Sandbox) -> Iterator[Server]:
    """The product on its embedded defaults, with the sandbox as provider."""
    with run_backend(tmp_path_factory.mktemp("backend"), sandbox.settings) as running:
        yield running


@pytest.fixture(scope="session")
def realtime_backend(tmp_path_factory: pytest.TempPathFactory, realtime_sandbox: Sandbox) -> Iterator[Server]:
    """The product with a provider that sends audio as fast as it plays."""
    environment = realtime_sandbox.settings
    with run_backend(tmp_path_factory.mktemp("realtime_backend"), environment) as running:
        yield running


_first_users: dict[Path, str] = {}


def copy_user(server: Server, name: str) -> str | None:
    """Another user with the password of the first one of a server: hashing it for each takes a tenth of all tests.

    None where there is no first one yet, or where database and secret are not those that a server makes itself.
    """
    first = _first_users.get(server.folder)
    data = server.folder / "data"
    if first is None or not (data / "app.db").exists() or not (data / "jwt_secret").exists():
        return None
    user_id = uuid.uuid4()
    with closing(sqlite3.connect(data / "app.db", timeout=10)) as database, database:
        copied = database.execute(
            "INSERT INTO users (id, username, username_key, password_hash, is_active, created_at)"
            " SELECT ?, ?, ?, password_hash, is_active, created_at FROM users WHERE id = ?",
            [user_id.hex, name, name, uuid.UUID(first).hex],
        ).rowcount
    return str(user_id) if copied else None


CreateAccount = Callable[..., Awaitable[Account]]


@pytest.fixture
async def create_account() -> AsyncIterator[CreateAccount]:
    """Make users on a server, each with a key of his own unless told otherwise."""
    clients: list[httpx.AsyncClient] = []

    async def create(server: Server, *, api_key: str | None = "", username: str | None = None) -> Account:
        client = httpx.AsyncClient(base_url=server.url, timeout=30, trust_env=False, verify=NO_AUTHORITIES)
        clients.append(client)
        name = username or f"user-{next(_numbers)}-{uuid.uuid4().hex[:8]}"
        login = {"username": name, "password": PASSWORD}
        user_id = copy_user(server, name) if username is None else None
        if user_id is None:
            registered = await client.post("/api/auth/register", json=login)
            assert registered.status_code == 200, registered.text
            user_id = registered.json()["data"]["user_id"]
            token = (await client.post("/api/auth/login", json=login)).json()["data"]["access_token"]
            _first_users.setdefault(server.folder, user_id)
        else:
            token = TokenSigner((server.folder / "data" / "jwt_secret").read_text().strip(), 3600).issue(
                uuid.UUID(user_id)
            )
        client.headers["Authorization"] = f"Bearer {token}"
        key = f"sk-test-{uuid.uuid4().hex[:20]}" if api_key == "" else api_key
        if key is not None:
            stored = await client.put("/api/user/apikey", json={"api_key": key})
            assert stored.status_code == 200, stored.text
        return Account(client, name, user_id, key or "")

    yield create
    for client in clients:
        await client.aclose()


@pytest.fixture
async def account(backend: Server, create_account: CreateAccount) -> Account:
    """A user with a key on the usual server."""
    return await create_account(backend)


@pytest.fixture(params=["sqlite", "postgresql"])
async def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """An empty database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path / 'app.db'}"
        return
    name = await create_database()
    yield postgres_url(name)
    await drop_database(name)


@pytest.fixture(scope="session")
def postgresql_database() -> Iterator[str]:
    """The name of a PostgreSQL database with the schema of today."""
    names: list[str] = []

    async def prepare() -> None:
        names.append(await create_database())
        await migrate(postgres_url(names[0]))

    run_apart(prepare())
    yield names[0]
    run_apart(drop_database(names[0]))


@pytest.fixture(params=["sqlite", "postgresql"])
async def schema_url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """A database of each kind with every table and no row: migrations would take longer than most tests."""
    if request.param == "sqlite":
        file = tmp_path / "app.db"
        file.write_bytes(sqlite_schema())
        yield f"sqlite+aiosqlite:///{file}"
        return
    name = request.getfixturevalue("postgresql_database")
    await empty_database(name)
    yield postgres_url(name)
