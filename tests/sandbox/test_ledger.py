from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import websockets

from app.sandbox import SandboxOptions

from .conftest import RunningSandbox, running
from .dialogue import MODEL, dial
from .services import (
    ANYBODY,
    CUSTOMIZATION,
    ENROLLMENT,
    FILETRANS,
    FLASH,
    PARAFORMER,
    PATIENCE,
    RECOGNITION,
    TRANSCRIPTION,
    Json,
    Services,
    calling,
    data_uri,
    tone,
)

ELSEWHERE = "https://media.example.com/a.mp3"
CLONE: Json = {"target_model": MODEL, "prefix": "mine", "url": "https://media.example.com/voice.wav"}
SAID = "今天天气怎么样？"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningSandbox]:
    with running(SandboxOptions(task_seconds=0.1)) as server:
        yield server


@pytest.fixture
def services(server: RunningSandbox) -> Iterator[Services]:
    with calling(server) as services:
        yield services
        services.switch_on()


def entries(services: Services) -> list[tuple[Any, ...]]:
    return [(work["kind"], work["model"], work["counted"], work["ended"]) for work in services.ledger()]


def only_entry(services: Services) -> tuple[Any, ...]:
    """Kind, model, count and end of the caller's one piece of work, once that has ended."""
    deadline = time.monotonic() + PATIENCE
    while (found := entries(services)) and found[0][-1] is None and time.monotonic() < deadline:
        time.sleep(0.02)
    (entry,) = found
    return entry


async def test_all_kinds_of_work_are_listed_in_order(services: Services) -> None:
    recognised = services.recognise(data_uri(tone(1.5))).json()["request_id"]
    async with dial(services.server.ws_url, services.key) as dialogue:
        await dialogue.say(SAID)
    services.transcribe(FILETRANS, ELSEWHERE)
    services.customize("create_voice", **CLONE).raise_for_status()
    task_id = services.transcribe(PARAFORMER, ELSEWHERE, "https://media.example.com/broken.mp3")["output"]["task_id"]
    assert entries(services) == [
        ("recognition", FLASH, 2, "finished"),
        ("speech", MODEL, 15, "finished"),
        ("transcription", FILETRANS, 4, "finished"),
        ("enrollment", ENROLLMENT, 1, "finished"),
        ("transcription", PARAFORMER, 4, "finished"),
    ]
    ledger = services.ledger()
    assert [ledger[place]["id"] for place in (0, 1, 4)] == [recognised, dialogue.task_id, task_id]
    assert ledger[0].keys() == {"kind", "id", "model", "api_key", "counted", "accepted_at", "ended"}
    assert {work["api_key"] for work in ledger} == {services.key}
    everybody = ANYBODY.get(f"{services.server.http_url}/_sandbox/ledger").json()
    assert [work for work in everybody if work["api_key"] == services.key] == ledger


async def test_what_was_refused_is_not_listed(services: Services) -> None:
    broken, short = "https://media.example.com/broken.mp3", "https://media.example.com/short.mp3"
    assert services.recognise(broken).status_code == services.recognise(short).status_code == 400
    assert services.submit(FILETRANS, ELSEWHERE, channel_id=[]).status_code == 400
    assert services.customize("create_voice", **CLONE | {"prefix": "_"}).status_code == 400
    services.voices()
    services.switch_on(throttle_tasks=1, requests=[{"path": RECOGNITION}])
    assert services.recognise(ELSEWHERE).status_code == 500
    for voice in ("longanyang", "nobody"):
        async with dial(services.server.ws_url, services.key) as dialogue:
            await dialogue.run(voice=voice)
            await dialogue.failure()
    assert services.ledger() == []


@pytest.mark.parametrize("how", ["fail", "close"])
async def test_broken_speech_counts_what_was_synthesized(services: Services, how: str) -> None:
    services.switch_on(break_tasks=1, break_after_frames=2, break_how=how)
    async with dial(services.server.ws_url, services.key) as dialogue:
        await dialogue.start()
        await dialogue.text(SAID)
        heard = 0
        try:
            while not isinstance(await dialogue.frame(), bytes) or (heard := heard + 1) < 2:
                pass
            await dialogue.closed()
        except websockets.ConnectionClosed:
            assert heard == 2
    kind, _, counted, ended = only_entry(services)
    assert (kind, ended) == ("speech", "failed")
    assert 0 < counted < 15


async def test_cancelled_speech_counts_as_told(services: Services) -> None:
    services.switch_on(break_tasks=1, break_after_frames=2, break_how="silent")
    async with dial(services.server.ws_url, services.key) as dialogue:
        await dialogue.start()
        await dialogue.text(SAID)
        await dialogue.listen("sentence-synthesis")
        assert entries(services)[0][-1] is None
        await dialogue.cancel()
        told = (await dialogue.listen()).characters
    assert 0 < told < 15
    assert only_entry(services) == ("speech", MODEL, told, "cancelled")


