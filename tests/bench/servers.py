"""Processes as a user starts them: the stand-in, the backend, the baseline; and what they use."""

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from tests.cluster.usage import usage_of
from tests.databases import create_database, drop_database, postgres_url, run_apart

PROJECT = Path(__file__).resolve().parent.parent.parent
START_SECONDS = 60.0
STOP_SECONDS = 30.0
JWT_SECRET, CREDENTIAL_KEY = secrets.token_urlsafe(48), secrets.token_urlsafe(48)


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def shell_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """A shell's environment with these settings and no others."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return {**kept, "PYTHONPATH": str(PROJECT), **settings}


@dataclass(frozen=True, slots=True)
class Running:
    """A process that listens on a port, and those that it has started."""

    port: int
    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def pids(self) -> list[int]:
        """It and its children."""
        found = [self.process.pid]
        for pid in found:
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                with suppress(FileNotFoundError, ProcessLookupError):
                    found += map(int, task.read_text().split())
        return found

    @property
    def memory_bytes(self) -> int:
        """Memory of all of them; what several share is counted once."""
        return self._sum_up("smaps_rollup", r"^Pss:\s+(\d+)")

    @property
    def resident_bytes(self) -> int:
        """Resident memory, as `ps` shows it."""
        return self._sum_up("status", r"^VmRSS:\s+(\d+)")

    @property
    def cpu_seconds(self) -> float:
        """Processor time so far."""
        return sum(usage_of(pid).cpu_seconds for pid in self.pids)

    def _sum_up(self, file: str, kilobytes: str) -> int:
        """Bytes of all of them, where the kernel tells so many kilobytes of each."""
        found = []
        for pid in self.pids:
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                found += re.findall(kilobytes, Path(f"/proc/{pid}/{file}").read_text(), re.MULTILINE)
        return sum(map(int, found)) * 1024

    def wait_until(self, path: str) -> None:
        """Wait until an address answers with 200. Raises RuntimeError when that takes too long."""
        deadline = time.monotonic() + START_SECONDS
        request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=5) as line:
                    line.sendall(request)
                    if b" 200 " in line.recv(64):
                        return
            except OSError:
                pass
            time.sleep(0.005)
        raise RuntimeError(f"it did not come up:\n{self.log.read_text()[-2000:]}")


@contextmanager
def run(arguments: list[str], port: int, folder: Path, settings: Mapping[str, str]) -> Iterator[Running]:
    """Run a Python module until the end of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "server.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=folder,
            env=shell_environment(settings),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield Running(port, process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class StandIn:
    """The provider that everything is measured against."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self.port = running.port
        self.ws_url = f"ws://127.0.0.1:{running.port}/api-ws/v1/inference"

    @property
    def cpu_seconds(self) -> float:
        """Processor time so far."""
        return self._running.cpu_seconds

    def tasks(self) -> bytes:
        """When each task was spoken, as JSON."""
        with urlopen(f"http://127.0.0.1:{self.port}/tasks", timeout=10) as answer:
            told: bytes = answer.read()
            return told


@contextmanager
def run_stand_in(folder: Path) -> Iterator[StandIn]:
    """Run the stand-in."""
    port = free_port()
    with run(["tests.bench.stand_in", "--port", str(port)], port, folder, {}) as running:
        running.wait_until("/tasks")
        yield StandIn(running)


@contextmanager
def run_baseline(folder: Path, stand_in: StandIn) -> Iterator[Running]:
    """Run the plain service."""
    port = free_port()
    arguments = ["uvicorn", "tests.bench.baseline:app", "--port", str(port), "--no-access-log", "--log-level=warning"]
    with run(arguments, port, folder, {"STAND_IN_URL": stand_in.ws_url}) as running:
        running.wait_until("/openapi.json")
        yield running


@contextmanager
def provide_database(kind: str) -> Iterator[dict[str, str]]:
    """Settings that lead to a database of a kind; that of PostgreSQL is dropped afterwards."""
    if kind == "sqlite":
        yield {}
        return
    name = run_apart(create_database())
    try:
        yield {"DATABASE_URL": postgres_url(name)}
    finally:
        run_apart(drop_database(name))


@contextmanager
def run_backend(folder: Path, stand_in: StandIn, settings: Mapping[str, str], workers: int = 1) -> Iterator[Running]:
    """Run `python -m app serve`; limits are out of the way."""
    port = free_port()
    with run(
        ["app", "serve", "--port", str(port)],
        port,
        folder,
        backend_settings(folder, stand_in, settings) | {"WORKERS": str(workers)},
    ) as running:
        running.wait_until("/health/ready")
        yield running


def database_url(folder: Path, settings: Mapping[str, str]) -> str:
    """Where a backend in a folder has its database."""
    return settings.get("DATABASE_URL", f"sqlite+aiosqlite:///{folder / 'data' / 'app.db'}")


def backend_settings(folder: Path, stand_in: StandIn, settings: Mapping[str, str]) -> dict[str, str]:
    """What a backend of the benchmark is told."""
    return {
        "DATA_DIR": str(folder / "data"),
        "DASHSCOPE_WS_URL": stand_in.ws_url,
        "RATE_LIMIT": "100000/second",
        "UPSTREAM_RATE": "100000/second",
        "JWT_SECRET": JWT_SECRET,
        "CREDENTIAL_KEYS": CREDENTIAL_KEY,
        "DRAIN_SECONDS": "5",
        **settings,
    }
