from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import httpx
import pytest
import uvicorn

from app.sandbox import UVICORN_ARGUMENTS, SandboxOptions, create_sandbox
from tests.servers import NO_AUTHORITIES


@dataclass(frozen=True)
class RunningSandbox:
    port: int

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/api-ws/v1/inference"

    def calls(self, task_id: str) -> dict[str, object]:
        """The one call with this task id."""
        entries = httpx.get(f"{self.http_url}/_sandbox/calls", verify=NO_AUTHORITIES).json()
        (call,) = [entry for entry in entries if entry["task_id"] == task_id]
        return dict(call)

    def call_that_ended(self, task_id: str) -> dict[str, object]:
        """The call, once its outcome is known."""
        deadline = time.monotonic() + 5
        while (call := self.calls(task_id))["outcome"] is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return call


@contextmanager
def running(options: SandboxOptions) -> Iterator[RunningSandbox]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_sandbox(options), **UVICORN_ARGUMENTS))  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield RunningSandbox(listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(5)
        with suppress(OSError):
            listener.close()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def sandbox() -> Iterator[RunningSandbox]:
    """A sandbox with default options, shared by all tests: look calls up by task id."""
    with running(SandboxOptions()) as server:
        yield server


@pytest.fixture
def start_sandbox() -> Iterator[Callable[[SandboxOptions], RunningSandbox]]:
    """A sandbox of the test's own."""
    servers = []

    def start(options: SandboxOptions) -> RunningSandbox:
        server = running(options)
        servers.append(server)
        return server.__enter__()

    yield start
    for server in servers:
        server.__exit__(None, None, None)
