"""A pause that the provider would not survive (PROTOCOL §1.7): alone in its file, because it takes half a minute."""

import asyncio
import json
from typing import Any

import pytest

from tests.conftest import Account, CreateAccount
from tests.servers import Sandbox, Server
from tests.sound import decode, duration, loudness
from tests.talking import Heard, cost, kept_audio, provider_calls, record, talking

PAUSE_SECONDS = 26.0
BEFORE, AFTER = ["今天天气真好。", "我想"], ["，", "说一句话。"]


async def pause(backend: Server, account: Account, audio_format: str) -> Heard:
    """Say something, be silent for longer than the provider bears it, and go on."""
    async with talking(backend, account, format=audio_format) as talk:
        await talk.say(*BEFORE)
        await talk.hear_some()
        await talk.hear_for(PAUSE_SECONDS)
        return await talk.speak(*AFTER)


@pytest.fixture
async def paused(backend: Server, create_account: CreateAccount) -> dict[str, tuple[Account, Heard]]:
    """What was heard in each format; they pause at the same time."""
    accounts = {each: await create_account(backend) for each in ("pcm", "wav", "mp3", "opus")}
    heard = await asyncio.gather(*(pause(backend, account, each) for each, account in accounts.items()))
    return dict(zip(accounts, zip(accounts.values(), heard, strict=True), strict=True))


async def test_a_long_pause_is_not_noticed(paused: dict[str, tuple[Account, Heard]], sandbox: Sandbox) -> None:
    for audio_format, (account, heard) in paused.items():
        calls = await provider_calls(sandbox, account, 2)
        item = await record(account)
        assert "".join(call["text"] for call in calls) == "".join(BEFORE + AFTER), audio_format
        assert [call["outcome"] for call in calls] == ["finished", "finished"]
        gap = calls[1]["submitted_at"] - calls[0]["ended_at"]
        assert gap > 5, "the first task was finished long before the pause was over"
        characters = sum(call["characters"] for call in calls)
        assert heard.message == {
            "type": "complete",
            "characters": characters,
            "duration": item["duration"],
            "record_id": item["id"],
            "bill": cost(characters),
            "audio_url": item["output_url"],
        }
        assert (item["bill"], "status" in item) == (cost(characters), False)
        assert json.loads(item["input_data"])["text"] == "".join(BEFORE + AFTER)
        check_audio(audio_format, heard, await kept_audio(account, item), calls)


def check_audio(audio_format: str, heard: Heard, kept: bytes, calls: list[dict[str, Any]]) -> None:
    """The stream goes on without a second header, and what is kept is one file of both parts."""
    sent = sum(call["audio_bytes"] for call in calls)
    samples, rate = decode(kept, audio_format, 22050)
    assert len(samples) / rate == pytest.approx(heard.message["duration"], abs=0.05)
    assert loudness(samples[-rate // 2 :]) > 100
    assert loudness(samples[: rate // 2]) > 100
    if audio_format == "pcm":
        assert heard.audio == kept
        assert len(kept) == sent
    elif audio_format == "wav":
        assert heard.audio.count(b"RIFF") == heard.audio.count(b"WAVEfmt ") == kept.count(b"WAVEfmt ") == 1
        assert heard.audio[44:] == kept[44:]
        assert len(kept) == sent - 44
        assert int.from_bytes(kept[40:44], "little") == len(kept) - 44
    else:
        assert heard.audio == kept
        assert sent - 400 < len(kept) <= sent
        assert kept.count(b"OpusHead") == (audio_format == "opus")
    if audio_format == "mp3":
        assert duration(heard.audio, audio_format, 22050) == pytest.approx(heard.message["duration"], abs=0.2)
