"""Tasks that end otherwise than they should: one clear error, and the count is kept."""

import json

import pytest

from app.dashscope import pool
from app.errors import AppError, ConnectionLost, InvalidModel, InvalidVoice, UpstreamError
from tests.dashscope.provider import AUDIO, Call, Provider, Script, fails, in_turn, sends, speaks
from tests.dashscope.speaker import Speaker


def event(**fields: object) -> Script:
    return sends(json.dumps(fields))


BREAKS: dict[str, tuple[Script, type[AppError]]] = {
    "closed": (Call.hang_up, ConnectionLost),
    "cut": (Call.drop, ConnectionLost),
    "cut in the middle of a frame": (
        in_turn(lambda call: call.send_raw(b"\x82\x7e\x1f\x40half of it"), lambda call: call.send_raw(b""), Call.drop),
        ConnectionLost,
    ),
    "a frame against the protocol": (lambda call: call.send_raw(b"\xff\xff\xff\xff"), ConnectionLost),
    "text that is not UTF-8": (lambda call: call.send_raw(b"\x81\x02\xff\xfe"), ConnectionLost),
    "a frame beyond the bound": (sends(bytes(pool.MAX_FRAME_BYTES + 1)), ConnectionLost),
    "not JSON": (sends("{"), UpstreamError),
    "empty text": (sends(""), UpstreamError),
    "not an object": (sends("[1]"), UpstreamError),
    "no header": (event(payload={}), UpstreamError),
    "header of a wrong type": (event(header="task-finished"), UpstreamError),
    "event of a wrong type": (event(header={"event": 1}), UpstreamError),
    "payload of a wrong type": (event(header={"event": "task-finished"}, payload=[1]), UpstreamError),
    "usage of a wrong type": (event(header={"event": "task-finished"}, payload={"usage": 4}), UpstreamError),
    "a count that is a string": (lambda call: call.count("4"), UpstreamError),
    "a count that is negative": (lambda call: call.count(-4), UpstreamError),
    "a count that is a boolean": (lambda call: call.count(True), UpstreamError),
    "a count that is a fraction": (lambda call: call.count(4.5), UpstreamError),
    "an event of another task": (lambda call: call.event("task-finished", task_id="another"), UpstreamError),
    "task-failed": (fails("InternalError"), UpstreamError),
    "task-failed for the voice": (fails("InvalidParameter", "[tts:]Engine return error code: 418"), InvalidVoice),
}


@pytest.mark.parametrize(("broken", "error"), BREAKS.values(), ids=BREAKS.keys())
async def test_a_break_before_the_first_audio_is_told_and_never_asked_again(
    provider: Provider, speaker: Speaker, broken: Script, error: type[AppError]
) -> None:
    provider.expect(in_turn(Call.start_and_hear_text, broken))
    with pytest.raises(error) as failure:
        await speaker.say()
    assert type(failure.value) is error
    await provider.all_ended()
    assert provider.texts == ["你好"]
    assert speaker.usage.characters == 0
    assert speaker.usage.request_id == provider.calls[0].task_id


@pytest.mark.parametrize(("broken", "error"), BREAKS.values(), ids=BREAKS.keys())
async def test_a_break_after_audio_keeps_the_audio_and_the_count(
    provider: Provider, speaker: Speaker, broken: Script, error: type[AppError]
) -> None:
    provider.expect(in_turn(Call.start_and_hear_text, Call.audio, lambda call: call.count(11), Call.audio, broken))
    with pytest.raises(error) as failure:
        await speaker.say()
    assert type(failure.value) is error
    assert speaker.heard == [AUDIO, AUDIO]
    assert speaker.usage.characters == 11
    await provider.all_ended()
    assert provider.texts == ["你好"]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (fails("ModelNotFound", "Model can not be found."), InvalidModel),
        (fails("InvalidParameter", "Missing required parameter 'payload.model'!"), UpstreamError),
        (sends(b"audio"), UpstreamError),
        (Call.finish, UpstreamError),
        (lambda call: call.event("result-generated"), UpstreamError),
        (sends("not JSON"), UpstreamError),
    ],
    ids=["model refused", "parameter refused", "audio", "task-finished", "result-generated", "not JSON"],
)
async def test_a_fresh_connection_that_does_not_start_the_task_is_told_and_no_text_is_sent(
    provider: Provider, speaker: Speaker, answer: Script, error: type[AppError]
) -> None:
    provider.expect(in_turn(Call.hear_run_task, answer))
    with pytest.raises(error) as failure:
        await speaker.say()
    assert type(failure.value) is error
    await provider.all_ended()
    assert provider.actions == ["run-task"]


async def test_the_last_count_of_a_failed_task_is_kept(provider: Provider, speaker: Speaker) -> None:
    async def script(call: Call) -> None:
        await call.start_and_hear_text()
        await call.count(11)
        await call.event(
            "task-failed",
            {"usage": {"characters": 15}},
            error_code="InternalError",
            attributes={"request_uuid": "req-failed"},
        )

    provider.expect(script)
    with pytest.raises(UpstreamError):
        await speaker.say()
    assert (speaker.usage.characters, speaker.usage.request_id) == (15, "req-failed")


async def test_a_frame_at_the_bound_still_arrives(provider: Provider, speaker: Speaker) -> None:
    provider.expect(speaks(bytes(pool.MAX_FRAME_BYTES)))
    assert len(await speaker.say()) == pool.MAX_FRAME_BYTES
