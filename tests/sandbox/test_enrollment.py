from __future__ import annotations

import base64
import datetime
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import time_machine

from app.sandbox import SandboxOptions

from .conftest import RunningSandbox, running
from .dialogue import dial
from .services import (
    ANYBODY,
    CUSTOMIZATION,
    ENROLLMENT,
    FLASH,
    PATIENCE,
    RESOLVE,
    Json,
    Services,
    add_voices,
    calling,
    data_uri,
    error,
    oss_error,
    output,
    speak,
)

Start = Callable[[SandboxOptions], RunningSandbox]

MODEL = "cosyvoice-v3-flash"
SPEECH = "https://media.example.com/voice.wav"
REFUSED = ("InvalidParameter", "[tts:]Engine return error code: 418")
GONE = (400, "BadRequest.ResourceNotExist", "The Required resource not exist.")
CLONE: Json = {"target_model": MODEL, "prefix": "mine", "url": SPEECH}
DESIGN: Json = {
    "target_model": MODEL,
    "prefix": "mine",
    "voice_prompt": "沉稳的播音员",
    "preview_text": "各位听众早上好。",
}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningSandbox]:
    with running(SandboxOptions(voice_seconds=0)) as server:
        yield server


@pytest.fixture
def services(server: RunningSandbox) -> Iterator[Services]:
    with calling(server) as services:
        yield services


