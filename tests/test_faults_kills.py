"""The process is killed, or asked to end, while everything is under way."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import WebSocketException

from tests.auditing import audit
from tests.conftest import Account, CreateAccount
from tests.faults import EVERY, Call, Scene, let_claims_run_out, saying
from tests.hearing import RECOGNITION
from tests.narrating import begin, padded
from tests.servers import ENDED_GRACEFULLY, Sandbox, Server, run_backend, run_special_sandbox

MOMENTS = 20
LONGEST_LIFE_SECONDS = 0.8
SPEED = 12.0
LONG_TEXTS_AT_MOST = 8
EXIT_SECONDS = 15.0


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A provider that takes its time, so that there is always something to break off."""
    options = {"speed": SPEED, "task_seconds": 0.3, "voice_seconds": 0.3}
    with run_special_sandbox(tmp_path_factory.mktemp("provider"), **options) as running:
        yield running


class Load:
    """Users who call every route again and again, whatever becomes of it."""

    def __init__(self, provider: Sandbox, accounts: dict[str, Account]) -> None:
        self._provider = provider
        self._accounts = accounts
        self._long_texts = 0
        self.calls = 0

    @asynccontextmanager
    async def on(self, server: Server) -> AsyncIterator[None]:
        """Call inside the block."""
        scene = Scene(server, self._provider)
        for account in self._accounts.values():
            account.client.base_url = httpx.URL(server.url)
        calling = [asyncio.create_task(self._call(scene, route)) for route in self._accounts]
        try:
            yield
        finally:
            for task in calling:
                task.cancel()
            await asyncio.gather(*calling, return_exceptions=True)

    async def _call(self, scene: Scene, route: str) -> None:
        call: Call = self._begin_long_text if route == "long" else EVERY[route]
        while True:
            self.calls += 1
            try:
                await call(scene, self._accounts[route], saying())
            except (httpx.HTTPError, OSError, WebSocketException):
                await asyncio.sleep(0.05)

    async def _begin_long_text(self, scene: Scene, account: Account, text: str) -> str:
        """One of two segments, in the background: whoever lives goes on with it."""
        if self._long_texts == LONG_TEXTS_AT_MOST:
            await asyncio.Event().wait()
        self._long_texts += 1
        await begin(account, padded(2, first=2 * self._long_texts))
        await asyncio.sleep(0.3)
        return "200"


async def test_twenty_deaths_under_load_leave_true_records(
    tmp_path: Path, provider: Sandbox, create_account: CreateAccount
) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")  # noqa: T201 - shown where the test fails
    moments = random.Random(seed)
    settings = provider.settings
    load: Load | None = None
    accounts: dict[str, Account] = {}
    for _ in range(MOMENTS):
        with run_backend(tmp_path, settings) as product:
            if load is None:
                routes = ("synthesize", "stream", "live", "long", "recognize", "transcribe")
                accounts = {route: await create_account(product) for route in routes}
                load = Load(provider, accounts)
            async with load.on(product):
                await asyncio.sleep(moments.uniform(0, LONGEST_LIFE_SECONDS))
                await asyncio.to_thread(product.kill)
    await let_claims_run_out(Scene(product, provider))
    with run_backend(tmp_path, settings) as product:
        for account in accounts.values():
            account.client.base_url = httpx.URL(product.url)
        found = await audit(Scene(product, provider), *accounts.values())
    assert {"succeeded", "interrupted"} <= set(found.statuses)
    assert any(estimated for _, estimated in found.bills)


async def test_an_orderly_end_under_load_settles_everything_in_time(
    tmp_path: Path, provider: Sandbox, create_account: CreateAccount
) -> None:
    drain_seconds = 1
    settings = {**provider.settings, "DRAIN_SECONDS": str(drain_seconds)}
    with run_backend(tmp_path, settings) as product:
        accounts = {route: await create_account(product) for route in EVERY}
        with provider.faults(hold_tasks=3, requests=[{"path": RECOGNITION, "how": "delay", "seconds": 3}]):
            async with Load(provider, accounts).on(product):
                await asyncio.sleep(1.5)
                asked_at = time.monotonic()
                assert await asyncio.to_thread(product.stop) in ENDED_GRACEFULLY
                assert time.monotonic() - asked_at < drain_seconds + EXIT_SECONDS
    leased = "SELECT id FROM records WHERE status = 'running' AND lease_expires_at IS NOT NULL"
    assert await Scene(product, provider).rows(leased) == []
    with run_backend(tmp_path, settings) as product:
        for account in accounts.values():
            account.client.base_url = httpx.URL(product.url)
        found = await audit(Scene(product, provider), *accounts.values())
    assert {"succeeded"} < set(found.statuses) <= {"succeeded", "interrupted"}
    assert not any(is_estimated for _, is_estimated in found.bills)
