"""A small run of each part of the fuzz; `python -m tests.fuzz` makes a long one."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.fuzz.callers import call_hostile, meeting_hostile
from tests.fuzz.clients import visit
from tests.fuzz.house import House, note_log, open_house, take_token
from tests.fuzz.orders import meeting_gateway, order_anything
from tests.fuzz.routes import fuzz_routes, refuse_strangers
from tests.fuzz.tally import Tally


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """What is under fuzz."""
    with open_house(tmp_path_factory.mktemp("house")) as running:
        yield running


def expect_nothing_wrong(tally: Tally) -> None:
    """Something was tried, nothing failed, and no server has met a bug."""
    assert tally.cases
    assert not tally.failures, tally.describe()


def test_every_operation_keeps_to_its_description(house: House) -> None:
    token = take_token(house.server, "sk-test-small-fuzz-of-routes")
    tally = fuzz_routes(house.server.url, token, house.take_token, examples=2, phases=("examples", "fuzzing"))
    note_log(house.server, tally)
    expect_nothing_wrong(tally)
    described = httpx.get(f"{house.server.url}/openapi.json").json()["paths"]
    operations = {f"{method.upper()} {path}" for path, methods in described.items() for method in methods}
    assert operations == tally.cases.keys()


def test_strangers_see_nothing(house: House) -> None:
    tally = refuse_strangers(house.server.url)
    note_log(house.server, tally)
    expect_nothing_wrong(tally)
    assert min(tally.cases.values()) >= 7


async def test_odd_clients_leave_nothing_behind(house: House) -> None:
    expect_nothing_wrong(await visit(house, visits=100, at_once=8, seed=1))


async def test_a_hostile_provider_is_told_from_a_good_one(tmp_path: Path) -> None:
    async with meeting_hostile(tmp_path, seed=1) as (server, provider):
        tally = await call_hostile(server, provider, calls=40, at_once=12, seed=1)
    assert provider.breaches == []
    expect_nothing_wrong(tally)


async def test_hostile_services_are_answered_as_documented(tmp_path: Path) -> None:
    async with meeting_gateway(tmp_path, seed=1) as met:
        expect_nothing_wrong(await order_anything(*met, calls=30, at_once=16, seed=1))
