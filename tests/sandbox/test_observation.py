from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import websockets

from app.sandbox import SandboxOptions

from .conftest import RunningSandbox
from .dialogue import dial

pytestmark = pytest.mark.anyio

Start = Callable[[SandboxOptions], RunningSandbox]


@pytest.fixture
def server(start_sandbox: Start) -> RunningSandbox:
    return start_sandbox(SandboxOptions(calls_kept=2))


@pytest.fixture
async def http(server: RunningSandbox) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.http_url) as client:
        yield client


@pytest.fixture
async def shared(sandbox: RunningSandbox) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=sandbox.http_url) as client:
        yield client


async def switch_on(http: httpx.AsyncClient, **faults: Any) -> None:
    (await http.put("/_sandbox/faults", json=faults)).raise_for_status()


async def test_calls_are_listed_and_cleared(server: RunningSandbox, http: httpx.AsyncClient) -> None:
    async with dial(server.ws_url, "sk-test-a") as first, dial(server.ws_url, "sk-test-b") as second:
        await first.say("一。")
        await second.say("二。")
        await second.say("三。", volume=10)
    listed = await http.get("/_sandbox/calls")
    assert listed.headers["x-sandbox-connections"] == "2"
    entries = listed.json()
    assert [(entry["connection"], entry["api_key"], entry["text"]) for entry in entries] == [
        (2, "sk-test-b", "二。"),
        (2, "sk-test-b", "三。"),
    ]
    assert entries[1]["parameters"]["volume"] == 10
    assert entries[1]["submitted_at"] <= entries[1]["ended_at"]
    assert (await http.delete("/_sandbox/calls")).status_code == 204
    assert (await http.get("/_sandbox/calls")).json() == []
    health = (await http.get("/_sandbox/health")).json()
    assert health == {"status": "ok", "connections_opened": 0}


async def test_run_tasks_can_be_throttled(server: RunningSandbox, http: httpx.AsyncClient) -> None:
    await switch_on(http, throttle_tasks=1)
    async with dial(server.ws_url) as dialogue:
        await dialogue.run()
        assert (await dialogue.failure())[0] == "Throttling.RateQuota"
    async with dial(server.ws_url) as dialogue:
        assert (await dialogue.say("好。")).characters == 3


async def test_run_tasks_can_be_throttled_for_good(server: RunningSandbox, http: httpx.AsyncClient) -> None:
    await switch_on(http, throttle_tasks=-1)
    for _ in range(3):
        async with dial(server.ws_url) as dialogue:
            await dialogue.run()
            assert (await dialogue.failure())[0] == "Throttling.RateQuota"


async def test_handshakes_can_be_refused_for_good(server: RunningSandbox, http: httpx.AsyncClient) -> None:
    await switch_on(http, refuse_handshakes=-1, refuse_status=429, refuse_retry_after=3)
    for _ in range(3):
        with pytest.raises(websockets.InvalidStatus) as refused:
            async with dial(server.ws_url):
                pass
        response = refused.value.response
        assert (response.status_code, response.headers["Retry-After"]) == (429, "3")


async def test_handshakes_can_be_refused(server: RunningSandbox, http: httpx.AsyncClient) -> None:
    await switch_on(http, refuse_handshakes=1, refuse_status=502)
    with pytest.raises(websockets.InvalidStatus) as refused:
        async with dial(server.ws_url):
            pass
    assert refused.value.response.status_code == 502
    assert "Retry-After" not in refused.value.response.headers
    async with dial(server.ws_url) as dialogue:
        assert (await dialogue.say("好。")).characters == 3


async def test_a_task_can_fail_after_some_frames(server: RunningSandbox, http: httpx.AsyncClient) -> None:
    await switch_on(http, break_tasks=1, break_after_frames=2)
    async with dial(server.ws_url) as dialogue:
        await dialogue.start()
        await dialogue.text("今天天气怎么样？")
        answer = await dialogue.listen("task-failed")
        assert answer.error[0] == "InternalError"
        assert len(answer.frames) == 2
        await dialogue.closed()