async def test_a_client_that_vanishes_pays_for_what_was_synthesized(services: Services) -> None:
    services.switch_on(break_tasks=1, break_after_frames=5, break_how="silent")
    async with dial(services.server.ws_url, services.key) as dialogue:
        await dialogue.start()
        await dialogue.text("好。")
        await dialogue.listen("sentence-end")
        await dialogue.text(SAID)
        await dialogue.listen("sentence-synthesis")
        dialogue.connection.transport.abort()
    kind, _, counted, ended = only_entry(services)
    assert (kind, ended) == ("speech", "disconnected")
    assert 3 < counted < 18


@pytest.mark.parametrize("how", ["truncate", "foreign"])
async def test_a_crippled_stream_counts_in_full(services: Services, how: str) -> None:
    services.switch_on(break_tasks=1, break_after_frames=1, break_how=how)
    async with dial(services.server.ws_url, services.key) as dialogue:
        await dialogue.start()
        await dialogue.text(SAID)
        await dialogue.finish()
        while "task-finished" not in str(await dialogue.frame()):
            pass
    assert only_entry(services) == ("speech", MODEL, 15, "finished")


def test_transcriptions_count_when_they_succeed(services: Services) -> None:
    canceled = services.submit(FILETRANS, ELSEWHERE).json()["output"]["task_id"]
    assert entries(services) == [("transcription", FILETRANS, 0, None)]
    services.http.post(f"/api/v1/tasks/{canceled}/cancel").raise_for_status()
    services.transcribe(FILETRANS, "https://media.example.com/broken.mp3")
    services.switch_on(task_queries={"state": "FAILED"})
    services.transcribe(FILETRANS, ELSEWHERE)
    deadline = time.monotonic() + PATIENCE
    while entries(services)[-1][-1] is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [entry[2:] for entry in entries(services)] == [(0, "cancelled"), (0, "failed"), (4, "finished")]


def test_voices_count_when_they_are_made(services: Services) -> None:
    voice_id = services.enroll(CLONE["url"])
    services.customize("update_voice", voice_id=voice_id, url=CLONE["url"]).raise_for_status()
    services.voice(voice_id)
    services.customize("delete_voice", voice_id=voice_id).raise_for_status()
    assert entries(services) == [("enrollment", ENROLLMENT, 1, "finished")] * 2


REQUESTS: dict[str, tuple[str, Json, tuple[Any, ...]]] = {
    "recognition": (
        RECOGNITION,
        {"model": FLASH, "input": {"messages": [{"role": "user", "content": [{"audio": ELSEWHERE}]}]}},
        ("recognition", FLASH, 4, "finished"),
    ),
    "transcription": (
        TRANSCRIPTION,
        {"model": FILETRANS, "input": {"file_url": ELSEWHERE}},
        ("transcription", FILETRANS, 4, "finished"),
    ),
    "enrollment": (
        CUSTOMIZATION,
        {"model": ENROLLMENT, "input": {"action": "create_voice", **CLONE}},
        ("enrollment", ENROLLMENT, 1, "finished"),
    ),
}


@pytest.mark.parametrize("how", ["close_after", "close", "late"])
@pytest.mark.parametrize("kind", REQUESTS)
def test_work_counts_though_its_answer_is_lost(services: Services, kind: str, how: str) -> None:
    path, body, counted = REQUESTS[kind]
    services.switch_on(requests=[{"path": path, "how": how, "seconds": 0.4 if how == "late" else 0.0, "count": 1}])
    headers = {"X-DashScope-Async": "enable"} if kind == "transcription" else {}
    with pytest.raises(httpx.TransportError):
        services.http.post(path, json=body, headers=headers, timeout=0.2 if how == "late" else PATIENCE)
    if how == "close":
        assert services.ledger() == []
        return
    deadline = time.monotonic() + PATIENCE
    while not services.ledger() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert only_entry(services) == counted


async def test_clearing_the_logs_clears_the_ledger(services: Services) -> None:
    services.recognise(ELSEWHERE)
    async with dial(services.server.ws_url, services.key) as dialogue:
        await dialogue.say("好。")
    ANYBODY.delete(f"{services.server.http_url}/_sandbox/requests").raise_for_status()
    assert only_entry(services)[0] == "speech"
    ANYBODY.delete(f"{services.server.http_url}/_sandbox/calls").raise_for_status()
    assert services.ledger() == []
