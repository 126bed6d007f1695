"""The object store fails in every way that the stand-in knows, after the provider was paid and before."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.auditing import audit, play
from tests.conftest import Account, CreateAccount
from tests.faults import HASTY, SPEECH, Scene, oss_settings, saying, until
from tests.servers import Sandbox, Server, run_backend, run_special_sandbox
from tests.talking import record
from tests.tunnels import Tunnel, tunnel_to

WHOLE = 38


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A provider that is also the store."""
    with run_special_sandbox(tmp_path_factory.mktemp("provider"), task_seconds=0.1, voice_seconds=0.1) as running:
        yield running


@pytest.fixture(scope="module")
def way(provider: Sandbox) -> Iterator[Tunnel]:
    """The way to the store, which knows what was put there."""
    host, _, port = provider.url.removeprefix("http://").partition(":")
    with tunnel_to(host, int(port)) as tunnel:
        yield tunnel


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory, provider: Sandbox, way: Tunnel) -> Iterator[Server]:
    """The product that keeps its audio there."""
    settings = {**provider.settings, **oss_settings(way.url), **HASTY}
    with run_backend(tmp_path_factory.mktemp("product"), settings) as running:
        yield running


@pytest.fixture
async def scene(product: Server, provider: Sandbox, way: Tunnel, create_account: CreateAccount) -> Scene:
    """All of it, once the store is known to be there again."""
    scene = Scene(product, provider, store=way)
    account = await create_account(product)

    async def is_ready() -> bool:
        return (await account.client.get("/health/ready")).is_success and not scene.held

    await until(is_ready, "the store stays away")
    return scene


@pytest.fixture
async def caller(product: Server, create_account: CreateAccount) -> Account:
    """A user of it."""
    return await create_account(product)


STUMBLES = [
    *(("synthesize", how) for how in ("unavailable", "denied", "cut", "cut_after")),
    ("stream", "unavailable"),
    ("live", "cut_after"),
    ("long", "unavailable"),
]


@pytest.mark.parametrize(("route", "how"), STUMBLES)
async def test_a_store_that_stumbles_once_is_not_noticed(scene: Scene, caller: Account, how: str, route: str) -> None:
    with scene.sandbox.faults(oss={"how": how, "method": "PUT", "count": 1}):
        assert await SPEECH[route](scene, caller, saying()) == "200"
    found = await audit(scene, caller)
    assert (found.statuses, found.bills, found.counted) == (["succeeded"], [(WHOLE, False)], WHOLE)


OUTAGES: list[dict[str, Any]] = [
    {"how": "unavailable"},
    {"how": "denied"},
    {"how": "cut"},
    {"how": "cut_after"},
    {"how": "slow", "seconds": 7},
]


@pytest.mark.parametrize("outage", OUTAGES, ids=lambda outage: outage["how"])
async def test_a_store_that_is_away_costs_nobody_his_audio(
    scene: Scene, create_account: CreateAccount, outage: dict[str, Any]
) -> None:
    # Of a long text, what the store does not take back at once lies about for half a minute: one case is enough.
    routes = [route for route in SPEECH if route != "long" or outage["how"] == "cut"]
    callers = {route: await create_account(scene.server) for route in routes}
    with scene.sandbox.faults(oss=outage):
        calls = [SPEECH[route](scene, callers[route], saying()) for route in routes]
        assert await asyncio.gather(*calls) == ["200"] * len(routes)
        for account in callers.values():
            item = await record(account)
            assert item["output_url"].startswith(f"{scene.server.url}/media/"), item
            await play(account, item["output_url"])
        held = scene.held
    assert len(held) >= len(routes)
    found = await audit(scene, *callers.values())
    assert (found.statuses, found.bills) == (["succeeded"] * len(routes), [(WHOLE, False)] * len(routes))
    for account in callers.values():
        [item] = (await account.history())["items"]
        assert item["output_url"].startswith(scene.store.url if scene.store else "-"), item
