from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from app.sandbox import SandboxOptions

from .conftest import RunningSandbox, running
from .services import (
    ANYBODY,
    FILETRANS,
    FLASH,
    PARAFORMER,
    RECOGNITION,
    Services,
    calling,
    data_uri,
    error,
    oss_error,
    tone,
)

ELSEWHERE = "https://media.example.com/a.mp3"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningSandbox]:
    with running(SandboxOptions(task_seconds=0.1)) as server:
        yield server


@pytest.fixture
def services(server: RunningSandbox) -> Iterator[Services]:
    with calling(server) as services:
        yield services
        services.switch_on()


def test_requests_are_noted(services: Services) -> None:
    audio = tone(1.5)
    headers = {"X-DashScope-WorkSpace": "ws-1", "X-DashScope-SSE": "enable"}
    options = {"asr_options": {"language": "zh"}}
    services.recognise(data_uri(audio), context="词", parameters=options, headers=headers)
    task = services.transcribe(PARAFORMER, ELSEWHERE)
    first, submitted, *queries = services.requests()
    assert first["time"] < submitted["time"]
    assert first["request_id"] != submitted["request_id"]
    assert {name: first[name] for name in first if name not in ("time", "request_id")} == {
        "method": "POST",
        "path": RECOGNITION,
        "query": "",
        "api_key": services.key,
        "headers": {"x-dashscope-workspace": "ws-1", "x-dashscope-sse": "enable"},
        "model": FLASH,
        "action": None,
        "input": {
            "messages": [
                {"role": "system", "content": [{"text": "词"}]},
                {
                    "role": "user",
                    "content": [{"audio": f"data:audio/wav;base64,({len(data_uri(audio))} characters)"}],
                },
            ]
        },
        "parameters": options,
        "audio_source": "data",
        "audio_bytes": len(audio),
        "task_id": None,
        "counted": 2,
        "fault": None,
        "status": 200,
        "error_code": None,
    }
    assert submitted["input"] == {"file_urls": [ELSEWHERE]}
    assert submitted["headers"] == {"x-dashscope-async": "enable"}
    assert (submitted["task_id"], submitted["audio_source"]) == (task["output"]["task_id"], "url")
    assert {query["task_id"] for query in queries} == {submitted["task_id"]}
    assert all(query["method"] == "GET" for query in queries)


def test_the_list_of_requests_is_cleared(start_sandbox: Any) -> None:
    with calling(start_sandbox(SandboxOptions())) as services:
        services.query("x")
        assert len(services.requests()) == 1
        assert ANYBODY.delete(f"{services.server.http_url}/_sandbox/requests").status_code == 204
        assert services.requests() == []


def test_answers_can_be_replaced(services: Services) -> None:
    busy = {"status": 429, "code": "Throttling.RateQuota", "message": "slow down", "count": 2}
    services.switch_on(requests=[{"path": RECOGNITION, **busy}, {"path": "/api/v1/tasks", "status": 503}])
    assert [error(services.recognise(ELSEWHERE)) for _ in range(2)] == [(429, "Throttling.RateQuota", "slow down")] * 2
    assert services.recognise(ELSEWHERE).status_code == 200
    assert services.http.get("/api/v1/uploads", params={"action": "getPolicy", "model": FLASH}).status_code == 200
    assert [error(services.http.get("/api/v1/tasks/x"))[:2] for _ in range(2)] == [(503, "InternalError")] * 2
    noted = services.requests()
    assert (noted[0]["fault"], noted[0]["status"]) == ("answer", 429)
    assert noted[2]["fault"] is None


def test_answers_can_name_a_time_to_retry(services: Services) -> None:
    services.switch_on(
        requests=[{"status": 429, "retry_after": 7, "count": 1}, {"status": 503, "body": "", "count": 1}]
    )
    answers = [services.recognise(ELSEWHERE) for _ in range(3)]
    told = [(answer.status_code, answer.headers.get("retry-after")) for answer in answers]
    assert told == [(429, "7"), (503, None), (200, None)]


def test_answers_can_be_no_json(services: Services) -> None:
    services.switch_on(requests=[{"method": "POST", "status": 200, "body": "<html>"}])
    assert services.recognise(ELSEWHERE).text == "<html>"
    assert services.query("x")["output"]["task_status"] == "UNKNOWN"


def test_answers_can_be_late(services: Services) -> None:
    services.switch_on(requests=[{"how": "delay", "seconds": 0.3, "count": 1}])
    started = time.monotonic()
    assert services.recognise(ELSEWHERE).status_code == 200
    assert time.monotonic() - started >= 0.3
    assert services.recognise(ELSEWHERE).status_code == 200
    assert [noted["fault"] for noted in services.requests()] == ["delay", None]


