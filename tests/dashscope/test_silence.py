"""Silence is timed from the last word of the provider; steady progress never times out."""

import asyncio
from dataclasses import replace

import pytest

from app.errors import UpstreamTimeout
from tests.dashscope.provider import AUDIO, Call, Provider, Script, in_turn, speaks
from tests.dashscope.speaker import Speaker

SILENT = {
    "after run-task": Call.hear_run_task,
    "after the text": Call.start_and_hear_text,
    "between frames": in_turn(Call.start_and_hear_text, Call.audio),
    "in the middle of a frame": in_turn(Call.start_and_hear_text, lambda call: call.send_raw(b"\x82\x7e\x1f\x40half")),
}


@pytest.mark.parametrize("script", SILENT.values(), ids=SILENT.keys())
async def test_silence_times_out_and_is_not_asked_again(provider: Provider, impatient: Speaker, script: Script) -> None:
    provider.expect(script)
    with pytest.raises(UpstreamTimeout) as silence:
        await impatient.say()
    assert type(silence.value) is UpstreamTimeout
    await provider.all_ended()
    assert len(provider.handshakes) == 1
    assert len(provider.texts) <= 1


async def test_what_was_counted_before_the_silence_is_kept(provider: Provider, impatient: Speaker) -> None:
    provider.expect(in_turn(Call.start_and_hear_text, Call.audio, lambda call: call.count(11)))
    with pytest.raises(UpstreamTimeout):
        await impatient.say()
    assert impatient.usage.characters == 11


async def test_steady_slow_progress_does_not_time_out(provider: Provider, speaker: Speaker) -> None:
    async def slowly(call: Call) -> None:
        await call.hear_run_task()
        await asyncio.sleep(0.15)
        await call.event("task-started")
        await call.hear_text()
        for _ in range(4):
            await asyncio.sleep(0.15)
            await call.audio()
        await call.finish()

    provider.expect(slowly)
    assert await replace(speaker, silence_seconds=0.6).say() == AUDIO * 4


async def test_a_slow_reader_is_not_taken_for_a_silent_provider(provider: Provider, impatient: Speaker) -> None:
    provider.expect(speaks(b"one", b"two"))
    async with impatient.speak() as task:
        frames = task.audio()
        heard = [await anext(frames)]
        await asyncio.sleep(impatient.silence_seconds * 1.5)
        heard += [frame async for frame in frames]
    assert heard == [b"one", b"two"]
