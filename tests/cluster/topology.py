"""The processes of the cluster: started, killed, replaced and measured."""

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import redis.asyncio

from app import __main__ as command_line
from app.database import migrate
from tests.cluster.calls import call
from tests.cluster.proxy import Proxy, is_installed, run_proxy
from tests.cluster.usage import Usage, children_of, serving_database, usage_of, usage_of_all
from tests.databases import POSTGRES, create_database, drop_database, postgres_url
from tests.faults import OSS_SECRET, oss_settings
from tests.servers import PROJECT, START_SECONDS, Process, Sandbox, free_port, run_special_sandbox
from tests.skipping import skip_without

REDIS_URL = "redis://127.0.0.1:6379/14"
JWT_SECRET = "a-secret-of-the-cluster-that-signs-logins"
CREDENTIAL_KEY = "a-secret-of-the-cluster-that-seals-keys"
SECRETS = (JWT_SECRET, CREDENTIAL_KEY, OSS_SECRET)


class Member:
    """A place in the cluster: one process after the other on the same port."""

    def __init__(self, name: str, command: str, folder: Path, settings: dict[str, str]) -> None:
        self.name = name
        self.port = free_port()
        self._command = [command, "--port", str(self.port)]
        self._folder = folder
        self._settings = settings
        self._process: Process | None = None
        self._used = Usage()
        self.killed_at: list[float] = []

    @property
    def address(self) -> str:
        """Where nginx finds it."""
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """Everything that its processes have written."""
        return (self._folder / "server.log").read_text()

    @property
    def usage(self) -> Usage:
        """What all its processes have used so far."""
        return self._used + usage_of(self._process.pid) if self._process else self._used

    async def start(self) -> float:
        """Start a process, and wait until it answers; gives how many seconds that took."""
        began = time.monotonic()
        self._folder.mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "LANG", "TMPDIR"}}
        environment = {**kept, "PYTHONPATH": str(PROJECT), **self._settings}
        process = Process(partial(command_line.main, self._command), self._folder, environment)
        self._process = process
        while (await call(self.port, "GET", "/health/live", {})).status != 200:
            if process.poll() is not None or time.monotonic() - began > START_SECONDS:
                raise RuntimeError(f"{self.name} did not come up:\n{self.log[-4000:]}")
            await asyncio.sleep(0.05)
        return time.monotonic() - began

    async def kill(self) -> float:
        """End the process as a crash would; gives the moment by the clock."""
        process = self._require_process()
        at = time.time()
        self.killed_at.append(at)
        process.kill()
        await asyncio.to_thread(process.wait, 10)
        self._process = None
        return at

    async def stop(self) -> float:
        """End the process as an operator would; gives how many seconds it took."""
        process = self._require_process()
        began = time.monotonic()
        process.terminate()
        await asyncio.to_thread(process.wait, 60)
        self._process = None
        return time.monotonic() - began

    async def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            await self.stop()

    def _require_process(self) -> Process:
        assert self._process is not None, f"{self.name} does not run"
        self._used = self.usage
        return self._process


@dataclass
class Cluster:
    """Everything that runs."""

    sandbox: Sandbox
    proxy: Proxy
    backends: tuple[Member, Member]
    worker: Member
    database: str
    redis_pid: int
    folder: Path

    @property
    def logs(self) -> dict[str, str]:
        """What the product's processes and nginx have written."""
        members = {member.name: member.log for member in (*self.backends, self.worker)}
        return {**members, "nginx": self.proxy.log}

    async def rows(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Read the database, or change it; values are `$1` and so on."""
        database = await asyncpg.connect(f"postgresql://root@{POSTGRES}/{self.database}", timeout=10)
        try:
            return [tuple(row) for row in await database.fetch(sql, *values)]
        finally:
            await database.close()

    def usage(self) -> dict[str, Usage]:
        """What each part has used so far; PostgreSQL's connections that are closed are not counted."""
        nginx = self.proxy.process.pid
        return {
            "sandbox": usage_of(self.sandbox.process.pid),
            **{member.name: member.usage for member in (*self.backends, self.worker)},
            "nginx": usage_of_all([nginx, *children_of(nginx)]),
            "postgresql": usage_of_all(serving_database(self.database)),
            "redis": usage_of(self.redis_pid),
            "load": usage_of(os.getpid()),
        }


@asynccontextmanager
async def run_cluster(folder: Path, speed: float, pool_size: int) -> AsyncIterator[Cluster]:
    """Run the whole topology on an empty database; the sandbox speaks `speed` times as fast as its speech plays.

    The test is skipped where PostgreSQL, Redis or nginx is missing.
    """
    if not is_installed():
        skip_without("nginx")
    redis_pid = await _redis_pid()
    async with AsyncExitStack() as running:
        database = await create_database()
        running.push_async_callback(drop_database, database)
        await migrate(postgres_url(database))
        sandbox = running.enter_context(
            run_special_sandbox(
                folder / "sandbox", speed=speed, calls_kept=1_000_000, oss_max_total_bytes=8 * 1024 * 1024 * 1024
            )
        )
        settings = {
            **sandbox.settings,
            **oss_settings(sandbox.url),
            "ENVIRONMENT": "production",
            "DATA_DIR": str(folder / "data"),
            "DATABASE_URL": postgres_url(database),
            "DATABASE_POOL_SIZE": str(pool_size),
            "REDIS_URL": REDIS_URL,
            "AUTO_MIGRATE": "false",
            "BACKGROUND_JOBS": "false",
            "JWT_SECRET": JWT_SECRET,
            "CREDENTIAL_KEYS": CREDENTIAL_KEY,
        }
        names = ("backend-1", "backend-2")
        backends = [Member(name, "serve", folder / name, settings) for name in names]
        proxy = running.enter_context(run_proxy(folder / "nginx", [member.port for member in backends]))
        settings["PUBLIC_BASE_URL"] = proxy.url
        worker = Member("worker", "worker", folder / "worker", settings)
        for member in (*backends, worker):
            running.push_async_callback(member.close)
            await member.start()
        yield Cluster(sandbox, proxy, (backends[0], backends[1]), worker, database, redis_pid, folder)


async def _redis_pid() -> int:
    client = redis.asyncio.Redis.from_url(REDIS_URL)
    try:
        told = await client.info("server")
    except redis.exceptions.ConnectionError:
        skip_without(f"Redis at {REDIS_URL}")
    finally:
        await client.aclose()
    return int(told["process_id"])


def new_api_key() -> str:
    """A key that nobody has."""
    return f"sk-test-{uuid.uuid4().hex}"