def wait_until(services: Services, voice_id: str, status: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while services.voice(voice_id)["status"] != status:
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def refusal(services: Services, voice_id: str, model: str = MODEL) -> tuple[str, str]:
    async with dial(services.server.ws_url, services.key) as dialogue:
        await dialogue.run(model, voice=voice_id)
        return await dialogue.failure()


def test_a_clone_from_birth_to_death(services: Services) -> None:
    created = output(services.customize("create_voice", **CLONE))
    assert created.keys() == {"voice_id"}
    voice_id = created["voice_id"]
    assert re.fullmatch(rf"{MODEL}-mine-[0-9a-f]+", voice_id)
    told = services.voice(voice_id)
    assert told.keys() == {"gmt_create", "gmt_modified", "resource_link", "target_model", "status"}
    assert (told["target_model"], told["status"]) == (MODEL, "OK")
    times = {name: told[name] for name in ("gmt_create", "gmt_modified")}
    assert output(services.customize("list_voice")) == {"voice_list": [{"voice_id": voice_id, **times, "status": "OK"}]}
    assert output(services.customize("update_voice", voice_id=voice_id, url=SPEECH)) == {}
    assert output(services.customize("delete_voice", voice_id=voice_id)) == {}
    assert services.voices() == []
    for again in (
        services.customize("query_voice", voice_id=voice_id),
        services.customize("update_voice", voice_id=voice_id, url=SPEECH),
        services.customize("delete_voice", voice_id=voice_id),
    ):
        assert error(again) == GONE


def test_a_designed_voice(services: Services) -> None:
    created = output(services.customize("create_voice", **DESIGN))
    voice_id = created["voice_id"]
    assert re.fullmatch(rf"{MODEL}-vd-mine-[0-9a-f]+", voice_id)
    assert created["target_model"] == MODEL
    preview = created["preview_audio"]
    assert (preview["sample_rate"], preview["response_format"]) == (24000, "wav")
    audio = base64.b64decode(preview["data"])
    heard = services.recognise(data_uri(audio)).json()["output"]["choices"][0]["message"]["content"]
    assert heard == [{"text": DESIGN["preview_text"]}]
    told = services.voice(voice_id)
    (listed,) = services.voices()
    for entry in (told, listed):
        assert entry["voice_id"] == voice_id
        assert (entry["voice_prompt"], entry["preview_text"]) == (DESIGN["voice_prompt"], DESIGN["preview_text"])
    assert ANYBODY.get(told["resource_link"]).content == audio
    assert error(services.customize("update_voice", voice_id=voice_id, url=SPEECH))[:2] == (400, "InvalidParameter")


@pytest.mark.parametrize(("preview_format", "begins"), [("pcm", b""), ("mp3", b"\xff")])
def test_previews_come_in_other_formats(services: Services, preview_format: str, begins: bytes) -> None:
    parameters = {"sample_rate": 16000, "response_format": preview_format}
    asked = {"action": "create_voice", **DESIGN}
    body = {"model": ENROLLMENT, "input": asked, "parameters": parameters}
    preview = output(services.http.post(CUSTOMIZATION, json=body))["preview_audio"]
    assert (preview["sample_rate"], preview["response_format"]) == (16000, preview_format)
    assert base64.b64decode(preview["data"]).startswith(begins)


@pytest.mark.parametrize(
    ("action", "asked", "name"),
    [
        ("create_voice", CLONE | {"target_model": None}, "target_model"),
        ("create_voice", CLONE | {"prefix": None}, "prefix"),
        ("create_voice", CLONE | {"prefix": ""}, "prefix"),
        ("create_voice", CLONE | {"prefix": "my_voice"}, "prefix"),
        ("create_voice", CLONE | {"prefix": "abcdefghijk"}, "prefix"),
        ("create_voice", CLONE | {"prefix": "音色"}, "prefix"),
        ("create_voice", CLONE | {"prefix": "mine\n"}, "prefix"),
        ("create_voice", CLONE | {"url": None}, "url"),
        ("create_voice", CLONE | {"url": ""}, "url"),
        ("create_voice", CLONE | {"url": "ftp://media.example.com/a.wav"}, "url"),
        ("create_voice", CLONE | {"url": "https://media.example.com/a b.wav"}, "url"),
        ("create_voice", CLONE | {"url": "data:audio/wav;base64,UklGRg=="}, "url"),
        ("create_voice", CLONE | {"language_hints": "zh"}, "language_hints"),
        ("create_voice", CLONE | {"max_prompt_audio_length": 2.9}, "max_prompt_audio_length"),
        ("create_voice", CLONE | {"max_prompt_audio_length": 31}, "max_prompt_audio_length"),
        ("create_voice", CLONE | {"max_prompt_audio_length": "10"}, "max_prompt_audio_length"),
        ("create_voice", CLONE | {"enable_preprocess": "true"}, "enable_preprocess"),
        ("create_voice", DESIGN | {"url": SPEECH}, "url"),
        ("create_voice", DESIGN | {"voice_prompt": "声" * 501}, "voice_prompt"),
        ("create_voice", DESIGN | {"preview_text": "字" * 201}, "preview_text"),
        ("create_voice", DESIGN | {"preview_text": "……"}, "preview_text"),
        ("create_voice", DESIGN | {"voice_prompt": None}, "voice_prompt"),
        ("list_voice", {"page_index": -1}, "page_index"),
        ("list_voice", {"page_index": "0"}, "page_index"),
        ("list_voice", {"page_index": True}, "page_index"),
        ("list_voice", {"page_size": 0}, "page_size"),
        ("list_voice", {"page_size": 1001}, "page_size"),
        ("list_voice", {"page_size": 10.0}, "page_size"),
        ("list_voice", {"prefix": "my_voice"}, "prefix"),
        ("query_voice", {}, "voice_id"),
        ("delete_voice", {"voice_id": 5}, "voice_id"),
        ("update_voice", {"voice_id": "x"}, "url"),
        ("create", CLONE, "action"),
        ("", {}, "action"),
    ],
)
def test_every_field_is_checked(services: Services, action: str, asked: dict[str, Any], name: str) -> None:
    message = f"Required parameter({name}) missing or invalid, please check the request parameters."
    assert error(services.customize(action, **asked)) == (400, "InvalidParameter", message)
    assert services.voices() == []


@pytest.mark.parametrize(
    "asked",
    [
        CLONE | {"target_model": "cosyvoice-v9"},
        CLONE | {"target_model": FLASH},
        DESIGN | {"target_model": "cosyvoice-v2"},
    ],
)
def test_target_models_must_exist(services: Services, asked: dict[str, Any]) -> None:
    assert error(services.customize("create_voice", **asked)) == (400, "InvalidParameter", "Model not exist.")


@pytest.mark.parametrize("model", ["qwen-voice-enrollment", "qwen-voice-design", MODEL, "voice-enrolment"])
def test_other_services_are_not_here(services: Services, model: str) -> None:
    refused = services.http.post(CUSTOMIZATION, json={"model": model, "input": {"action": "list_voice"}})
    assert error(refused) == (400, "InvalidParameter", "url error, please check url！")


def test_a_request_needs_a_key_a_model_and_an_input(services: Services) -> None:
    assert error(ANYBODY.post(f"{services.server.http_url}{CUSTOMIZATION}", json={}))[0] == 401
    for body, code in [
        ({"input": {"action": "list_voice"}}, "BadRequest.EmptyModel"),
        ({"model": ENROLLMENT}, "BadRequest.EmptyInput"),
        ({"model": ENROLLMENT, "input": ["list_voice"]}, "InvalidParameter"),
    ]:
        assert error(services.http.post(CUSTOMIZATION, json=body))[:2] == (400, code)
    asynchronous = services.customize("list_voice", {"X-DashScope-Async": "enable"})
    assert error(asynchronous)[:2] == (403, "AccessDenied")


@pytest.mark.parametrize(
    "asked",
    [
        {"language_hints": ["ja", "zh"], "max_prompt_audio_length": 30, "enable_preprocess": True},
        {"language_hints": ["tlh"]},
        {"language_hints": [], "surprise": {}},
        {"prefix": "Mine123456"},
        {"target_model": "cosyvoice-v1"},
    ],
)
def test_allowed_fields_are_taken(services: Services, asked: dict[str, Any]) -> None:
    assert output(services.customize("create_voice", **CLONE | asked))["voice_id"]


def test_pages_show_the_newest_first_and_no_total(services: Services) -> None:
    ids = [services.enroll(SPEECH, prefix="odd" if n % 2 else "even") for n in range(12)][::-1]
    assert [voice["voice_id"] for voice in services.voices()] == ids[:10]
    assert [voice["voice_id"] for voice in services.voices(page_index=1)] == ids[10:]
    assert [voice["voice_id"] for voice in services.voices(page_index=2, page_size=5)] == ids[10:]
    assert services.voices(page_index=3, page_size=5) == []
    assert [voice["voice_id"] for voice in services.voices(prefix="odd")] == ids[::2]
    assert services.voices(prefix="od") == []


async def test_voices_are_their_accounts_alone(services: Services) -> None:
    voice_id = services.enroll(SPEECH)
    with calling(services.server) as stranger:
        assert stranger.voices() == []
        for refused in (
            stranger.customize("query_voice", voice_id=voice_id),
            stranger.customize("update_voice", voice_id=voice_id, url=SPEECH),
            stranger.customize("delete_voice", voice_id=voice_id),
        ):
            assert error(refused) == GONE
        assert await refusal(stranger, voice_id) == REFUSED
    assert services.voice(voice_id)["status"] == "OK"


async def test_a_voice_speaks_with_its_own_model_while_it_lives(services: Services) -> None:
    voice_id = services.enroll(SPEECH)
    assert await speak(services.server, "今天好。", key=services.key, voice=voice_id)
    assert await refusal(services, voice_id, "cosyvoice-v3-plus") == REFUSED
    assert await refusal(services, f"{MODEL}-mine-0123abcd") == REFUSED
    services.customize("delete_voice", voice_id=voice_id)
    assert await refusal(services, voice_id) == REFUSED


async def test_a_voice_is_deployed_before_it_speaks(start_sandbox: Start) -> None:
    with calling(start_sandbox(SandboxOptions(voice_seconds=0.5))) as services:
        voice_id = services.enroll(SPEECH)
        assert services.voice(voice_id)["status"] == "DEPLOYING"
        assert services.voices()[0]["status"] == "DEPLOYING"
        assert await refusal(services, voice_id) == REFUSED
        wait_until(services, voice_id, "OK")
        assert await speak(services.server, "今天好。", key=services.key, voice=voice_id)
        output(services.customize("update_voice", voice_id=voice_id, url=SPEECH))
        assert await refusal(services, voice_id) == REFUSED
        wait_until(services, voice_id, "OK")


async def test_a_voice_can_be_rejected(services: Services) -> None:
    rejected = services.enroll("https://media.example.com/rejected.mp3?x=1")
    by_prefix = services.enroll(SPEECH, prefix="rejected")
    for voice_id in (rejected, by_prefix):
        assert services.voice(voice_id)["status"] == "UNDEPLOYED"
        assert await refusal(services, voice_id) == REFUSED
        output(services.customize("update_voice", voice_id=voice_id, url=SPEECH))
        assert services.voice(voice_id)["status"] == "OK"


def test_times_are_those_of_beijing(services: Services) -> None:
    created = datetime.datetime(2026, 1, 2, 20, 30, tzinfo=datetime.UTC)
    with time_machine.travel(created):
        voice_id = services.enroll(SPEECH)
    with time_machine.travel(created + datetime.timedelta(minutes=5)):
        output(services.customize("update_voice", voice_id=voice_id, url=SPEECH))
        told = services.voice(voice_id)
    assert told["gmt_create"].startswith("2026-01-03 04:30:0")
    assert told["gmt_modified"].startswith("2026-01-03 04:35:0")


def test_an_account_has_room_for_so_many_voices(start_sandbox: Start) -> None:
    with calling(start_sandbox(SandboxOptions(voices_per_account=2))) as services:
        first = services.enroll(SPEECH)
        output(services.customize("create_voice", **DESIGN))
        for asked in (CLONE, DESIGN):
            full = error(services.customize("create_voice", **asked))
            assert full == (400, "Throttling.AllocationQuota", "您当前的配额为2")
        with calling(services.server) as stranger:
            stranger.enroll(SPEECH)
        services.customize("delete_voice", voice_id=first)
        services.enroll(SPEECH)


def test_all_actions_share_one_rate(start_sandbox: Start) -> None:
    with calling(start_sandbox(SandboxOptions(enrollments_per_second=2))) as services:
        services.enroll(SPEECH)
        assert len(services.voices()) == 1
        assert error(services.customize("list_voice"))[:2] == (429, "Throttling.RateQuota")
        with calling(services.server) as stranger:
            assert stranger.voices() == []


def test_a_resource_link_opens_until_it_expires_or_the_sample_is_gone(services: Services) -> None:
    voice_id = services.enroll(SPEECH)
    link = services.voice(voice_id)["resource_link"]
    assert link.startswith(f"{services.server.http_url}/")
    spoken = ANYBODY.get(link)
    assert (spoken.status_code, spoken.headers["content-type"]) == (200, "audio/wav")
    assert oss_error(ANYBODY.get(link.partition("?")[0])) == (403, "SignatureDoesNotMatch")
    assert oss_error(ANYBODY.get(f"{link}0")) == (403, "SignatureDoesNotMatch")
    assert oss_error(services.http.get(link)) == (400, "InvalidArgument")
    with time_machine.travel(datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=25)):
        assert oss_error(ANYBODY.get(link)) == (403, "AccessDenied")
    output(services.customize("update_voice", voice_id=voice_id, url=SPEECH))
    assert oss_error(ANYBODY.get(link)) == (404, "NoSuchKey")
    updated = services.voice(voice_id)["resource_link"]
    services.customize("delete_voice", voice_id=voice_id)
    assert oss_error(ANYBODY.get(updated)) == (404, "NoSuchKey")