async def test_a_socket_can_drop_after_some_frames(server: RunningSandbox, http: httpx.AsyncClient) -> None:
    await switch_on(http, break_tasks=1, break_after_frames=1, break_how="close")
    async with dial(server.ws_url) as dialogue:
        await dialogue.start()
        await dialogue.text("今天天气怎么样？")
        with pytest.raises(websockets.ConnectionClosed):
            await dialogue.listen()
        assert dialogue.connection.close_code == 1011
    assert server.call_that_ended(dialogue.task_id)["outcome"] == "failed"


async def test_a_task_can_go_silent_and_still_be_cancelled(server: RunningSandbox, http: httpx.AsyncClient) -> None:
    await switch_on(http, break_tasks=1, break_after_frames=1, break_how="silent")
    async with dial(server.ws_url) as dialogue:
        await dialogue.start()
        await dialogue.text("今天天气怎么样？")
        await dialogue.finish()
        await dialogue.listen("sentence-synthesis")
        await dialogue.cancel()
        assert 0 < (await dialogue.listen()).characters < 15


@pytest.mark.parametrize("how", ["garbage", "foreign", "headless", "misshapen"])
async def test_a_malformed_event_can_come_in_the_middle(
    server: RunningSandbox, http: httpx.AsyncClient, how: str
) -> None:
    await switch_on(http, break_tasks=1, break_after_frames=2, break_how=how)
    async with dial(server.ws_url) as dialogue:
        await dialogue.start()
        await dialogue.text("今天天气怎么样？")
        await dialogue.finish()
        frames = [await dialogue.frame() for _ in range(6)]
        assert [type(frame) for frame in frames] == [str, str, bytes, str, bytes, str]
        assert is_malformed(str(frames[-1]), how)
        answer = await dialogue.listen()
        assert answer.frames
        assert answer.characters == 15


def is_malformed(frame: str, how: str) -> bool:
    if how == "garbage":
        with pytest.raises(ValueError, match="line 1"):
            json.loads(frame)
        return True
    event = json.loads(frame)
    if how == "headless":
        return "header" not in event
    if how == "foreign":
        return event["header"]["event"] not in ("task-started", "result-generated", "task-finished", "task-failed")
    return event["header"]["event"] == "result-generated" and type(event["payload"]["usage"]["characters"]) is str


@pytest.mark.parametrize("kept", [0, 3])
async def test_audio_can_be_truncated(server: RunningSandbox, http: httpx.AsyncClient, kept: int) -> None:
    await switch_on(http, break_tasks=1, break_after_frames=kept, break_how="truncate")
    async with dial(server.ws_url) as dialogue:
        truncated = await dialogue.say("今天天气怎么样？", "真好。")
        whole = await dialogue.say("今天天气怎么样？", "真好。")
    assert truncated.frames == whole.frames[:kept]
    assert len(whole.frames) > 4
    assert truncated.characters == whole.characters == 20
    assert truncated.sentences == whole.sentences


async def test_storage_can_be_unavailable(http: httpx.AsyncClient) -> None:
    await switch_on(http, oss_unavailable=-1)
    for _ in range(2):
        assert (await http.get("/bucket/key")).status_code == 503
    (await http.delete("/_sandbox/faults")).raise_for_status()
    assert (await http.get("/bucket/key")).status_code == 404


@pytest.mark.parametrize(
    "body",
    ['{"break_how": "loudly"}', '{"unknown": 1}', '{"refuse_status": 200}', "[]", "{", '{"refuse_retry_after": -1}'],
)
async def test_unknown_faults_are_refused(shared: httpx.AsyncClient, body: str) -> None:
    assert (await shared.put("/_sandbox/faults", content=body)).status_code == 400


@pytest.mark.parametrize("path", ["/api/v1/services/x", "/api-ws/v1/other", "/compatible-mode/v1/x", "/_sandbox/x"])
async def test_paths_of_the_service_are_no_objects(shared: httpx.AsyncClient, path: str) -> None:
    response = await shared.get(path)
    assert (response.status_code, response.json()["code"]) == (404, "NotFound")


async def test_plain_http_on_the_socket_path_is_a_url_error(shared: httpx.AsyncClient) -> None:
    response = await shared.get("/api-ws/v1/inference")
    assert (response.status_code, response.json()["message"]) == (400, "url error, please check url！")
