from __future__ import annotations

import uuid
from typing import Any

import orjson
import pytest
import websockets

from .conftest import RunningSandbox
from .dialogue import dial, run_payload
from .services import add_voices

pytestmark = pytest.mark.anyio

CLONE = "a clone of v3-flash"
DESIGNED = "a designed voice of v3.5-plus"
ENROLLED: dict[str, dict[str, Any]] = {
    CLONE: {"target_model": "cosyvoice-v3-flash"},
    DESIGNED: {"target_model": "cosyvoice-v3.5-plus", "voice_prompt": "a calm announcer"},
}
VOICE_REFUSED = "[tts:]Engine return error code: 418"
INSTRUCTION_REFUSED = "[tts:]Engine return error code: 428"


def with_real_voice(sandbox: RunningSandbox, parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters, with the id of a voice that is made for them."""
    enrolled = ENROLLED.get(parameters.get("voice", ""))
    if enrolled is None:
        return parameters
    (voice_id,) = add_voices(sandbox, "sk-test-1", **enrolled)
    return {**parameters, "voice": voice_id}


def missing(name: str) -> str:
    return f"Missing required parameter '{name}'! Please follow the protocol!"


def invalid(name: str) -> str:
    return f"Required parameter({name}) missing or invalid, please check the request parameters."


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "No API-key provided."),
        ({"Authorization": "Bearer "}, "No API-key provided."),
        ({"Authorization": "Basic abc"}, "No API-key provided."),
        ({"Authorization": "Bearer sk-bad"}, "Invalid API-key provided."),
        ({"Authorization": "bearer sk-bad-2"}, "Invalid API-key provided."),
    ],
)
async def test_the_handshake_refuses_bad_keys(sandbox: RunningSandbox, headers: dict[str, str], message: str) -> None:
    with pytest.raises(websockets.InvalidStatus) as refused:
        async with websockets.connect(sandbox.ws_url, additional_headers=headers, proxy=None):
            pass
    response = refused.value.response
    body = orjson.loads(response.body)
    assert response.status_code == 401
    assert (body["code"], body["message"]) == ("InvalidApiKey", message)
    assert response.headers["x-request-id"] == body["request_id"]
    uuid.UUID(body["request_id"])


async def test_lower_case_bearer_is_accepted(sandbox: RunningSandbox) -> None:
    headers = {"Authorization": "bearer sk-test-1"}
    async with websockets.connect(sandbox.ws_url, additional_headers=headers, proxy=None) as connection:
        await connection.ping()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ""}, missing("payload.model")),
        ({"model": None}, missing("payload.model")),
        ({"task_group": None}, missing("payload.task_group")),
        ({"task": ""}, missing("payload.task")),
        ({"function": None}, missing("payload.function")),
        ({"task": "asr"}, invalid("payload.task")),
        ({"input": None}, "task can not be null"),
        ({"input": {"text": "早"}}, invalid("payload.input")),
        ({"parameters": None}, missing("payload.parameters")),
    ],
)
async def test_a_run_task_must_be_complete(sandbox: RunningSandbox, change: dict[str, Any], message: str) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        dialogue.task_id = uuid.uuid4().hex
        await dialogue.send("run-task", {k: v for k, v in (run_payload() | change).items() if v is not None})
        assert await dialogue.failure() == ("InvalidParameter", message)
    call = sandbox.call_that_ended(dialogue.task_id)
    assert (call["outcome"], call["error_message"]) == ("failed", message)


@pytest.mark.parametrize(
    ("model", "parameters", "message"),
    [
        ("cosyvoice-v3-flash", {"voice": ""}, "Request voice is invalid!"),
        ("cosyvoice-v3-flash", {"voice": None}, "Request voice is invalid!"),
        ("cosyvoice-v3-flash", {"voice": "nobody"}, VOICE_REFUSED),
        ("cosyvoice-v3-flash", {"voice": "longxiaochun_v2"}, VOICE_REFUSED),
        ("cosyvoice-v2", {"voice": "longanyang"}, VOICE_REFUSED),
        ("cosyvoice-v3-plus", {"voice": "longyingjing_v3"}, VOICE_REFUSED),
        ("cosyvoice-v3-plus", {"voice": CLONE}, VOICE_REFUSED),
        ("cosyvoice-v3.5-plus", {"voice": "longanyang"}, VOICE_REFUSED),
        ("cosyvoice-v1", {"voice": "longxiaochun", "format": "opus"}, invalid("format")),
        ("cosyvoice-v3-flash", {"text_type": None}, missing("payload.parameters.text_type")),
        ("cosyvoice-v3-flash", {"text_type": "SSML"}, invalid("text_type")),
        ("cosyvoice-v3-flash", {"format": "flac"}, invalid("format")),
        ("cosyvoice-v3-flash", {"sample_rate": 11025}, invalid("sample_rate")),
        ("cosyvoice-v3-flash", {"sample_rate": "22050"}, invalid("sample_rate")),
        ("cosyvoice-v3-flash", {"volume": 101}, invalid("volume")),
        ("cosyvoice-v3-flash", {"rate": 3.0}, invalid("rate")),
        ("cosyvoice-v3-flash", {"pitch": 0.4}, invalid("pitch")),
        ("cosyvoice-v3-flash", {"rate": True}, invalid("rate")),
        ("cosyvoice-v3-flash", {"bit_rate": 5}, invalid("bit_rate")),
        ("cosyvoice-v3-flash", {"seed": 65536}, invalid("seed")),
        ("cosyvoice-v3-flash", {"enable_ssml": "true"}, invalid("enable_ssml")),
        ("cosyvoice-v3-flash", {"language_hints": ["xx"]}, invalid("language_hints")),
        ("cosyvoice-v3-flash", {"hot_fix": {"replace": ["今天"]}}, invalid("hot_fix")),
        ("cosyvoice-v3-flash", {"instruction": "请开心一点。"}, INSTRUCTION_REFUSED),
        ("cosyvoice-v3-flash", {"instruction": "你说话的情感是happy"}, INSTRUCTION_REFUSED),
        ("cosyvoice-v3-flash", {"instruction": "字" * 51, "voice": CLONE}, INSTRUCTION_REFUSED),
        (
            "cosyvoice-v3-flash",
            {"instruction": "你说话的情感是happy。", "voice": "longanwen_v3"},
            INSTRUCTION_REFUSED,
        ),
        (
            "cosyvoice-v3-plus",
            {"instruction": "你正在进行剧情解说，你说话的情感是sad。", "voice": "longanhuan"},
            INSTRUCTION_REFUSED,
        ),
    ],
)
async def test_impossible_parameters_are_refused(
    sandbox: RunningSandbox, model: str, parameters: dict[str, Any], message: str
) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        payload = run_payload(model)
        changed = payload["parameters"] | with_real_voice(sandbox, parameters)
        payload["parameters"] = {k: v for k, v in changed.items() if v is not None}
        dialogue.task_id = uuid.uuid4().hex
        await dialogue.send("run-task", payload)
        assert await dialogue.failure() == ("InvalidParameter", message)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("cosyvoice-v3-plus", {}),
        ("cosyvoice-v3-flash", {"voice": "longyingjing_v3"}),
        ("cosyvoice-v2", {"voice": "longxiaochun_v2"}),
        ("cosyvoice-v3-flash", {"voice": CLONE}),
        ("cosyvoice-v3-flash", {"voice": CLONE, "instruction": "请用广东话表达。"}),
        ("cosyvoice-v3.5-plus", {"voice": DESIGNED, "instruction": "Speak like a tired robot."}),
        ("cosyvoice-v3-flash", {"instruction": "你说话的情感是happy。"}),
        ("cosyvoice-v3-plus", {"instruction": "你正在进行新闻播报，你说话的情感是neutral。"}),
        ("cosyvoice-v3-flash", {"voice": "longanhuan_v3", "instruction": "请用四川话表达。"}),
        ("cosyvoice-v3-flash", {"speech_rate": 9, "surprise": {}}),
        ("cosyvoice-v3-flash", {"language_hints": ["zh", "en"], "hot_fix": {"replace": [{"今天": "明天"}]}}),
    ],
)
async def test_allowed_parameters_are_taken(sandbox: RunningSandbox, model: str, parameters: dict[str, Any]) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        answer = await dialogue.say("今天好。", model=model, **with_real_voice(sandbox, parameters))
        assert answer.characters == 7


async def test_an_unknown_model_is_not_found(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        await dialogue.run("cosyvoice-v9")
        assert await dialogue.failure() == ("ModelNotFound", "Model can not be found.")


@pytest.mark.parametrize("action", ["continue-task", "finish-task", "sing", ""])
async def test_nothing_comes_before_run_task(sandbox: RunningSandbox, action: str) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        dialogue.task_id = uuid.uuid4().hex
        await dialogue.send(action, {"input": {"text": "早"}})
        assert (await dialogue.failure())[0] == "InvalidParameter"


@pytest.mark.parametrize(
    ("action", "payload", "message"),
    [
        ("continue-task", {}, "task can not be null"),
        ("continue-task", {"input": {}}, "task can not be null"),
        ("continue-task", {"input": {"text": ""}}, "task can not be null"),
        ("continue-task", {"input": {"text": 5}}, "task can not be null"),
        ("finish-task", {}, "task can not be null"),
        ("finish-task", {"input": {}}, "Please ensure input text is valid."),
    ],
)
async def test_every_message_needs_its_input(
    sandbox: RunningSandbox, action: str, payload: dict[str, Any], message: str
) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        await dialogue.start()
        await dialogue.send(action, payload)
        assert await dialogue.failure() == ("InvalidParameter", message)
    assert sandbox.call_that_ended(dialogue.task_id)["outcome"] == "failed"


async def test_punctuation_alone_is_no_valid_text(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        await dialogue.start()
        await dialogue.text("……  。")
        await dialogue.finish()
        assert await dialogue.failure() == ("InvalidParameter", "Please ensure input text is valid.")


async def test_another_task_id_fails_the_running_task(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        await dialogue.start()
        await dialogue.send("continue-task", {"input": {"text": "早。"}}, task_id="other")
        assert await dialogue.failure() == ("InvalidParameter", invalid("header.task_id"))


async def test_a_task_id_is_not_used_twice(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        await dialogue.say("早。")
        await dialogue.run(task_id=dialogue.task_id)
        assert await dialogue.failure() == ("InvalidParameter", invalid("header.task_id"))


async def test_text_after_finish_is_refused(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        await dialogue.start()
        await dialogue.text("今天天气怎么样？" * 500)
        await dialogue.finish()
        await dialogue.text("晚。")
        assert (await dialogue.failure())[0] == "InvalidParameter"


@pytest.mark.parametrize("frame", ["{", "[]", "5", '"run-task"'])
async def test_what_is_no_json_object_closes_the_socket(sandbox: RunningSandbox, frame: str) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        await dialogue.connection.send(frame)
        assert await dialogue.closed() == 1007


async def test_a_broken_frame_ends_the_running_task(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        await dialogue.start()
        await dialogue.text("今天天气怎么样？" * 100)
        await dialogue.listen("sentence-end")
        await dialogue.connection.send("}")
        with pytest.raises(websockets.ConnectionClosed):
            await dialogue.listen()
        assert dialogue.connection.close_code == 1007
    assert sandbox.call_that_ended(dialogue.task_id)["outcome"] == "failed"


async def test_other_socket_paths_are_not_found(sandbox: RunningSandbox) -> None:
    with pytest.raises(websockets.InvalidStatus) as refused:
        async with dial(sandbox.ws_url + "/x"):
            pass
    assert refused.value.response.status_code == 404


async def test_binary_frames_close_the_socket(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        await dialogue.connection.send(b"{}")
        assert await dialogue.closed() == 1003


async def test_text_limits_count_as_billed(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        await dialogue.start()
        await dialogue.text("字" * 10_000)
        await dialogue.text("a" * 20_001)
        assert (await dialogue.listen("task-failed")).error[0] == "InvalidParameter"


async def test_ssml_takes_exactly_one_text(sandbox: RunningSandbox) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        await dialogue.start(enable_ssml=True)
        await dialogue.text("一")
        await dialogue.text("二")
        assert await dialogue.failure() == ("InvalidParameter", "Text request limit violated, expected 1.")


@pytest.mark.parametrize(
    ("voice", "text", "message"),
    [
        ("loongandy_v3", "<speak>Hi</speak>", "SSML text is not supported at the moment!"),
        ("longanyang", "<speak>没关</speek>", "Please ensure input text is valid."),
        ("longanyang", "<speak>里<speak>外</speak></speak>", "Please ensure input text is valid."),
        ("longanyang", "<speak>旁</speak>白", "Please ensure input text is valid."),
        ("longanyang", "<speak>1 < 2</speak>", "Please ensure input text is valid."),
    ],
)
async def test_bad_ssml_is_refused(sandbox: RunningSandbox, voice: str, text: str, message: str) -> None:
    async with dial(sandbox.ws_url) as dialogue:
        await dialogue.start(enable_ssml=True, voice=voice)
        await dialogue.text(text)
        assert await dialogue.failure() == ("InvalidParameter", message)
