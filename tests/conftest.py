"""What the tests share: real servers, users who are logged in, databases of both kinds."""

import itertools
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import asyncpg
import httpx
import pytest

from tests.servers import Sandbox, Server, run_backend, run_sandbox

POSTGRES = "127.0.0.1:5432"
PASSWORD = "correct-horse-battery"
_numbers = itertools.count(1)


def skip_without(service: str) -> NoReturn:
    """Skip the test where a service is missing; fail it where `REQUIRE_SERVICES` says that all must be there."""
    if os.environ.get("REQUIRE_SERVICES"):
        pytest.fail(f"REQUIRE_SERVICES is set, but there is no {service}")
    pytest.skip(f"there is no {service}")


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


CreateAccount = Callable[..., Awaitable[Account]]


@pytest.fixture
async def create_account() -> AsyncIterator[CreateAccount]:
    """Make users on a server, each with a key of his own unless told otherwise."""
    clients: list[httpx.AsyncClient] = []

    async def create(server: Server, *, api_key: str | None = "", username: str | None = None) -> Account:
        client = httpx.AsyncClient(base_url=server.url, timeout=30, trust_env=False)
        clients.append(client)
        name = username or f"user-{next(_numbers)}-{uuid.uuid4().hex[:8]}"
        login = {"username": name, "password": PASSWORD}
        registered = await client.post("/api/auth/register", json=login)
        assert registered.status_code == 200, registered.text
        token = (await client.post("/api/auth/login", json=login)).json()["data"]["access_token"]
        client.headers["Authorization"] = f"Bearer {token}"
        key = f"sk-test-{uuid.uuid4().hex[:20]}" if api_key == "" else api_key
        if key is not None:
            stored = await client.put("/api/user/apikey", json={"api_key": key})
            assert stored.status_code == 200, stored.text
        return Account(client, name, registered.json()["data"]["user_id"], key or "")

    yield create
    for client in clients:
        await client.aclose()


@pytest.fixture
async def account(backend: Server, create_account: CreateAccount) -> Account:
    """A user with a key on the usual server."""
    return await create_account(backend)


@pytest.fixture(params=["sqlite", "postgresql"])
async def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """An empty database of each kind; PostgreSQL is skipped where none listens on the loopback."""
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path / 'app.db'}"
        return
    name = f"test_{uuid.uuid4().hex}"
    try:
        server = await asyncpg.connect(f"postgresql://root@{POSTGRES}/postgres", timeout=3)
    except (TimeoutError, OSError, asyncpg.PostgresError):
        skip_without(f"PostgreSQL at {POSTGRES}")
    await server.execute(f"CREATE DATABASE {name}")
    yield f"postgresql+asyncpg://root@{POSTGRES}/{name}"
    await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await server.close()
