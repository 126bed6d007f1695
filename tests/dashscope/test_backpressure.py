"""A reader who does not read holds the provider back instead of filling our memory."""

import asyncio
import hashlib

from tests.dashscope.provider import Call, Provider, happened
from tests.dashscope.speaker import Speaker

FRAME = bytes(range(256)) * 256
FRAMES = 256
BOUND_BYTES = 4 * 1024 * 1024


async def test_a_reader_who_does_not_read_holds_the_provider_back_and_loses_nothing(
    provider: Provider, speaker: Speaker
) -> None:
    sent_bytes = 0
    held_back = asyncio.Event()

    async def floods(call: Call) -> None:
        nonlocal sent_bytes
        await call.start_and_hear_text()
        for number in range(FRAMES):
            sending = asyncio.create_task(call.audio(number.to_bytes(2, "big") + FRAME))
            done, _ = await asyncio.wait({sending}, timeout=0.3)
            if not done:
                held_back.set()
            await sending
            sent_bytes += len(FRAME)
        held_back.set()
        await call.finish()

    provider.expect(floods)
    async with speaker.speak() as task:
        await happened(held_back)
        assert sent_bytes < BOUND_BYTES < FRAMES * len(FRAME)
        numbers, contents = [], set()
        async for frame in task.audio():
            numbers.append(int.from_bytes(frame[:2], "big"))
            contents.add(hashlib.sha256(frame[2:]).digest())
    assert numbers == list(range(FRAMES))
    assert contents == {hashlib.sha256(FRAME).digest()}
