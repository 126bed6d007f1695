"""Real processes of the product: the backend and the sandbox, on free ports."""

import gc
import multiprocessing
import os
import signal
import socket
import ssl
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import httpx

from app import __main__ as command_line
from app.sandbox import SandboxOptions
from app.sandbox import serve as serve_sandbox
from tests.databases import provider

PROJECT = Path(__file__).resolve().parent.parent
START_SECONDS = 30.0
# uvicorn shuts down in order and then lets the signal have its way.
ENDED_GRACEFULLY = (0, -signal.SIGTERM)
# Without it, each client would load the certificates of all authorities first, to need none: 30 ms.
NO_AUTHORITIES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Server:
    """A running `python -m app …` process."""

    url: str
    folder: Path
    process: "Process" = field(repr=False)
    data: Path = field(default=Path(), repr=False)
    database_url: str = field(default="", repr=False)

    @property
    def log(self) -> str:
        """Everything that the process has written so far."""
        return (self.folder / "server.log").read_text()

    def kill(self) -> None:
        """End the process as a crash would."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """End the process as an operator would, and give its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout=30)


# Importing the program takes longer than most tests: one process does it, and those under test are forked from it.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "aiosqlite",
        "alembic.command",
        "anyio._backends._asyncio",
        "app.main",
        "httpcore",
        "tests.servers",
        "uvicorn.lifespan.on",
        "uvicorn.loops.uvloop",
        "uvicorn.protocols.http.httptools_impl",
        "uvicorn.protocols.websockets.websockets_sansio_impl",
    ]
)


class Process:
    """A process of the program, alone with its folder and its environment."""

    def __init__(self, run: Callable[[], int | None], folder: Path, environment: Mapping[str, str]) -> None:
        self._process = _FORKS.Process(target=_become, args=(run, folder, environment))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.exitcode

    def terminate(self) -> None:
        """Ask it to end."""
        self._process.terminate()

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; gives the exit code. Raises TimeoutError."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise TimeoutError(f"process {self.pid} goes on")
        return code


