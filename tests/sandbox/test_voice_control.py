from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from app.sandbox import SandboxOptions

from .conftest import RunningSandbox, running
from .samples import as_wav, hum
from .services import ANYBODY, CUSTOMIZATION, ENROLLMENT, PATIENCE, Json, Services, add_voices, calling, error, speak

MODEL = "cosyvoice-v3-flash"
SPEECH = "https://media.example.com/voice.wav"
CLONE: Json = {"target_model": MODEL, "prefix": "mine", "url": SPEECH}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningSandbox]:
    with running(SandboxOptions(voice_seconds=0)) as server:
        yield server


@pytest.fixture
def services(server: RunningSandbox) -> Iterator[Services]:
    with calling(server) as services:
        yield services
        services.switch_on()


def existing(services: Services) -> list[Json]:
    response = ANYBODY.get(f"{services.server.http_url}/_sandbox/voices", params={"api_key": services.key})
    return list(response.json())


def strike(services: Services, action: str | None = None, **fault: Any) -> None:
    services.switch_on(requests=[{"path": CUSTOMIZATION, "action": action, "count": 1, **fault}])


def create_and_hang_up(services: Services, after: float = 0.1) -> None:
    body = {"model": ENROLLMENT, "input": {"action": "create_voice", **CLONE}}
    with calling(services.server) as impatient, pytest.raises(httpx.ReadTimeout):
        impatient.http.post(
            CUSTOMIZATION, json=body, timeout=after, headers={"Authorization": f"Bearer {services.key}"}
        )


async def test_voices_can_be_made_elsewhere(services: Services) -> None:
    started = time.monotonic()
    made = add_voices(services.server, services.key, count=1000)
    assert time.monotonic() - started < 1.0
    assert len(set(made)) == 1000
    assert [voice["voice_id"] for voice in services.voices(page_size=1000)] == made[::-1]
    assert await speak(services.server, "今天好。", key=services.key, voice=made[0])
    (waiting,) = add_voices(services.server, services.key, prefix="late", status="DEPLOYING")
    (rejected,) = add_voices(services.server, services.key, prefix="bad", status="UNDEPLOYED")
    (designed,) = add_voices(services.server, services.key, voice_prompt="calm", preview_text="Hello.")
    assert services.voice(waiting)["status"] == "DEPLOYING"
    assert services.voice(rejected)["status"] == "UNDEPLOYED"
    assert services.voice(designed)["preview_text"] == "Hello."
    with calling(services.server) as stranger:
        assert stranger.voices() == []


def test_voices_and_their_samples_can_be_looked_at(services: Services) -> None:
    sample = as_wav(hum(125))
    url = services.upload(sample, ENROLLMENT)
    uploaded, foreign = services.enroll(url), services.enroll(SPEECH, prefix="far")
    (made,) = add_voices(services.server, services.key)
    first, second, third = existing(services)
    assert (first["voice_id"], first["api_key"], first["target_model"], first["prefix"], first["status"]) == (
        uploaded,
        services.key,
        MODEL,
        "mine",
        "OK",
    )
    assert first["sample"] == {"source": "oss", "url": url, "bytes": len(sample), "format": "wav", "height": 125.0}
    assert (second["voice_id"], second["sample"]["source"], second["sample"]["url"]) == (foreign, "elsewhere", SPEECH)
    assert (third["voice_id"], third["sample"]["source"], third["sample"]["bytes"]) == (made, "made", 0)
    everybody = ANYBODY.get(f"{services.server.http_url}/_sandbox/voices").json()
    assert {uploaded, foreign, made} <= {voice["voice_id"] for voice in everybody}
    services.customize("delete_voice", voice_id=uploaded)
    assert [voice["voice_id"] for voice in existing(services)] == [foreign, made]


@pytest.mark.parametrize(
    "wrong",
    [
        {"api_key": ""},
        {"target_model": "cosyvoice-v9"},
        {"prefix": "my_voice"},
        {"count": 0},
        {"count": "1"},
        {"status": "FINE"},
        {"surprise": 1},
    ],
)
def test_impossible_voices_are_not_made(services: Services, wrong: dict[str, Any]) -> None:
    body = {"api_key": services.key, "target_model": MODEL, "prefix": "mine"} | wrong
    assert ANYBODY.post(f"{services.server.http_url}/_sandbox/voices", json=body).status_code == 400
    assert existing(services) == []


def test_actions_are_noted(services: Services) -> None:
    services.enroll(SPEECH)
    services.voices()
    services.customize("sing")
    services.http.post(CUSTOMIZATION, content=b"{")
    services.http.post(CUSTOMIZATION, json={"model": ENROLLMENT, "input": {"action": 5}})
    assert [noted["action"] for noted in services.requests()] == ["create_voice", "list_voice", "sing", None, None]


def test_one_action_can_be_struck(services: Services) -> None:
    strike(services, "create_voice", status=500, code="InternalError", message="audio preprocess server error")
    assert services.voices() == []
    refused = error(services.customize("create_voice", **CLONE))
    assert refused == (500, "InternalError", "audio preprocess server error")
    assert services.enroll(SPEECH)
    noted = [(entry["action"], entry["fault"]) for entry in services.requests()]
    assert noted == [("list_voice", None), ("create_voice", "answer"), ("create_voice", None)]


def test_an_action_strikes_nothing_else(services: Services) -> None:
    services.switch_on(requests=[{"action": "list_voice", "status": 503}])
    assert services.query("x")["output"]["task_status"] == "UNKNOWN"
    assert services.customize("list_voice").status_code == 503


def test_a_late_answer_comes_after_the_work(services: Services) -> None:
    strike(services, how="delay", seconds=0.5)
    create_and_hang_up(services)
    assert len(services.voices()) == 1


def test_a_lost_answer_comes_after_the_work(services: Services) -> None:
    strike(services, how="close_after")
    with pytest.raises(httpx.TransportError):
        services.customize("create_voice", **CLONE)
    assert len(services.voices()) == 1


def test_a_closed_connection_does_nothing(services: Services) -> None:
    strike(services, how="close")
    with pytest.raises(httpx.TransportError):
        services.customize("create_voice", **CLONE)
    assert services.voices() == []
    assert [noted["action"] for noted in services.requests()] == ["create_voice", "list_voice"]


def test_late_work_is_done_whether_anybody_waits_or_not(services: Services) -> None:
    strike(services, how="late", seconds=0.4)
    create_and_hang_up(services)
    assert services.voices() == []
    deadline = time.monotonic() + PATIENCE
    while not services.voices():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    strike(services, how="late", seconds=0.2)
    started = time.monotonic()
    assert services.enroll(SPEECH)
    assert time.monotonic() - started >= 0.2
    assert len(services.voices()) == 2
