"""Backends to test: local files, OSS on a server of these tests, and OSS on the project's sandbox."""

import socket
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import uvicorn

from app.sandbox import UVICORN_ARGUMENTS, SandboxOptions, create_sandbox
from app.storage import LocalStorage, Store
from app.storage import oss as oss_module
from app.storage.links import MediaLinks
from app.storage.oss import OssStorage
from app.storage.shelter import ShelteredStorage
from tests.storage.oss_server import BUCKET, KEY_ID, KEY_SECRET, REGION, OssServer


@pytest.fixture
def oss_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OssServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(oss_module, "BACKOFF_SECONDS", 0.001)
    with OssServer.serving() as server:
        yield server


@pytest.fixture
def build_oss(oss_server: OssServer) -> Callable[..., OssStorage]:
    """Build a client of the server; keywords replace its settings."""

    def build(**changes: object) -> OssStorage:
        usual: dict[str, object] = {
            "endpoint": oss_server.endpoint,
            "region": REGION,
            "bucket": BUCKET,
            "access_key_id": KEY_ID,
            "access_key_secret": KEY_SECRET,
            "timeout_seconds": 5,
        }
        return OssStorage(**(usual | changes))  # type: ignore[arg-type]

    return build


@pytest.fixture
async def oss(build_oss: Callable[..., OssStorage]) -> AsyncIterator[OssStorage]:
    storage = build_oss()
    yield storage
    await storage.close()


@pytest.fixture
def local(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "data" / "media", "http://localhost:8000")


@pytest.fixture(scope="session")
def sandbox_url() -> Iterator[str]:
    """The project's stand-in of OSS, in a thread."""
    server = uvicorn.Server(uvicorn.Config(create_sandbox(), **UVICORN_ARGUMENTS))  # type: ignore[arg-type]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
async def sandbox_oss(sandbox_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OssStorage]:
    """A bucket of the test's own in the sandbox, which checks every signature."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    options = SandboxOptions()
    storage = OssStorage(
        endpoint=sandbox_url,
        region=options.oss_region,
        bucket=f"voices-{uuid.uuid4().hex}",
        access_key_id=options.oss_access_key_id,
        access_key_secret=options.oss_access_key_secret,
        signed_urls=True,
    )
    yield storage
    await storage.close()


@pytest.fixture
def sheltered(oss: OssStorage, tmp_path: Path) -> ShelteredStorage:
    """The server of these tests, sheltered by a folder of the test's own."""
    return ShelteredStorage(oss, tmp_path / "data" / "held", MediaLinks("http://media.test"), max_bytes=10_000_000)


@pytest.fixture(params=["local", "oss", "sandbox_oss", "sheltered"])
def storage(request: pytest.FixtureRequest) -> Store:
    backend: Store = request.getfixturevalue(request.param)
    return backend
