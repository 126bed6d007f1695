"""A synthesis can be stopped at any moment: for nothing before its text is sent, by a cancel afterwards."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from app.dashscope import Interruption, SpeechClient, Usage
from app.errors import Abandoned
from tests.dashscope.provider import Call, Provider, happened, in_turn, speaks
from tests.dashscope.speaker import PARAMETERS, Speaker


async def interrupted_while(
    speaker: Speaker, interruption: Interruption, reached: Callable[[], Awaitable[object]]
) -> None:
    """Speak, and interrupt once a point is reached; it must be over at once."""
    saying = asyncio.create_task(speaker.say(interruption=interruption))
    await reached()
    interruption.request()
    async with asyncio.timeout(1):
        await saying


async def test_one_who_left_before_the_beginning_opens_nothing(provider: Provider, speaker: Speaker) -> None:
    interruption = Interruption()
    interruption.request()
    with pytest.raises(Abandoned):
        await speaker.say(interruption=interruption)
    assert provider.handshakes == []
    assert speaker.turns == []


async def test_one_who_left_takes_no_turn_on_an_idle_connection_either(provider: Provider, speaker: Speaker) -> None:
    provider.expect(speaks())
    await speaker.say()
    interruption = Interruption()
    interruption.request()
    with pytest.raises(Abandoned):
        await speaker.say(interruption=interruption)
    assert len(speaker.turns) == 1
    assert provider.actions.count("run-task") == 1


async def test_one_who_leaves_while_the_task_is_not_started_pays_nothing(provider: Provider, speaker: Speaker) -> None:
    heard = asyncio.Event()

    async def never_starts(call: Call) -> None:
        await call.hear_run_task()
        heard.set()
        await call.ended()

    provider.expect(never_starts)
    with pytest.raises(Abandoned):
        await interrupted_while(speaker, Interruption(), lambda: happened(heard))
    await provider.all_ended()
    assert provider.texts == []


async def stays(call: Call) -> None:
    """Wait until the client goes."""
    await call.ended()


async def test_one_who_leaves_while_waiting_for_a_turn_takes_none(
    provider: Provider, speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = asyncio.Event()

    async def never_a_turn(*_: object) -> None:
        waiting.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(speaker, "_take_turn", never_a_turn)
    provider.expect(stays)
    with pytest.raises(Abandoned):
        await interrupted_while(speaker, Interruption(), lambda: happened(waiting))
    await provider.all_ended()
    assert provider.actions == []


async def test_what_is_done_before_the_text_is_not_broken_off(provider: Provider, speaker: Speaker) -> None:
    interruption, done = Interruption(), asyncio.Event()

    async def note() -> None:
        assert "run-task" in provider.actions
        interruption.request()
        await asyncio.sleep(0.05)
        done.set()

    provider.expect(in_turn(Call.start, stays))
    client = SpeechClient(speaker.pool, speaker._take_turn, 3, 5)
    with pytest.raises(Abandoned):
        async with client.speak(speaker.credential, PARAMETERS, "你好", Usage(), note, interruption):
            pass
    assert done.is_set()
    await provider.all_ended()
    assert provider.texts == []


async def test_one_who_leaves_before_the_first_audio_stops_the_provider_at_once(
    provider: Provider, speaker: Speaker
) -> None:
    heard = asyncio.Event()

    async def thinks(call: Call) -> None:
        await call.start_and_hear_text()
        heard.set()
        assert (await call.hear("finish-task"))["payload"] == {"input": {"directive": "cancel"}}
        await call.finish(characters=3)

    provider.expect(in_turn(thinks, speaks(b"next")))
    await interrupted_while(speaker, Interruption(), lambda: happened(heard))
    assert speaker.usage.characters == 3
    speaker.heard.clear()
    assert await speaker.say() == b"next"
    assert len(provider.handshakes) == 1


async def test_an_interruption_after_the_end_is_harmless(provider: Provider, speaker: Speaker) -> None:
    interruption = Interruption()
    provider.expect(speaks())
    await speaker.say(interruption=interruption)
    interruption.request()
    assert provider.actions == ["run-task", "continue-task", "finish-task"]


async def test_what_the_provider_says_before_it_closes_is_heard(provider: Provider, speaker: Speaker) -> None:
    async def refuses_in_one_breath(call: Call) -> None:
        await call.start()
        await call.fail("Arrearage", "Access denied")
        await call.hang_up()

    provider.expect(refuses_in_one_breath)
    with pytest.raises(Exception, match="欠费"):
        await speaker.say()


async def test_unknown_events_before_the_start_are_ignored(provider: Provider, speaker: Speaker) -> None:
    async def chatty(call: Call) -> None:
        await call.hear_run_task()
        await call.event("heart-beat")
        await call.event("task-started")
        await call.hear_text()
        await call.finish()

    provider.expect(chatty)
    assert await speaker.say() == b""