def test_answers_can_never_come(services: Services) -> None:
    services.switch_on(requests=[{"path": RECOGNITION, "how": "silent", "count": 1}])
    with pytest.raises(httpx.ReadTimeout), calling(services.server) as impatient:
        impatient.http.post(RECOGNITION, json={}, timeout=0.2)
    assert services.recognise(ELSEWHERE).status_code == 200


@pytest.mark.parametrize(("how", "was_done"), [("close", False), ("close_after", True)])
def test_connections_can_be_closed(services: Services, how: str, was_done: bool) -> None:
    services.switch_on(requests=[{"how": how, "count": 1}])
    with pytest.raises(httpx.TransportError):
        services.submit(FILETRANS, ELSEWHERE)
    (noted,) = services.requests()
    assert (noted["fault"], noted["status"]) == (how, None)
    assert (noted["task_id"] is not None) == was_done
    assert services.http.get("/api/v1/tasks/").json()["total"] == was_done


def test_task_states_can_be_forced(services: Services) -> None:
    task_id = services.transcribe(FILETRANS, ELSEWHERE)["output"]["task_id"]
    services.switch_on(task_queries={"state": "UNKNOWN", "count": 1})
    assert services.query(task_id)["output"] == {"task_id": task_id, "task_status": "UNKNOWN"}
    assert services.query(task_id)["output"]["task_status"] == "SUCCEEDED"
    services.switch_on(task_queries={"state": "RUNNING"})
    assert [services.query(task_id)["output"]["task_status"] for _ in range(3)] == ["RUNNING"] * 3
    services.switch_on(task_queries={"state": "FAILED", "code": "FILE_TOO_LARGE", "message": "too large"})
    output = services.query(task_id)["output"]
    assert (output["task_status"], output["code"], output["message"]) == ("FAILED", "FILE_TOO_LARGE", "too large")
    services.switch_on(task_queries={"without_usage": True})
    answer = services.query(task_id)
    assert answer["output"]["task_status"] == "SUCCEEDED"
    assert "usage" not in answer


def test_results_can_be_made_to_fail(services: Services) -> None:
    url = services.transcribe(FILETRANS, ELSEWHERE)["output"]["result"]["transcription_url"]
    for status in (403, 404, 500):
        services.switch_on(results={"how": "status", "status": status, "count": 1})
        assert oss_error(ANYBODY.get(url))[0] == status
        assert ANYBODY.get(url).status_code == 200
    services.switch_on(results={"how": "garbage"})
    with pytest.raises(ValueError, match=r"JSON|decode|line"):
        ANYBODY.get(url).json()
    services.switch_on(results={"how": "redirect", "url": "http://127.0.0.1:9/x"})
    redirect = ANYBODY.get(url)
    assert (redirect.status_code, redirect.headers["location"]) == (302, "http://127.0.0.1:9/x")
    services.switch_on(results={"how": "endless"})
    received = 0
    with ANYBODY.stream("GET", url) as response:
        assert response.status_code == 200
        for piece in response.iter_bytes():
            received += len(piece)
            if received > 4_000_000:
                break
    assert received > 4_000_000


def test_results_can_be_elsewhere(services: Services) -> None:
    task_id = services.transcribe(FILETRANS, ELSEWHERE)["output"]["task_id"]
    services.switch_on(results={"how": "elsewhere", "url": "http://169.254.169.254/a.json", "count": 1})
    answers = [services.query(task_id)["output"]["result"]["transcription_url"] for _ in range(2)]
    assert answers[0] == "http://169.254.169.254/a.json"
    assert answers[1].startswith(services.server.http_url)


@pytest.mark.parametrize(
    "faults",
    [
        {"requests": {"path": "/"}},
        {"requests": [{"how": "loudly"}]},
        {"requests": [{"count": "1"}]},
        {"requests": [{"count": -2}]},
        {"task_queries": {"state": "SUCCEEDED"}},
        {"results": {"how": "status", "status": 200}},
        {"uploads": {"unknown": 1}},
        {"requests": [{"retry_after": -1}]},
        {"oss": {"how": "loudly"}},
        {"oss": [{"how": "cut", "method": "PATCH"}]},
        {"oss": [{"seconds": -1}]},
    ],
)
def test_unknown_faults_are_refused(services: Services, faults: dict[str, Any]) -> None:
    response = ANYBODY.put(f"{services.server.http_url}/_sandbox/faults", json=faults)
    assert response.status_code == 400
    assert services.recognise(ELSEWHERE).status_code == 200
