"""The provider fails in every way that the stand-in knows, under every route."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.auditing import audit
from tests.cloning import CUSTOMIZATION
from tests.conftest import Account, CreateAccount
from tests.faults import EVERY, HASTY, RECOGNIZED_SECONDS, SPEECH, Scene, saying, until
from tests.hearing import RECOGNITION, TRANSCRIPTION
from tests.narrating import begin, cancel, record_of
from tests.servers import Sandbox, Server, run_backend, run_special_sandbox


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A provider whose tasks and voices are soon ready."""
    with run_special_sandbox(tmp_path_factory.mktemp("provider"), task_seconds=0.1, voice_seconds=0.1) as running:
        yield running


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory, provider: Sandbox) -> Iterator[Server]:
    """The product with little patience."""
    with run_backend(tmp_path_factory.mktemp("product"), {**provider.settings, **HASTY}) as running:
        yield running


@pytest.fixture
def scene(product: Server, provider: Sandbox) -> Scene:
    """Both."""
    return Scene(product, provider)


@pytest.fixture
async def caller(product: Server, create_account: CreateAccount) -> Account:
    """A user of it."""
    return await create_account(product)


THROTTLED, BROKEN, SILENT = "429 RATE_LIMITED", "502 UPSTREAM_ERROR", "504 TIMEOUT"
SENTENCE = 19
WHOLE = 3 * SENTENCE


@pytest.mark.parametrize("route", SPEECH)
@pytest.mark.parametrize("fault", ["throttle_tasks", "refuse_handshakes"])
async def test_speech_that_is_refused_once_is_asked_for_again(
    scene: Scene, caller: Account, fault: str, route: str
) -> None:
    with scene.sandbox.faults(**{fault: 1}):
        assert await SPEECH[route](scene, caller, saying(3)) == "200"
    found = await audit(scene, caller)
    assert (found.statuses, found.bills, found.counted) == (["succeeded"], [(WHOLE, False)], WHOLE)


@pytest.mark.parametrize("route", ["synthesize", "stream", "live"])
@pytest.mark.parametrize(("fault", "told"), [("throttle_tasks", THROTTLED), ("refuse_handshakes", BROKEN)])
async def test_speech_that_is_always_refused_costs_nothing(
    scene: Scene, caller: Account, fault: str, told: str, route: str
) -> None:
    with scene.sandbox.faults(**{fault: -1}):
        assert await SPEECH[route](scene, caller, saying()) == told
    found = await audit(scene, caller)
    assert (found.statuses, found.bills, found.ledger) == (["failed"], [(0, False)], [])


async def test_a_long_text_waits_for_a_provider_that_refuses_and_can_be_stopped(scene: Scene, caller: Account) -> None:
    text = saying(3)
    with scene.sandbox.faults(throttle_tasks=-1):
        waiting, stopped = await begin(caller, text), await begin(caller, saying())
        await until(lambda: len(scene.sandbox.calls(caller.api_key)) > 2, "nobody asks again")
        assert (await cancel(caller, stopped)).status_code == 200
        assert (await record_of(caller, waiting))["status"] == "running"
    found = await audit(scene, caller)
    assert (found.statuses, found.bills) == (["succeeded", "cancelled"], [(WHOLE, False), (0, False)])


# A route, how its task breaks, after how many of its frames, and what is told and billed then. The first sentence has
# about twelve frames. Long texts buy what broke once more.
BREAKS = [
    *(("synthesize", "close", frames, BROKEN, 0) for frames in (0, 1, 5)),
    ("synthesize", "fail", 1, BROKEN, 0),
    ("synthesize", "fail", 20, BROKEN, SENTENCE),
    ("synthesize", "silent", 1, SILENT, 0),
    ("synthesize", "truncate", 0, BROKEN, WHOLE),
    ("synthesize", "foreign", 1, "200", WHOLE),
    *(("synthesize", how, 1, BROKEN, None) for how in ("garbage", "headless", "misshapen")),
    *(("stream", "close", frames, told, 0) for frames, told in ((0, BROKEN), (1, "broken"), (5, "broken"))),
    ("stream", "fail", 20, "broken", SENTENCE),
    ("stream", "silent", 0, SILENT, 0),
    ("stream", "silent", 20, "broken", SENTENCE),
    ("stream", "truncate", 1, "200", WHOLE),
    ("stream", "garbage", 1, "broken", None),
    ("long", "fail", 0, "200", WHOLE),
    ("long", "close", 20, "200", WHOLE + SENTENCE),
    ("long", "silent", 1, "200", WHOLE),
    ("long", "truncate", 0, "200", 2 * WHOLE),
    ("long", "headless", 5, "200", None),
    *(("live", "close", frames, BROKEN, 0) for frames in (0, 5)),
    ("live", "fail", 20, BROKEN, SENTENCE),
    ("live", "silent", 20, SILENT, SENTENCE),
    ("live", "truncate", 0, BROKEN, WHOLE),
    ("live", "truncate", 5, "200", WHOLE),
    ("live", "misshapen", 1, BROKEN, None),
]