def test_lists_can_lag_behind(start_sandbox: Start) -> None:
    with calling(start_sandbox(SandboxOptions(voice_seconds=0, list_lag_seconds=60))) as services:
        start = datetime.datetime.now(datetime.UTC)

        def listed_after(seconds: int) -> list[str]:
            with time_machine.travel(start + datetime.timedelta(seconds=seconds)):
                return [voice["status"] for voice in services.voices()]

        with time_machine.travel(start):
            voice_id = services.enroll(SPEECH)
            assert services.voice(voice_id)["status"] == "OK"
        assert [listed_after(30), listed_after(70)] == [[], ["OK"]]
        with time_machine.travel(start + datetime.timedelta(seconds=100)):
            rejected = "https://media.example.com/rejected.wav"
            output(services.customize("update_voice", voice_id=voice_id, url=rejected))
        assert [listed_after(130), listed_after(170)] == [["OK"], ["UNDEPLOYED"]]
        with time_machine.travel(start + datetime.timedelta(seconds=200)):
            output(services.customize("delete_voice", voice_id=voice_id))
        assert [listed_after(230), listed_after(270)] == [["UNDEPLOYED"], []]


@pytest.mark.parametrize(
    "options",
    [
        {"voice_seconds": -1},
        {"voices_per_account": 0},
        {"enrollments_per_second": 0},
        {"list_lag_seconds": -0.1},
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SandboxOptions(**options)


def test_the_quota_holds_however_the_voices_came(services: Services) -> None:
    add_voices(services.server, services.key, count=1000)
    assert error(services.customize("create_voice", **CLONE))[2] == "您当前的配额为1000"
    assert len(services.voices(page_index=9, page_size=100)) == 100
    assert services.voices(page_index=10, page_size=100) == []


def test_a_sample_of_another_account_is_not_read(services: Services) -> None:
    url = services.upload(b"RIFF", ENROLLMENT)
    with calling(services.server) as stranger:
        refused = stranger.customize("create_voice", RESOLVE, **CLONE | {"url": url})
    assert error(refused)[:2] == (400, "BadRequest.InputDownloadFailed")
