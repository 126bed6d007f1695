"""One record in full, and subtitles: what remains of what was said, for people and players."""

import io
import re
from itertools import pairwise
from typing import Any

import av

from tests.conftest import Account, CreateAccount
from tests.hearing import (
    AUDIO_ASR,
    FILETRANS,
    FLASH,
    PARAFORMER,
    PUBLIC_URL,
    STRANGE_SPEECH,
    data_of,
    ended,
    place,
    recognize,
    refusal,
    speak,
    submit,
    tone,
    transcribe,
)
from tests.servers import Sandbox, Server

COMMON = {"id", "type", "model_name", "input_data", "duration", "status", "bill", "created_at", "finished_at", "usage"}
SPEECH = "今天天气真好，我们一起去公园散步吧。The quick brown fox jumps over the lazy dog. 然后回家吃饭！"
SUBRIP_TIME = re.compile(r"\d\d:\d\d:\d\d,\d{3} --> \d\d:\d\d:\d\d,\d{3}")


async def detail(account: Account, record_id: int) -> dict[str, Any]:
    """A record in full."""
    return data_of(await account.client.get(f"/api/audio/records/{record_id}"))


async def subtitle(account: Account, task_id: str, **query: Any) -> str:
    """A subtitle file, whose headers must be fit for a player."""
    answer = await account.client.get(f"/api/audio/asr/task/{task_id}/subtitle", params=query)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "private" in answer.headers["cache-control"]
    assert answer.headers["content-disposition"].endswith(f'.{query.get("format", "srt")}"')
    return answer.text


async def cues(account: Account, task_id: str, **query: Any) -> list[dict[str, Any]]:
    """The subtitles as JSON."""
    answer = await account.client.get(f"/api/audio/asr/task/{task_id}/subtitle", params={"format": "json", **query})
    data: list[dict[str, Any]] = answer.json()["data"]
    assert answer.json()["code"] == 200
    return data


def play(document: str, format: str) -> list[tuple[int, int, str]]:
    """Beginning, end and text of every cue, as FFmpeg reads them."""
    with av.open(io.BytesIO(document.encode()), "r", format=format) as container:
        return [
            (packet.pts or 0, (packet.pts or 0) + (packet.duration or 0), bytes(packet).decode())
            for packet in container.demux(container.streams.subtitles[0])
            if packet.size
        ]


def squeeze(text: str) -> str:
    """A text without blanks."""
    return "".join(text.split())


async def test_a_synthesis_in_full(account: Account) -> None:
    spoken = data_of(await account.synthesize("你好，欢迎使用语音合成服务！"))
    record = await detail(account, spoken["record_id"])
    assert record.keys() == {*COMMON, "output_url"}
    assert record["status"] == "succeeded"
    assert record["output_url"] == spoken["audio_url"]
    usage = record["usage"]
    assert usage.pop("provider_request_id")
    assert usage == {
        "unit": "character",
        "quantity": 26,
        "unit_price": "0.000014335",
        "amount": "0.00037271",
        "currency": "CNY",
        "estimated": False,
    }


async def test_a_recognition_in_full(account: Account, sandbox: Sandbox) -> None:
    heard = data_of(await recognize(account, audio_url=PUBLIC_URL, context="百炼"))
    record = await detail(account, heard["record_id"])
    assert record.keys() == {*COMMON, "output_text", "details"}
    assert record["status"] == "succeeded"
    assert (record["model_name"], record["output_text"], record["bill"]) == (FLASH, STRANGE_SPEECH, "0.0016")
    assert record["details"] == {
        "language": "zh",
        "emotion": "neutral",
        "input_tokens": 2,
        "output_tokens": 11,
        "seconds": 4,
    }
    assert record["usage"] == {
        "unit": "second",
        "quantity": 4,
        "unit_price": "0.0004",
        "amount": "0.0016",
        "currency": "CNY",
        "estimated": False,
        "provider_request_id": sandbox.requests(account.api_key)[0]["request_id"],
    }
    assert record["created_at"] <= record["finished_at"]
    plain = data_of(await recognize(account, audio_url=PUBLIC_URL, model=AUDIO_ASR))
    assert (await detail(account, plain["record_id"]))["details"].keys() == {
        "input_tokens",
        "output_tokens",
        "seconds",
    }


async def test_a_transcription_in_full(account: Account, backend: Server) -> None:
    audio = place(backend, tone(2.5, rate=16000))
    asked: dict[str, dict[str, Any]] = {
        "plain": {"model": FILETRANS},
        "words": {"model": FILETRANS, "enable_words": True},
        "paraformer": {"model": PARAFORMER},
    }
    submitted = {name: data_of(await transcribe(account, audio, **body)) for name, body in asked.items()}
    running = await detail(account, submitted["plain"]["record_id"])
    assert running.keys() == COMMON - {"duration", "finished_at", "usage"} | {"task_id", "task_status"}
    assert (running["status"], running["task_status"], running["bill"]) == ("running", "PENDING", "0")
    for name, task in submitted.items():
        shown = await ended(account, task["task_id"], hurried=backend)
        record = await detail(account, task["record_id"])
        assert record.keys() == {*COMMON, "output_text", "task_id", "task_status", "audio_info", "transcripts"}
        assert (record["task_id"], record["task_status"]) == (task["task_id"], "SUCCEEDED")
        duration = 2.5 if name == "paraformer" else 3  # which tells the exact length, the other only what it bills
        assert (record["output_text"], record["duration"], record["bill"]) == (STRANGE_SPEECH, duration, "0.0012")
        assert record["usage"]["provider_request_id"] == task["task_id"]
        assert record["audio_info"]["sample_rate"] == 16000
        [transcript] = record["transcripts"]
        assert transcript["text"] == STRANGE_SPEECH
        for sentence in transcript["sentences"]:
            assert ("words" in sentence) is (name != "plain")
            words = sentence.pop("words", [])
            assert words == sorted(words, key=lambda word: int(word["begin_time"]))
            spelled = "".join(word["text"] + word["punctuation"] for word in words)
            assert spelled == (sentence["text"] if name != "plain" else "")
        assert record["transcripts"] == shown["result"]["transcripts"]


