"""A small run of each part of the fuzz; `python -m tests.fuzz` makes a long one."""

from collections.abc import Iterator

import httpx
import pytest

from tests.fuzz.house import House, open_house, take_token, wrong_lines
from tests.fuzz.routes import fuzz_routes, refuse_strangers
from tests.fuzz.tally import Tally


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """What is under fuzz."""
    with open_house(tmp_path_factory.mktemp("house")) as running:
        yield running


def expect_nothing_wrong(tally: Tally, house: House) -> None:
    """Everything was tried, nothing failed, and the server has met no bug."""
    assert tally.cases
    assert not tally.failures, tally.describe()
    assert wrong_lines(house.server) == []


def test_every_operation_keeps_to_its_description(house: House) -> None:
    token = take_token(house.server, "sk-test-small-fuzz-of-routes")
    tally = fuzz_routes(house.server.url, token, house.take_token, examples=5, phases=("examples", "fuzzing"))
    expect_nothing_wrong(tally, house)
    described = httpx.get(f"{house.server.url}/openapi.json").json()["paths"]
    operations = {f"{method.upper()} {path}" for path, methods in described.items() for method in methods}
    assert operations == tally.cases.keys()


def test_strangers_see_nothing(house: House) -> None:
    tally = refuse_strangers(house.server.url)
    expect_nothing_wrong(tally, house)
    assert min(tally.cases.values()) >= 7
