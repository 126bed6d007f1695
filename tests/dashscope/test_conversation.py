"""What goes over the wire when all is well."""

import os

import pytest

from app.dashscope import ConnectionPool, Credential, SpeechClient, SpeechParameters, Usage
from tests.dashscope.provider import Call, Provider, in_turn, speaks
from tests.dashscope.speaker import PARAMETERS, Speaker


async def test_a_synthesis_sends_exactly_the_messages_of_the_protocol(provider: Provider, speaker: Speaker) -> None:
    provider.expect(speaks())
    await speaker.say("今天天气怎么样？")
    (call,) = provider.calls

    def message(action: str, payload: object) -> object:
        return {"header": {"action": action, "task_id": call.task_id, "streaming": "duplex"}, "payload": payload}

    run_task = {
        "task_group": "audio",
        "task": "tts",
        "function": "SpeechSynthesizer",
        "model": "cosyvoice-v3-flash",
        "parameters": {
            "text_type": "PlainText",
            "voice": "longanyang",
            "format": "mp3",
            "sample_rate": 22050,
            "volume": 50,
            "rate": 1.0,
            "pitch": 1.0,
            "enable_ssml": False,
        },
        "input": {},
    }
    assert call.messages == [
        message("run-task", run_task),
        message("continue-task", {"input": {"text": "今天天气怎么样？"}}),
        message("finish-task", {"input": {}}),
    ]
    assert call.task_id
    assert speaker.turns == [(speaker.credential, PARAMETERS.model)]


async def test_every_parameter_has_its_wire_name(provider: Provider, speaker: Speaker) -> None:
    provider.expect(speaks())
    parameters = SpeechParameters(
        model="cosyvoice-v2",
        voice="longxiaochun_v2",
        format="wav",
        sample_rate=48000,
        volume=70,
        rate=1.5,
        pitch=0.5,
        instruction="你说话的情感是happy。",
        enable_ssml=True,
    )

    async def at_once(credential: Credential, model: str) -> None:
        assert (credential, model) == (speaker.credential, "cosyvoice-v2")

    client = SpeechClient(speaker.pool, at_once, 3, 5)
    async with client.speak(speaker.credential, parameters, "<speak>好</speak>", Usage()) as task:
        async for _ in task.audio():
            pass
    payload = provider.messages[0]["payload"]
    assert payload["model"] == "cosyvoice-v2"
    assert payload["parameters"] == {
        "text_type": "PlainText",
        "voice": "longxiaochun_v2",
        "format": "wav",
        "sample_rate": 48000,
        "volume": 70,
        "rate": 1.5,
        "pitch": 0.5,
        "instruction": "你说话的情感是happy。",
        "enable_ssml": True,
    }


async def test_no_text_is_sent_before_the_task_has_started(provider: Provider, speaker: Speaker) -> None:
    actions_before_start = []

    async def script(call: Call) -> None:
        await call.hear_run_task()
        await (await call.connection.ping())  # whatever the client sent before its pong has arrived
        actions_before_start.extend(provider.actions)
        await call.event("task-started")
        await call.hear_text()
        await call.finish()

    provider.expect(script)
    await speaker.say()
    assert actions_before_start == ["run-task"]


async def test_audio_arrives_byte_for_byte_in_order(provider: Provider, speaker: Speaker) -> None:
    frames = [os.urandom(size) for size in (1, 8000, 127, 65536, 126, 300_000)]
    provider.expect(speaks(*frames))
    await speaker.say()
    assert speaker.heard == frames


async def test_usage_is_the_last_cumulative_count(provider: Provider, speaker: Speaker) -> None:
    async def script(call: Call) -> None:
        await call.start_and_hear_text()
        for characters in (11, 26, 40):
            await call.audio()
            await call.count(characters)
        await call.finish(characters=41, request_id="req-of-the-provider")

    provider.expect(script)
    await speaker.say()
    assert speaker.usage == Usage(41, "req-of-the-provider")


async def test_a_count_before_the_end_is_kept_when_the_end_has_none(provider: Provider, speaker: Speaker) -> None:
    async def script(call: Call) -> None:
        await call.start_and_hear_text()
        await call.count(11)
        await call.event("task-finished")

    provider.expect(script)
    await speaker.say()
    assert speaker.usage == Usage(11, provider.calls[0].task_id)


async def test_a_task_without_audio_ends_well(provider: Provider, speaker: Speaker) -> None:
    provider.expect(in_turn(Call.start_and_hear_text, Call.finish))
    assert await speaker.say() == b""


async def test_unknown_events_are_ignored(provider: Provider, speaker: Speaker) -> None:
    async def script(call: Call) -> None:
        await call.start_and_hear_text()
        await call.event("task-paused", {"news": [1, 2, 3]})
        await call.audio(b"one")
        await call.event("result-generated", {"output": {"type": "sentence-hum"}})
        await call.audio(b"two")
        await call.finish()

    provider.expect(script)
    assert await speaker.say() == b"onetwo"


@pytest.mark.parametrize("workspace", [None, "ws-1"])
async def test_the_handshake_carries_the_key_and_the_workspace(
    provider: Provider, pool: ConnectionPool, workspace: str | None
) -> None:
    provider.expect(speaks())
    await Speaker(pool, Credential("sk-test-of-mine", provider.url, "http://unused.test", workspace), 5).say()
    (headers,) = provider.handshakes
    assert headers["Authorization"] == "Bearer sk-test-of-mine"
    assert headers.get("X-DashScope-WorkSpace") == workspace


async def test_verifying_a_key_sends_no_task(provider: Provider, speaker: Speaker) -> None:
    provider.expect(speaks())
    await speaker.verify()
    await speaker.pool.close()
    await provider.all_ended()
    assert provider.messages == []


def test_a_credential_does_not_show_its_key() -> None:
    credential = Credential("sk-test-secret", "wss://example.test", "https://example.test")
    assert "sk-test-secret" not in repr(credential)
    assert "sk-test-secret" not in credential.fingerprint
