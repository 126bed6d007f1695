"""What the tests share: real servers, users who are logged in, databases of both kinds."""

import gc
import importlib
import itertools
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.security import hash_password
from tests.databases import (
    create_database,
    drop_database,
    empty_database,
    postgres_url,
    provider,
    rows,
    run_apart,
    sqlite_schema,
)
from tests.logins import let_in
from tests.servers import NO_AUTHORITIES, Sandbox, Server, run_backend, run_sandbox
from tests.sweep import Sweep

PASSWORD = "correct-horse-battery"
_numbers = itertools.count(1)


# The files that take longest, working or waiting: begun first, so that no worker is alone with one at last. The cluster
# is not among them: its ten processes would take the time from those that measure some.
LONGEST = (
    "test_faults_store", "test_faults_provider", "test_faults_kills", "test_faults_database", "test_long_text",
    "test_voice_follow", "test_live", "test_voices", "test_repeats", "test_long_text_jobs", "test_live_endings",
    "test_collection", "test_repeat_crashes", "test_deployments", "test_tasks", "test_synthesis", "test_cloning",
    "test_voicebook", "test_crashes", "test_recognition", "test_command_line", "test_live_pause", "test_samples",
    "test_transcription", "test_uploads", "test_records", "test_voice_crashes", "test_enrollments", "test_budget",
    "test_storage_outage", "test_faults_clients", "test_lost_tasks", "test_processes", "test_erasure", "test_retention",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the whole suite run on either database."""
    parser.addoption(
        "--database",
        choices=("sqlite", "postgresql"),
        default="sqlite",
        help="what servers keep their data in, unless a test is about one of them",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Give servers databases of that kind, and let workers leave compiled tests for each other."""
    provider.kind = config.getoption("--database")
    config.pluginmanager.register(Sweep(config, provider))
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Make light of what all tests together are: nothing of it is garbage, and to compile it takes a minute."""
    gc.disable()
    _share_compilation(session.config)
    result = yield
    gc.freeze()
    gc.enable()
    return result


def _share_compilation(config: pytest.Config) -> None:
    """Have each worker compile its part of the tests before it asks for all, which the others have compiled by then."""
    worker, tests = getattr(config, "workerinput", None), config.rootpath / "tests"
    if worker is None or any(
        config.invocation_params.dir / each not in {tests, config.rootpath} for each in config.args
    ):
        return
    number, workers = int(worker["workerid"].removeprefix("gw")), worker["workercount"]
    for file in sorted(tests.rglob("test_*.py"))[number::workers]:
        with suppress(Exception):  # the collection tells it
            importlib.import_module(".".join(file.relative_to(config.rootpath).with_suffix("").parts))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None]:
    """Remove the databases of a file's servers after its last test."""
    result = yield
    if nextitem is None or nextitem.path != item.path:
        provider.drop_unused()
    return result


def pytest_sessionfinish() -> None:
    """Leave nothing behind in PostgreSQL."""
    provider.close()


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


@cache
def _password_hash() -> str:
    return hash_password(PASSWORD)


def copy_user(server: Server, name: str) -> str | None:
    """Another user of a server: to hash a password for each would take a tenth of all tests.

    None where the server has another secret than one that it made itself.
    """
    if not (server.data / "jwt_secret").exists():
        return None
    user_id = uuid.uuid4()
    rows(
        server,
        "INSERT INTO users (id, username, username_key, password_hash, is_active, created_at)"
        " VALUES (?, ?, ?, ?, TRUE, ?)",
        *(user_id, name, name, _password_hash(), datetime.now(UTC)),
    )
    return str(user_id)


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
        else:
            token = let_in(server, uuid.UUID(user_id))
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
    name = run_apart(create_database(provider.template))
    yield name
    run_apart(drop_database(name))


@pytest.fixture
async def schema_copy() -> AsyncIterator[str]:
    """The name of a PostgreSQL database of the test's own with the schema of today."""
    name = await create_database(provider.template)
    yield name
    await drop_database(name)


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
