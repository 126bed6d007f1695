"""Cancelling stops the provider, keeps what was counted and the connection."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from app.errors import ConnectionLost, UpstreamError, UpstreamTimeout
from tests.dashscope.provider import AUDIO, Call, Provider, Script, happened, in_turn, speaks
from tests.dashscope.speaker import Speaker

CANCEL = {"input": {"directive": "cancel"}}


def read_on(frames: AsyncIterator[bytes]) -> "asyncio.Task[bytes]":
    """The next frame, awaited by a task of its own."""

    async def read() -> bytes:
        return await anext(frames)

    return asyncio.create_task(read())


async def obeys(call: Call) -> None:
    """Speak until told to stop."""
    await call.start_and_hear_text()
    await call.audio(b"one")
    await call.count(11)
    assert (await call.hear("finish-task"))["payload"] == CANCEL
    await call.audio(b"on its way")
    await call.finish(characters=13)


async def test_cancelling_from_another_task_ends_the_audio_and_keeps_count_and_connection(
    provider: Provider, speaker: Speaker
) -> None:
    provider.expect(in_turn(obeys, speaks(b"next")))
    async with speaker.speak() as task:
        frames = task.audio()
        heard = [await anext(frames)]
        reading = read_on(frames)
        await asyncio.sleep(0)
        await asyncio.gather(task.cancel(), task.cancel())
        heard.append(await reading)
        heard += [frame async for frame in frames]
    assert heard == [b"one", b"on its way"]
    assert speaker.usage.characters == 13
    await task.cancel()
    assert await speaker.say() == b"next"
    assert len(provider.handshakes) == 1
    assert [message["payload"] for message in provider.messages].count(CANCEL) == 1


async def test_cancelling_without_a_reader_is_obeyed_too(provider: Provider, speaker: Speaker) -> None:
    provider.expect(obeys)
    async with speaker.speak() as task:
        await task.cancel()
        assert [frame async for frame in task.audio()] == [b"one", b"on its way"]
    assert speaker.usage.characters == 13


@pytest.mark.parametrize("reader_waits", [True, False])
async def test_a_provider_that_ignores_the_cancel_is_left_soon(
    provider: Provider, speaker: Speaker, monkeypatch: pytest.MonkeyPatch, reader_waits: bool
) -> None:
    monkeypatch.setattr("app.dashscope.speech_task.CANCEL_SECONDS", 0.1)
    counted = asyncio.Event()

    async def script(call: Call) -> None:
        await call.start_and_hear_text()
        await call.audio()
        await call.count(11)
        await (await call.connection.ping())
        counted.set()

    provider.expect(script)
    async with asyncio.timeout(speaker.silence_seconds / 2), speaker.speak() as task:
        frames = task.audio()
        await anext(frames)
        reading = read_on(frames)
        if reader_waits:
            await happened(counted)
        await task.cancel()
        with pytest.raises(UpstreamTimeout):
            await reading
    assert speaker.usage.characters == 11
    await provider.calls[0].ended()


async def test_a_provider_that_speaks_on_after_the_cancel_is_heard_to_its_end(
    provider: Provider, speaker: Speaker
) -> None:
    async def speaks_on(call: Call) -> None:
        await call.start_and_hear_text()
        await call.audio(b"one")
        await call.hear("finish-task")
        await call.audio(b"two")
        await call.finish(characters=20)

    provider.expect(speaks_on)
    async with speaker.speak() as task:
        await task.cancel()
        assert [frame async for frame in task.audio()] == [b"one", b"two"]
    assert speaker.usage.characters == 20


async def test_a_provider_that_never_ends_after_the_cancel_is_left_soon(
    provider: Provider, speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.dashscope.speech_task.CANCEL_SECONDS", 0.2)

    async def speaks_for_ever(call: Call) -> None:
        await call.start_and_hear_text()
        await call.count(11)
        while True:
            await call.audio()
            await asyncio.sleep(0.01)

    async def read_to_the_end() -> None:
        async for _ in task.audio():
            pass

    provider.expect(speaks_for_ever)
    async with asyncio.timeout(speaker.silence_seconds / 2), speaker.speak() as task:
        await task.cancel()
        with pytest.raises(UpstreamTimeout):
            await read_to_the_end()
    assert speaker.usage.characters == 11


async def test_cancelling_after_the_end_is_harmless(provider: Provider, speaker: Speaker) -> None:
    provider.expect(in_turn(speaks(b"one"), speaks(b"two")))
    async with speaker.speak() as task:
        assert [frame async for frame in task.audio()] == [b"one"]
        await task.cancel()
    assert await speaker.say() == b"two"
    assert CANCEL not in [message["payload"] for message in provider.messages]


@pytest.mark.parametrize("gone", [Call.hang_up, Call.drop])
async def test_cancelling_a_connection_that_is_gone_is_harmless(
    provider: Provider, speaker: Speaker, gone: Script
) -> None:
    provider.expect(in_turn(Call.start_and_hear_text, Call.audio, gone))
    async with speaker.speak() as task:
        await provider.calls[0].ended()
        await task.cancel()
        with pytest.raises(ConnectionLost):
            assert [frame async for frame in task.audio()] == [AUDIO]


async def test_a_cancelled_task_that_fails_is_told(provider: Provider, speaker: Speaker) -> None:
    async def script(call: Call) -> None:
        await call.start_and_hear_text()
        await call.audio()
        await call.hear("finish-task")
        await call.fail("InternalError")

    provider.expect(script)
    async with speaker.speak() as task:
        await task.cancel()
        with pytest.raises(UpstreamError):
            assert [frame async for frame in task.audio()] == [AUDIO]