def _become(run: Callable[[], int | None], folder: Path, environment: Mapping[str, str]) -> None:
    gc.freeze()  # the program itself is no garbage, and to look through it would copy it
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    log = os.open("server.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as in any process: what a server starts is told to use it
    warnings.simplefilter("error", ResourceWarning)
    sys.exit(run())


Kind = TypeVar("Kind", bound=Server)


class Sandbox(Server):
    """The stand-in for DashScope and OSS."""

    @property
    def ws_url(self) -> str:
        """The CosyVoice endpoint."""
        return self.url.replace("http", "ws") + "/api-ws/v1/inference"

    @property
    def http_url(self) -> str:
        """The base of the HTTP services."""
        return f"{self.url}/api/v1"

    @property
    def settings(self) -> dict[str, str]:
        """What tells a backend to use this provider."""
        return {"DASHSCOPE_WS_URL": self.ws_url, "DASHSCOPE_HTTP_URL": self.http_url}

    def calls(self, api_key: str | None = None) -> list[dict[str, Any]]:
        """The syntheses that the provider saw, of one key or of all."""
        return self._seen("calls", api_key)

    def requests(self, api_key: str | None = None) -> list[dict[str, Any]]:
        """The HTTP requests that the provider saw, of one key or of all; result files are fetched without a key."""
        return self._seen("requests", api_key)

    def ledger(self, api_key: str | None = None) -> list[dict[str, Any]]:
        """What the provider has counted, of one key or of all; the oldest first."""
        return self._seen("ledger", api_key)

    def add_voices(
        self, api_key: str, target_model: str = "cosyvoice-v3-flash", prefix: str = "mine", **fields: Any
    ) -> list[str]:
        """Have voices at the provider that were made elsewhere with the same key; the oldest first."""
        made = {"api_key": api_key, "target_model": target_model, "prefix": prefix, **fields}
        voice_ids: list[str] = self._client.post("voices", json=made).raise_for_status().json()["voice_ids"]
        return voice_ids

    def voices(self, api_key: str) -> list[dict[str, Any]]:
        """The voices that the provider has of an account; the oldest first."""
        return self._seen("voices", api_key)

    @contextmanager
    def faults(self, **faults: Any) -> Iterator[None]:
        """Let things go wrong inside the block."""
        self._client.put("faults", json=faults).raise_for_status()
        try:
            yield
        finally:
            self._client.put("faults", json={}).raise_for_status()

    def close(self) -> None:
        """Look into it no more."""
        self._client.close()

    def _seen(self, what: str, api_key: str | None) -> list[dict[str, Any]]:
        asked = {} if api_key is None else {"api_key": api_key}
        seen: list[dict[str, Any]] = self._client.get(what, params=asked).raise_for_status().json()
        return seen

    @cached_property
    def _client(self) -> httpx.Client:
        # A connection is given up before the stand-in does so.
        limits = httpx.Limits(keepalive_expiry=1.0)
        return httpx.Client(base_url=f"{self.url}/_sandbox/", limits=limits, verify=NO_AUTHORITIES, trust_env=False)


@contextmanager
def run_backend(folder: Path, environment: Mapping[str, str]) -> Iterator[Server]:
    """Run `serve` with its data in `folder`; it is stopped at the end if it still runs."""
    port = free_port()
    settings = {
        "DATA_DIR": str(folder / "data"),
        "PUBLIC_BASE_URL": f"http://127.0.0.1:{port}",
        "RATE_LIMIT": "100000/minute",
        "UPSTREAM_RATE": "1000/second",
        **environment,
    }
    data = Path(settings["DATA_DIR"])
    run = partial(command_line.main, ["serve", "--port", str(port)])
    with ExitStack() as stack:
        if "DATABASE_URL" not in settings:
            settings |= stack.enter_context(provider.provide(data))
        server = stack.enter_context(_run(Server, folder, run, port, "/health/live", settings))
        server.data = data
        server.database_url = settings.get("DATABASE_URL", f"sqlite+aiosqlite:///{data / 'app.db'}")
        yield server


@contextmanager
def run_worker(folder: Path, environment: Mapping[str, str]) -> Iterator[Server]:
    """Run `worker`; which database and which data it shares with others stands in the environment."""
    port = free_port()
    run = partial(command_line.main, ["worker", "--port", str(port)])
    settings = {"UPSTREAM_RATE": "1000/second", **environment}
    with _run(Server, folder, run, port, "/health/live", settings) as server:
        yield server


@contextmanager
def run_sandbox(folder: Path, *options: str) -> Iterator[Sandbox]:
    """Run `sandbox` with command line options."""
    port = free_port()
    run = partial(command_line.main, ["sandbox", "--port", str(port), *options])
    with _run(Sandbox, folder, run, port, "/_sandbox/health", {}) as sandbox, closing(sandbox):
        yield sandbox


@contextmanager
def run_special_sandbox(folder: Path, **options: Any) -> Iterator[Sandbox]:
    """Run the stand-in with options that have no switch on the command line."""
    port = free_port()
    run = partial(serve_sandbox, SandboxOptions(**options), "127.0.0.1", port)
    with _run(Sandbox, folder, run, port, "/_sandbox/health", {}) as sandbox, closing(sandbox):
        yield sandbox


@contextmanager
def _run(
    kind: type[Kind],
    folder: Path,
    run: Callable[[], int | None],
    port: int,
    health: str,
    settings: Mapping[str, str],
) -> Iterator[Kind]:
    folder.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "LANG", "TMPDIR"}}
    process = Process(run, folder, {**environment, "PYTHONPATH": str(PROJECT), **settings})
    server = kind(f"http://127.0.0.1:{port}", folder, process)
    try:
        _wait_until_up(server, health)
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=30)
            except TimeoutError:
                process.kill()
                process.wait()
                raise


def _wait_until_up(server: Server, health: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server gave up:\n{server.log}")
        try:
            if httpx.get(server.url + health, timeout=2, verify=NO_AUTHORITIES).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise RuntimeError(f"the server did not come up:\n{server.log}")
