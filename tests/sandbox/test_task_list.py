from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from app.sandbox import SandboxOptions

from .conftest import RunningSandbox, running
from .services import FILETRANS, PARAFORMER, Json, Services, calling, error

ELSEWHERE = "https://media.example.com/a.mp3"
BEIJING = datetime.timezone(datetime.timedelta(hours=8))


@pytest.fixture(scope="module")
def server() -> Iterator[RunningSandbox]:
    with running(SandboxOptions(task_seconds=0.1)) as server:
        yield server


@pytest.fixture
def services(server: RunningSandbox) -> Iterator[Services]:
    with calling(server) as services:
        yield services


@pytest.fixture
def slow(start_sandbox: Callable[[SandboxOptions], RunningSandbox]) -> Iterator[Services]:
    with calling(start_sandbox(SandboxOptions(task_seconds=1.2))) as services:
        yield services


def test_tasks_are_listed_by_page(services: Services) -> None:
    done = services.transcribe(FILETRANS, ELSEWHERE)["output"]["task_id"]
    failed = services.transcribe(PARAFORMER, "https://media.example.com/broken.mp3")["output"]["task_id"]

    def listed(**query: Any) -> Json:
        return dict(services.http.get("/api/v1/tasks/", params=query).json())

    everything = listed()
    assert {name: everything[name] for name in ("total", "total_page", "page_no", "page_size")} == {
        "total": 2,
        "total_page": 1,
        "page_no": 1,
        "page_size": 10,
    }
    assert [entry["task_id"] for entry in everything["data"]] == [failed, done]
    first = everything["data"][1]
    assert first.pop("request_id") == next(
        seen["request_id"] for seen in services.requests() if seen["task_id"] == done
    )
    created, started, ended = (first.pop(name) for name in ("gmt_create", "start_time", "end_time"))
    assert created <= started <= ended <= time.time() * 1000
    assert created == pytest.approx(time.time() * 1000, abs=60_000)
    assert first == {
        "task_id": done,
        "status": "SUCCEEDED",
        "model_name": FILETRANS,
        "region": "cn-beijing",
        "api_key_id": "sandbox",
        "caller_uid": "sandbox",
        "caller_parent_id": "sandbox",
        "user_api_unique_key": f"apikey:v1:audio:asr:transcription:{FILETRANS}",
    }
    assert [entry["task_id"] for entry in listed(page_size=1, page_no=2)["data"]] == [done]
    assert [entry["task_id"] for entry in listed(status="FAILED")["data"]] == [failed]
    assert [entry["task_id"] for entry in listed(model_name=FILETRANS)["data"]] == [done]
    assert [entry["task_id"] for entry in listed(task_id=failed)["data"]] == [failed]
    assert listed(start_time="20200101000000", end_time="20200101120000")["total"] == 0
    for query in ({"start_time": "20200101000000"}, {"page_no": "0"}, {"end_time": "yesterday"}):
        assert error(services.http.get("/api/v1/tasks", params=query))[1] == "InvalidParameter"


def test_the_list_looks_through_a_window_of_a_day(services: Services) -> None:
    task_id = services.transcribe(FILETRANS, ELSEWHERE)["output"]["task_id"]
    now = datetime.datetime.now(BEIJING)

    def window(start: float, end: float) -> httpx.Response:
        """The list from and to so many hours from now."""
        times = {"start_time": start, "end_time": end}
        query = {name: f"{now + datetime.timedelta(hours=hours):%Y%m%d%H%M%S}" for name, hours in times.items()}
        return services.http.get("/api/v1/tasks/", params=query)

    for start, end, found in [(-23, 1, [task_id]), (-1, 1, [task_id]), (-24, -1, []), (1, 2, [])]:
        assert [entry["task_id"] for entry in window(start, end).json()["data"]] == found
    for start, end in [(-24, 1), (1, -1)]:
        assert error(window(start, end))[:2] == (400, "InvalidParameter")


def test_the_list_tells_how_far_a_task_is(slow: Services) -> None:
    canceled, task_id = (slow.submit(FILETRANS, ELSEWHERE).json()["output"]["task_id"] for _ in range(2))
    slow.http.post(f"/api/v1/tasks/{canceled}/cancel").raise_for_status()
    known: dict[str, set[str]] = {}
    deadline = time.monotonic() + 5
    while "SUCCEEDED" not in known and time.monotonic() < deadline:
        going_on, ended = slow.http.get("/api/v1/tasks/").json()["data"]
        assert (going_on["task_id"], ended["task_id"], ended["status"]) == (task_id, canceled, "CANCELED")
        known[going_on["status"]] = going_on.keys() & {"start_time", "end_time"}
        time.sleep(0.02)
    assert known == {"PENDING": set(), "RUNNING": {"start_time"}, "SUCCEEDED": {"start_time", "end_time"}}
    assert ended.keys() & {"start_time", "end_time"} == {"end_time"}