@pytest.mark.parametrize(("route", "how", "frames", "told", "billed"), BREAKS)
async def test_speech_that_breaks_is_billed_as_far_as_it_was_counted(
    scene: Scene, caller: Account, route: str, how: str, frames: int, told: str, billed: int | None
) -> None:
    with scene.sandbox.faults(break_tasks=1, break_how=how, break_after_frames=frames):
        assert await SPEECH[route](scene, caller, saying(3)) == told
    found = await audit(scene, caller)
    assert found.statuses == ["succeeded" if told == "200" else "failed"]
    [(quantity, is_estimated)] = found.bills
    assert not is_estimated
    assert billed is None or quantity == billed


# What an HTTP service does, and what the client of each route is told then.
PATHS = {"recognize": RECOGNITION, "transcribe": TRANSCRIPTION, "voice": CUSTOMIZATION}
THROTTLE = {"status": 429, "code": "Throttling.RateQuota", "message": "Requests rate limit exceeded"}
ONCE_PASSING: list[dict[str, Any]] = [THROTTLE, {"how": "delay", "seconds": 0.3}]
FAILING: list[tuple[str, dict[str, Any], str]] = [
    *((route, {**THROTTLE, "count": -1}, THROTTLED) for route in PATHS),
    *((route, {"status": 500}, BROKEN) for route in PATHS),
    ("transcribe", {"how": "close"}, BROKEN),  # for what nobody answers, the list of tasks is searched in vain
]


def struck(route: str, fault: dict[str, Any]) -> dict[str, Any]:
    """A fault of a route's service."""
    action = {"action": "create_voice"} if route == "voice" else {}
    return {"requests": [{"path": PATHS[route], "method": "POST", "count": 1, **action, **fault}]}


@pytest.mark.parametrize("route", PATHS)
@pytest.mark.parametrize("fault", ONCE_PASSING, ids=["throttled", "delayed"])
async def test_a_service_that_stumbles_once_is_not_noticed(
    scene: Scene, caller: Account, fault: dict[str, Any], route: str
) -> None:
    with scene.sandbox.faults(**struck(route, fault)):
        assert await EVERY[route](scene, caller, "") == "200"
    found = await audit(scene, caller)
    assert found.statuses == ["succeeded"]
    assert found.bills == [(found.counted, False)]
    assert len(found.ledger) == 1


@pytest.mark.parametrize(("route", "fault", "told"), FAILING, ids=str)
async def test_a_service_that_fails_without_work_costs_nothing(
    scene: Scene, caller: Account, route: str, fault: dict[str, Any], told: str
) -> None:
    with scene.sandbox.faults(**struck(route, fault)):
        assert await EVERY[route](scene, caller, "") == told
    found = await audit(scene, caller)
    assert found.ledger == []


LOST: list[tuple[dict[str, Any], str]] = [
    ({"how": "close"}, BROKEN),
    ({"how": "close_after"}, BROKEN),
    ({"how": "silent"}, SILENT),
    ({"how": "delay", "seconds": 2}, SILENT),
    ({"status": 200, "body": "{"}, BROKEN),
]


@pytest.mark.parametrize(("fault", "told"), LOST, ids=str)
async def test_a_recognition_that_is_not_answered_is_billed_as_an_estimate(
    scene: Scene, caller: Account, fault: dict[str, Any], told: str
) -> None:
    with scene.sandbox.faults(**struck("recognize", fault)):
        assert await EVERY["recognize"](scene, caller, "") == told
    found = await audit(scene, caller)
    assert (found.statuses, found.bills) == (["failed"], [(RECOGNIZED_SECONDS, True)])


@pytest.mark.parametrize("route", ["transcribe", "voice"])
@pytest.mark.parametrize("fault", [{"how": "close_after"}, {"how": "delay", "seconds": 2}], ids=str)
async def test_work_whose_answer_is_lost_is_found_by_the_providers_list(
    scene: Scene, caller: Account, route: str, fault: dict[str, Any]
) -> None:
    with scene.sandbox.faults(**struck(route, fault)):
        assert await EVERY[route](scene, caller, "") == "200"
    found = await audit(scene, caller)
    assert (found.statuses, found.bills) == (["succeeded"], [(found.counted, False)])
    assert len(found.ledger) == 1