async def test_records_that_are_not_there_or_not_ours(backend: Server, create_account: CreateAccount) -> None:
    owner, other = await create_account(backend), await create_account(backend)
    record_id = data_of(await recognize(owner, audio_url=PUBLIC_URL))["record_id"]
    for client, wrong in ((other.client, record_id), (owner.client, 2**62)):
        assert refusal(await client.get(f"/api/audio/records/{wrong}")) == (404, "NOT_FOUND")
    for wrong in ("0", "-1", "x", str(2**63), "1.5"):
        assert refusal(await owner.client.get(f"/api/audio/records/{wrong}")) == (400, "INVALID_REQUEST")
    del owner.client.headers["Authorization"]
    assert refusal(await owner.client.get(f"/api/audio/records/{record_id}")) == (401, "UNAUTHORIZED")


async def test_three_minutes_play_as_subtitles(account: Account, backend: Server) -> None:
    text = SPEECH * 12
    url, _ = await speak(account, text, speech_rate=0.5, sample_rate=8000)
    kinds: list[dict[str, Any]] = [{"model": FILETRANS}, {"model": FILETRANS, "enable_words": True}]
    tasks = [await submit(account, url, **body) for body in (*kinds, {"model": PARAFORMER})]
    for task_id in tasks:
        done = await ended(account, task_id, hurried=backend)
        assert 180 <= done["usage"]["seconds"] <= 400
        shown = await cues(account, task_id)
        for cue in shown:
            assert cue.keys() == {"channel_id", "begin_time", "end_time", "lines"}
            assert 1 <= len(cue["lines"]) <= 2
            assert all(len(line) <= 42 for line in cue["lines"])
        times = [(cue["begin_time"], cue["end_time"]) for cue in shown]
        assert all(begin < end <= following for (begin, end), (following, _) in pairwise(times))
        sentences = done["result"]["transcripts"][0]["sentences"]
        assert times[0][0] == sentences[0]["begin_time"]
        assert abs(times[-1][1] - sentences[-1]["end_time"]) <= 1000
        for format, parser in (("srt", "srt"), ("vtt", "webvtt")):
            played = play(await subtitle(account, task_id, format=format), parser)
            assert [(begin, end) for begin, end, _ in played] == times
            assert [cue.split("\n") for _, _, cue in played] == [cue["lines"] for cue in shown]
        assert squeeze("".join(line for cue in shown for line in cue["lines"])) == squeeze(text)
        assert len(SUBRIP_TIME.findall(await subtitle(account, task_id))) == len(shown)
        assert squeeze(await subtitle(account, task_id, format="txt")) == squeeze(text)


async def test_subtitles_of_one_channel_and_of_all(account: Account, backend: Server) -> None:
    task_id = await submit(account, place(backend, tone(2.5, channels="tt")), channel_id=[0, 1])
    await ended(account, task_id, hurried=backend)
    assert {cue["channel_id"] for cue in await cues(account, task_id)} == {0, 1}
    assert {cue["channel_id"] for cue in await cues(account, task_id, channel_id=1)} == {1}
    assert (await subtitle(account, task_id, format="txt", channel_id=0)).strip() == STRANGE_SPEECH
    assert len(play(await subtitle(account, task_id), "srt")) == 2 * len(
        play(await subtitle(account, task_id, channel_id=1), "srt")
    )
    for wrong in ({"channel_id": 2}, {"channel_id": -1}, {"channel_id": "x"}, {"format": "ass"}):
        answer = await account.client.get(f"/api/audio/asr/task/{task_id}/subtitle", params=wrong)
        assert refusal(answer) == (400, "INVALID_REQUEST")
        assert next(iter(wrong)) in answer.json()["message"]


async def test_no_subtitles_without_a_transcript(backend: Server, create_account: CreateAccount) -> None:
    owner, other = await create_account(backend), await create_account(backend)
    running, failing = await submit(owner), await submit(owner, "https://media.example.com/missing.mp3")
    path = f"/api/audio/asr/task/{running}/subtitle"
    for format in ("srt", "vtt", "txt", "json"):
        assert refusal(await owner.client.get(path, params={"format": format})) == (409, "NO_TRANSCRIPT")
    await ended(owner, failing, hurried=backend)
    answer = await owner.client.get(f"/api/audio/asr/task/{failing}/subtitle")
    assert refusal(answer) == (409, "NO_TRANSCRIPT")
    assert "FILE_404_NOT_FOUND" in answer.json()["message"]
    await ended(owner, running, hurried=backend)
    assert STRANGE_SPEECH in await subtitle(owner, running, format="txt")
    assert refusal(await other.client.get(path)) == (404, "TASK_NOT_FOUND")
