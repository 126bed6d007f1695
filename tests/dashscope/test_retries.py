"""A call is made again only when the provider surely did not take it on."""

import asyncio
from dataclasses import replace

import pytest

from app.dashscope.retries import MAX_ATTEMPTS
from app.errors import ConnectionLost, Throttled, UpstreamError
from tests.dashscope.provider import (
    AUDIO,
    Call,
    Provider,
    Refusal,
    Script,
    fails,
    happened,
    in_turn,
    sends,
    speaks,
    throttles,
)
from tests.dashscope.speaker import Speaker

throttled_after_text = in_turn(Call.start_and_hear_text, fails("Throttling.RateQuota", "Requests rate limit exceeded"))

NOT_ACCEPTED = {
    "throttled before task-started": throttles,
    "throttled instead of working": throttled_after_text,
    "closed before task-started": in_turn(Call.hear_run_task, Call.hang_up),
    "cut before task-started": in_turn(Call.hear_run_task, Call.drop),
    "closed at once": Call.hang_up,
}


@pytest.mark.parametrize("refused", NOT_ACCEPTED.values(), ids=NOT_ACCEPTED.keys())
async def test_what_was_not_accepted_is_asked_again_on_a_fresh_connection(
    provider: Provider, speaker: Speaker, refused: Script
) -> None:
    provider.expect(refused, refused, speaks(characters=6, request_id="req-2"))
    assert await speaker.say() == AUDIO
    assert (speaker.usage.characters, speaker.usage.request_id) == (6, "req-2")
    assert len(provider.handshakes) == 3
    assert 1 <= len(speaker.turns) <= 3  # a socket seen to be closed before anything was submitted costs no turn
    assert "continue-task" in [message["header"]["action"] for message in provider.calls[2].messages]


async def test_a_text_is_accepted_once_when_the_provider_throttles_before_it(
    provider: Provider, speaker: Speaker
) -> None:
    provider.expect(throttles, throttles, Refusal(429), speaks())
    await speaker.say()
    assert provider.texts == ["你好"]


@pytest.mark.parametrize("throttled", [throttles, throttled_after_text])
async def test_throttling_for_ever_ends_with_the_time_to_come_back(
    provider: Provider, speaker: Speaker, throttled: Script
) -> None:
    provider.expect(*[throttled] * MAX_ATTEMPTS)
    with pytest.raises(Throttled) as refused:
        await speaker.say()
    assert refused.value.retry_after_seconds
    assert len(provider.handshakes) == MAX_ATTEMPTS
    assert speaker.usage.characters == 0


async def test_connections_that_are_lost_for_ever_end_after_a_bounded_number(
    provider: Provider, speaker: Speaker
) -> None:
    provider.expect(*[in_turn(Call.hear_run_task, Call.drop)] * MAX_ATTEMPTS)
    with pytest.raises(ConnectionLost):
        await speaker.say()
    assert provider.texts == []


async def test_throttling_on_a_reused_connection_is_retried_on_a_fresh_one(
    provider: Provider, speaker: Speaker
) -> None:
    provider.expect(in_turn(speaks(), throttles), speaks(b"two"))
    await speaker.say()
    assert await speaker.say() == b"two"


ACCEPTED = {
    "closed": Call.hang_up,
    "cut": Call.drop,
    "failed": fails("InternalError"),
    "garbage": sends("?"),
    "throttled after a count": in_turn(lambda call: call.count(11), fails("Throttling.RateQuota")),
    "throttled with a count": lambda call: call.event(
        "task-failed", {"usage": {"characters": 4}}, error_code="Throttling.RateQuota", error_message=""
    ),
    "throttled after audio": in_turn(Call.audio, fails("Throttling.RateQuota")),
}


@pytest.mark.parametrize("reused", [False, True], ids=["fresh", "reused"])
@pytest.mark.parametrize("end", ACCEPTED.values(), ids=ACCEPTED.keys())
async def test_nothing_is_asked_again_once_the_text_was_accepted(
    provider: Provider, speaker: Speaker, end: Script, reused: bool
) -> None:
    accepts = in_turn(Call.start_and_hear_text, end)
    provider.expect(in_turn(speaks(), accepts) if reused else accepts)
    if reused:
        await speaker.say("第一句")
    with pytest.raises((UpstreamError, Throttled)):
        await speaker.say("第二句")
    await provider.all_ended()
    assert provider.texts.count("第二句") == 1


async def test_a_caller_who_leaves_between_attempts_ends_them(
    provider: Provider, speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.dashscope.failures.RETRY_BASE_SECONDS", 60)
    throttled = asyncio.Event()

    async def script(call: Call) -> None:
        await throttles(call)
        throttled.set()

    provider.expect(script)
    saying = asyncio.create_task(replace(speaker, silence_seconds=600).say())
    await happened(throttled)
    saying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saying
