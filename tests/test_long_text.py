"""Long text to speech, spec 1.3: the answer, what the provider gets, the one file, and what is refused."""

import asyncio
import io
import re
import shutil
import subprocess
import wave
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import pytest

from tests.conftest import Account, CreateAccount
from tests.hearing import data_of, refusal
from tests.narrating import (
    PATH,
    SAMPLE_BYTES,
    SEGMENT_CHARACTERS,
    ask,
    at_once,
    at_rest,
    audio_of,
    counted,
    ended,
    finished,
    in_order,
    narrate,
    only_record,
    padded,
    prose,
    record_of,
    seconds_of,
    told,
    under_way,
)
from tests.servers import Sandbox, Server, run_backend, run_sandbox
from tests.sound import decode, duration, loudness

FORMATS = {"mp3": "audio/mpeg", "wav": "audio/wav", "pcm": "audio/pcm", "opus": "audio/ogg"}
ANSWER = {"audio_url", "duration", "format", "total_characters", "segments", "bill", "record_id"}
DIFFERENCE_SECONDS = 0.05
SPEED = 8.0
PER_SECOND = 8
MAX_CHARS = 30_000
MEMORY_KB = 60 * 1024
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"model": "cosyvoice-v9"}, "INVALID_MODEL", "cosyvoice-v9"),
    ({"model": None}, "INVALID_REQUEST", "model"),
    ({"voice": "nobody"}, "INVALID_VOICE", "音色"),
    ({"voice": "longxiaochun_v2"}, "MODEL_VOICE_MISMATCH", "cosyvoice-v2"),
    ({"voice": "cosyvoice-v3-plus-mine-0123abcd"}, "MODEL_VOICE_MISMATCH", "target_model"),
    ({"text": ""}, "INVALID_REQUEST", "text"),
    ({"text": " \n" * 3000}, "INVALID_REQUEST", "text"),
    ({"text": "a\x00b"}, "INVALID_REQUEST", "text"),
    ({"text": ["你好"]}, "INVALID_REQUEST", "text"),
    ({"format": "flac"}, "INVALID_REQUEST", "format"),
    ({"sample_rate": 11025}, "INVALID_REQUEST", "sample_rate"),
    ({"volume": 101}, "INVALID_REQUEST", "volume"),
    ({"speech_rate": 2.01}, "INVALID_REQUEST", "speech_rate"),
    ({"pitch_rate": "fast"}, "INVALID_REQUEST", "pitch_rate"),
    ({"subtitle": "ass"}, "INVALID_REQUEST", "subtitle"),
    ({"subtitle": True}, "INVALID_REQUEST", "subtitle"),
    ({"async": "yes"}, "INVALID_REQUEST", "async"),
    ({"async": 1}, "INVALID_REQUEST", "async"),
    ({"instruction": "好" * 51}, "INVALID_REQUEST", "instruction"),
    ({"voice": "longyingjing_v3", "instruction": "你说话的情感是happy。"}, "INVALID_REQUEST", "instruction"),
]
PARSERS = {"srt": "srt", "vtt": "webvtt"}


@pytest.fixture(scope="module")
def paced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A provider that takes a while, as long for each segment."""
    with run_sandbox(tmp_path_factory.mktemp("paced"), "--speed", str(SPEED)) as running:
        yield running


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory, paced: Sandbox) -> Iterator[Server]:
    """Three segments at once."""
    settings = {**paced.settings, "LONG_TEXT_PARALLELISM": "3"}
    with run_backend(tmp_path_factory.mktemp("parallel"), settings) as running:
        yield running


@pytest.fixture(scope="module")
def frugal(tmp_path_factory: pytest.TempPathFactory, sandbox: Sandbox) -> Iterator[Server]:
    """One segment at a time, and no long novels."""
    settings = {**sandbox.settings, "LONG_TEXT_PARALLELISM": "1", "LONG_TEXT_MAX_CHARS": str(MAX_CHARS)}
    with run_backend(tmp_path_factory.mktemp("frugal"), settings) as running:
        yield running


# ---- The answer


async def test_the_answer_is_what_the_spec_says(account: Account, sandbox: Sandbox) -> None:
    text = padded(2)
    body = {
        "model": "cosyvoice-v3-flash",
        "voice": "longanyang",
        "text": text,
        "format": "mp3",
        "volume": 50,
        "speech_rate": 1.0,
    }
    answer = await account.client.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["code"], answer.json()["message"]) == (200, "success")
    data = answer.json()["data"]
    assert {name: type(value) for name, value in data.items()} == {
        "audio_url": str,
        "duration": float,
        "format": str,
        "total_characters": int,
        "segments": int,
        "bill": str,
        "record_id": int,
    }
    assert data["format"] == "mp3"
    assert re.search(r"/audio/tts/\d{8}/[0-9a-f-]{36}\.mp3$", data["audio_url"])
    calls = sandbox.calls(account.api_key)
    assert data["segments"] == len(calls) >= 2
    assert data["total_characters"] == told(calls) == counted(text)
    assert Decimal(data["bill"]) == (Decimal("0.000014335") * told(calls)).quantize(Decimal("0.0001"))
    assert {call["parameters"]["sample_rate"] for call in calls} == {22050}
    [item] = (await account.history())["items"]
    assert item["id"] == data["record_id"]
    assert (item["output_url"], item["bill"], item["type"]) == (data["audio_url"], data["bill"], "tts")
    assert item["duration"] == data["duration"]
    assert "status" not in item


async def test_the_record_says_the_same_in_full(account: Account, sandbox: Sandbox) -> None:
    text = padded(2)
    data = await narrate(account, text, subtitle="vtt")
    record = await record_of(account, data["record_id"])
    total = told(sandbox.calls(account.api_key))
    assert record["progress"] == {
        "segments_done": data["segments"],
        "segments_total": data["segments"],
        "characters": total,
        "bill": data["bill"],
    }
    assert record["subtitle_url"] == data["subtitle_url"]
    assert (record["usage"]["quantity"], record["usage"]["estimated"]) == (total, False)
    assert Decimal(record["usage"]["amount"]) == Decimal("0.000014335") * total
    assert record["status"] == "succeeded"


async def test_the_provider_gets_exactly_the_text_in_order(account: Account, sandbox: Sandbox) -> None:
    text = prose(25)
    data = await narrate(account, text, sample_rate=8000)
    calls = in_order(sandbox.calls(account.api_key), text)
    assert "".join(call["text"] for call in calls) == text
    assert data["segments"] == len(calls) > 1
    assert all(counted(call["text"]) <= SEGMENT_CHARACTERS for call in calls)
    assert data["total_characters"] == told(calls) == counted(text)
    for before, after in pairwise(calls):
        assert before["text"].rstrip()[-1] in "。！？…!?.”", before["text"][-20:]
        assert not after["text"][0].isspace()


async def test_every_field_reaches_the_provider_for_every_segment(account: Account, sandbox: Sandbox) -> None:
    await narrate(
        account,
        padded(2),
        format="opus",
        sample_rate=16000,
        volume=80,
        speech_rate=1.5,
        pitch_rate=0.8,
        instruction="你说话的情感是happy。",
    )
    calls = sandbox.calls(account.api_key)
    assert len(calls) > 1
    for call in calls:
        sent = call["parameters"]
        assert (sent["format"], sent["sample_rate"], sent["volume"]) == ("pcm", 16000, 80)
        assert (sent["rate"], sent["pitch"], sent["instruction"]) == (1.5, 0.8, "你说话的情感是happy。")
        assert sent["enable_ssml"] is False


async def test_a_short_text_is_one_segment(account: Account, sandbox: Sandbox) -> None:
    data = await narrate(account, "你好，世界！", format="wav")
    assert data.keys() == ANSWER
    assert (data["segments"], data["total_characters"]) == (1, 10)
    [call] = sandbox.calls(account.api_key)
    assert call["text"] == "你好，世界！"


# ---- One file


@pytest.mark.parametrize("sample_rate", [8000, 24000])
@pytest.mark.parametrize("audio_format", FORMATS)
async def test_every_format_is_one_clean_file(
    account: Account, sandbox: Sandbox, tmp_path: Path, audio_format: str, sample_rate: int
) -> None:
    data = await narrate(account, padded(3), format=audio_format, sample_rate=sample_rate)
    answer = await account.client.get(data["audio_url"])
    assert answer.headers["content-type"] == FORMATS[audio_format]
    calls = sandbox.calls(account.api_key)
    assert len(calls) == data["segments"] > 1
    with av.logging.Capture() as complaints:
        av.logging.set_level(av.logging.WARNING)
        try:
            samples, rate = decode(answer.content, audio_format, sample_rate)
        finally:
            av.logging.set_level(None)
    assert complaints == []
    expected = seconds_of(calls)
    assert abs(len(samples) / rate - expected) <= DIFFERENCE_SECONDS
    assert abs(data["duration"] - expected) <= DIFFERENCE_SECONDS
    assert loudness(samples) > 100
    third = len(samples) // 3
    assert all(loudness(samples[begin : begin + third]) > 100 for begin in (0, third, 2 * third))
    assert_one_header(answer.content, audio_format)
    if audio_format in {"pcm", "wav"}:
        assert len(samples) * SAMPLE_BYTES == sum(call["audio_bytes"] for call in calls)
    file = tmp_path / f"whole.{audio_format}"
    file.write_bytes(answer.content)
    await assert_ffmpeg_is_content(file)


def assert_one_header(audio: bytes, audio_format: str) -> None:
    """Check that a file begins once only."""
    match audio_format:
        case "wav":
            assert audio.count(b"RIFF") == audio.count(b"WAVEfmt ") == 1
            with wave.open(io.BytesIO(audio)) as reader:
                assert reader.getnframes() * SAMPLE_BYTES == len(audio) - 44
        case "mp3":
            assert audio.count(b"Info") + audio.count(b"Xing") == 1
            assert not re.search(rb"ID3[\x02-\x04]\0", audio)  # three letters alone come about by chance
        case "opus":
            assert audio.count(b"OpusHead") == audio.count(b"OpusTags") == 1
        case "pcm":
            assert b"RIFF" not in audio


async def assert_ffmpeg_is_content(file: Path) -> None:
    """Check that FFmpeg, where there is one, decodes a file without a warning; raw samples are no file to it."""
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None or file.suffix == ".pcm":
        return
    guess_nothing = ["-guess_layout_max", "0"] if file.suffix == ".wav" else []
    command = [ffmpeg, "-nostdin", "-v", "warning", *guess_nothing, "-i", str(file), "-f", "null", "-"]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=True, timeout=20)
    assert done.stderr == b""


# ---- Subtitles


def play(document: str, parser: str) -> list[tuple[int, int, str]]:
    """Beginning, end and text of every cue, as FFmpeg reads them."""
    with av.open(io.BytesIO(document.encode()), "r", format=parser) as container:
        return [
            (packet.pts or 0, (packet.pts or 0) + (packet.duration or 0), bytes(packet).decode())
            for packet in container.demux(container.streams.subtitles[0])
            if packet.size
        ]


def squeeze(text: str) -> str:
    """A text without blanks."""
    return "".join(text.split())


# A cloned voice tells its words, a system voice without the mark only its sentences.
@pytest.mark.parametrize(
    ("kind", "voice"), [("srt", "longanyang"), ("vtt", "longyingjing_v3"), ("srt", "cloned"), ("vtt", "cloned")]
)
async def test_subtitles_go_with_the_audio(account: Account, sandbox: Sandbox, kind: str, voice: str) -> None:
    if voice == "cloned":
        [voice] = sandbox.add_voices(account.api_key)
    text = padded(2) + prose(2)
    data = await narrate(account, text, subtitle=kind, voice=voice)
    assert data.keys() == ANSWER | {"subtitle_url"}
    assert data["subtitle_url"].endswith(f".{kind}")
    document = (await audio_of(account, data["subtitle_url"])).decode()
    cues = play(document, PARSERS[kind])
    assert all(0 <= begin < end for begin, end, _ in cues)
    assert all(before[1] <= after[0] for before, after in pairwise(cues))
    assert cues[-1][1] <= data["duration"] * 1000 + 1
    assert cues[-1][1] >= data["duration"] * 900
    assert squeeze("".join(cue for _, _, cue in cues)) == squeeze(text)
    assert len(cues) > 2 * 17


# ---- SSML


async def test_ssml_is_split_between_its_elements(account: Account, sandbox: Sandbox) -> None:
    sentences = [f'{chr(0x4E00 + number)}好。{"!" * 110}<break time="100ms"/>' for number in range(40)]
    inner = "".join(sentences)
    data = await narrate(account, f'<speak rate="1.5">{inner}</speak>', sample_rate=8000)
    calls = sandbox.calls(account.api_key)
    assert data["segments"] == len(calls) > 1
    assert all(call["parameters"]["enable_ssml"] for call in calls)
    begin, end = '<speak rate="1.5">', "</speak>"
    assert all(call["text"].startswith(begin) and call["text"].endswith(end) for call in calls)
    parts = sorted((call["text"][len(begin) : -len(end)] for call in calls), key=inner.index)
    assert "".join(parts) == inner
    assert data["total_characters"] == told(calls) == counted(re.sub("<[^>]*>", "", inner))
    assert abs(data["duration"] - seconds_of(calls)) <= DIFFERENCE_SECONDS


async def test_ssml_that_cannot_be_split_is_refused(account: Account, sandbox: Sandbox) -> None:
    for text in (
        "<speak>你好",
        "<speak>你好<b</speak>",
        "<speak><p>你好</speak>",
        f"<speak><p>{'好。' * 1500}</p></speak>",
        f"<speak>{'<s>好' * 2000}{'</s>' * 2000}</speak>",
    ):
        answer = await ask(account, text)
        assert refusal(answer) == (400, "INVALID_REQUEST"), text[:30]
    await nothing_was_done(account, sandbox)


# ---- Several at once


async def test_as_many_as_set_are_spoken_at_once_and_no_time_is_wasted(
    parallel: Server, paced: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(parallel)
    text = padded(6)
    data = await narrate(account, text)
    calls = paced.calls(account.api_key)
    assert data["segments"] == len(calls) >= 6
    assert at_once(calls) == 3
    took = max(call["ended_at"] for call in calls) - min(call["submitted_at"] for call in calls)
    ideal = sum(call["ended_at"] - call["submitted_at"] for call in calls) / 3
    assert took <= 1.2 * ideal, f"{took:.2f} s, ideal {ideal:.2f} s"


async def test_one_at_a_time_means_in_order_and_never_two(
    frugal: Server, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(frugal)
    text = padded(6)
    data = await narrate(account, text, sample_rate=8000)
    calls = sandbox.calls(account.api_key)
    assert data["segments"] == len(calls) >= 6
    assert at_once(calls) == 1
    assert "".join(call["text"] for call in calls) == text


async def test_the_providers_rate_is_kept_with_several_at_once(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    settings = {**sandbox.settings, "UPSTREAM_RATE": f"{PER_SECOND}/second", "LONG_TEXT_PARALLELISM": "4"}
    with run_backend(tmp_path, settings) as backend:
        account = await create_account(backend)
        text = padded(PER_SECOND + 4)
        data = await narrate(account, text, sample_rate=8000)
    submitted = [call["submitted_at"] for call in sandbox.calls(account.api_key)]
    assert data["segments"] == len(submitted) > PER_SECOND
    assert data["total_characters"] == counted(text)
    spans = [late - early for early, late in zip(submitted, submitted[PER_SECOND:], strict=False)]
    assert min(spans) >= 0.9, "too many in a second"
    assert max(spans) <= 2.0, "the rate that is allowed is not used"


# ---- What is refused


async def nothing_was_done(account: Account, sandbox: Sandbox) -> None:
    """Check that the provider was not asked and no record was made."""
    assert sandbox.calls(account.api_key) == []
    assert (await account.history())["total"] == 0


async def test_what_is_wrong_is_refused_before_the_provider_is_asked(account: Account, sandbox: Sandbox) -> None:
    for fields, error, part in REFUSED:
        answer = await ask(account, **{"text": padded(2), **fields})
        assert refusal(answer) == (400, error), (fields, answer.text)
        assert part in answer.json()["message"]
    await nothing_was_done(account, sandbox)


async def test_a_text_that_is_too_long_is_refused_by_the_setting(
    frugal: Server, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(frugal)
    answer = await ask(account, "a" * (MAX_CHARS + 1))
    assert refusal(answer) == (400, "TEXT_TOO_LONG")
    assert str(MAX_CHARS) in answer.json()["message"]
    await nothing_was_done(account, sandbox)


async def test_a_clone_that_is_not_ready_is_refused(account: Account, sandbox: Sandbox) -> None:
    voices = [sandbox.add_voices(account.api_key, status=status)[0] for status in ("DEPLOYING", "UNDEPLOYED")]
    data_of(
        await account.client.get("/api/audio/voice/list")
    )  # of voices that nothing is known of, the provider decides
    for voice in voices:
        assert refusal(await ask(account, padded(2), voice=voice)) == (400, "INVALID_VOICE")
    await nothing_was_done(account, sandbox)


async def test_a_voice_that_only_the_provider_knows_to_be_none_costs_nothing(account: Account) -> None:
    answer = await ask(account, padded(2), voice="cosyvoice-v3-flash-mine-0123abcd")
    assert refusal(answer) == (400, "INVALID_VOICE")
    record = await ended(account, await only_record(account))
    assert (record["status"], record["bill"]) == ("failed", "0")


async def test_without_a_key_nothing_happens(backend: Server, sandbox: Sandbox, create_account: CreateAccount) -> None:
    account = await create_account(backend, api_key=None)
    assert refusal(await ask(account, padded(2))) == (403, "NO_API_KEY")
    assert refusal(await ask(account, padded(2), **{"async": True})) == (403, "NO_API_KEY")
    assert (await account.history())["total"] == 0


async def test_without_a_login_nothing_happens(account: Account, sandbox: Sandbox) -> None:
    header = account.client.headers.pop("Authorization")
    assert refusal(await ask(account, padded(2))) == (401, "UNAUTHORIZED")
    account.client.headers["Authorization"] = header
    await nothing_was_done(account, sandbox)


async def test_a_voice_of_another_region_is_refused(account: Account, sandbox: Sandbox) -> None:
    key = {"api_key": account.api_key, "region": "singapore"}
    assert (await account.client.put("/api/user/apikey", json=key)).status_code == 200
    assert refusal(await ask(account, padded(2), voice="longyingjing_v3")) == (400, "INVALID_VOICE")
    await nothing_was_done(account, sandbox)


async def test_a_body_is_read_up_to_the_longest_text_and_no_further(account: Account, sandbox: Sandbox) -> None:
    headers = {"Content-Type": "application/json"}
    longest = b'{"model": "m", "voice": "v", "text": "' + rb"\u0020" * 500_000 + b'"}'
    assert len(longest) > 3_000_000
    read = await account.client.post(PATH, content=longest, headers=headers)
    assert read.status_code == 400, read.text
    huge = b'{"text": "' + b"a" * (8 * 1024 * 1024) + b'"}'
    assert refusal(await account.client.post(PATH, content=huge, headers=headers))[0] == 413
    await nothing_was_done(account, sandbox)


# ---- A provider that stumbles


async def test_a_provider_that_throttles_once_is_asked_again(account: Account, sandbox: Sandbox) -> None:
    text = padded(2)
    with sandbox.faults(throttle_tasks=1):
        data = await narrate(account, text)
    assert data["total_characters"] == told(sandbox.calls(account.api_key)) == counted(text)


@pytest.mark.parametrize("how", ["fail", "close"])
async def test_a_segment_that_breaks_is_bought_again_and_both_tries_are_billed(
    account: Account, sandbox: Sandbox, how: str
) -> None:
    text = padded(3)
    with sandbox.faults(break_tasks=1, break_after_frames=6, break_how=how):
        data = await narrate(account, text)
    calls = sandbox.calls(account.api_key)
    assert Counter(call["outcome"] for call in calls) == {"finished": data["segments"], "failed": 1}
    [broken] = [call for call in calls if call["outcome"] == "failed"]
    assert broken["characters"] > 0
    # What was counted of the sentence in which it broke, the provider alone knows.
    assert told(calls) - 115 <= data["total_characters"] <= told(calls)
    assert data["total_characters"] > counted(text)
    assert (await record_of(account, data["record_id"]))["usage"]["quantity"] == data["total_characters"]
    audio = await audio_of(account, data["audio_url"])
    assert len(audio) == sum(call["audio_bytes"] for call in finished(calls))
    assert "".join(call["text"] for call in in_order(finished(calls), text)) == text


async def test_a_provider_that_always_breaks_fails_with_its_bill_and_keeps_the_beginning(
    parallel: Server, paced: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(parallel)
    text = padded(6)
    asking = asyncio.create_task(ask(account, text))
    record_id = await only_record(account)
    await under_way(paced, account, 3)
    with paced.faults(break_tasks=-1, break_after_frames=3):
        answer = await asking
    assert refusal(answer) == (502, "UPSTREAM_ERROR")
    calls = await at_rest(paced, account)
    spoken = finished(calls)
    assert len(spoken) == 3
    tries = Counter(call["text"] for call in calls if call["outcome"] == "failed")
    assert max(tries.values()) == 3
    [item] = (await account.history())["items"]
    assert (item["id"], item["status"]) == (record_id, "failed")
    record = await record_of(account, record_id)
    failed = len(calls) - len(spoken)
    assert told(calls) - 115 * failed <= record["usage"]["quantity"] <= told(calls)
    assert record["usage"]["estimated"] is False
    assert (record["progress"]["segments_done"], record["progress"]["segments_total"] > 3) == (3, True)
    assert record["progress"]["characters"] == record["usage"]["quantity"]
    audio = await audio_of(account, record["output_url"])
    assert len(audio) >= sum(call["audio_bytes"] for call in spoken)
    assert abs(duration(audio, "pcm", 22050) - record["duration"]) <= DIFFERENCE_SECONDS


async def test_a_provider_that_breaks_before_any_audio_fails_without_audio(account: Account, sandbox: Sandbox) -> None:
    with sandbox.faults(break_tasks=-1, break_after_frames=0):
        answer = await ask(account, "今天天气真好。")
    assert refusal(answer) == (502, "UPSTREAM_ERROR")
    calls = sandbox.calls(account.api_key)
    assert len(calls) == 3
    [item] = (await account.history())["items"]
    assert (item["status"], item["bill"]) == ("failed", "0")
    assert "output_url" not in item


async def test_a_key_that_the_provider_refuses_is_told(account: Account, sandbox: Sandbox) -> None:
    key = {"api_key": "sk-bad-0123456789abcdef"}
    await account.client.put("/api/user/apikey", params={"verify": False}, json=key)
    answer = await ask(account, padded(2))
    assert refusal(answer) == (401, "UNAUTHORIZED")
    record = await ended(account, await only_record(account))
    assert (record["status"], record["bill"]) == ("failed", "0")
    assert "output_url" not in record


# ---- Hostile texts


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"{chr(0x4E00 + number)}{chr(0x5E00 + number)}" for number in range(500)),
        "😀👩‍👩‍👧‍👦🇨🇳你好" * 200,
        "好" * 1501,
        "a" * 4001,
        "𠮷" * 1100,
        "\r\n\t 你好。" * 250,
        "e\u0301" * 1500,
        "<你>&amp;" * 400,
    ],
    ids=["lines", "emoji", "one-han", "one-letter", "rare-han", "blanks", "accents", "angles"],
)
async def test_hostile_texts_are_spoken_as_they_are(account: Account, sandbox: Sandbox, text: str) -> None:
    data = await narrate(account, text, sample_rate=8000, speech_rate=2.0)
    calls = sandbox.calls(account.api_key)
    assert data["segments"] == len(calls) > 1
    assert Counter("".join(call["text"] for call in calls)) == Counter(text)
    assert all(call["text"] in text for call in calls)
    assert max(call["characters"] for call in calls) <= SEGMENT_CHARACTERS
    assert data["total_characters"] == told(calls)
    assert abs(data["duration"] - seconds_of(calls)) <= DIFFERENCE_SECONDS


async def test_a_hundred_thousand_times_the_same_letter(account: Account, sandbox: Sandbox) -> None:
    data = await narrate(account, "a" * 100_000, sample_rate=8000, speech_rate=2)
    calls = sandbox.calls(account.api_key)
    assert data["total_characters"] == told(calls) == 100_000
    assert "".join(call["text"] for call in calls) == "a" * 100_000
    assert max(len(call["text"]) for call in calls) <= SEGMENT_CHARACTERS
    assert data["segments"] == len(calls) >= 50
    assert abs(data["duration"] - seconds_of(calls)) <= DIFFERENCE_SECONDS


async def test_long_stretches_of_nothing_between_words(account: Account, sandbox: Sandbox) -> None:
    texts = [f"你好。{filler * 3000}我们走吧。" for filler in ("\n", "。", " ")]
    answers = await asyncio.gather(*(ask(account, text, sample_rate=8000) for text in texts))
    assert [answer.status_code for answer in answers] == [200, 200, 200], [answer.text for answer in answers]
    for data in map(data_of, answers):
        assert data["segments"] > 1
        assert data["duration"] > 1
    total = sum(data_of(answer)["total_characters"] for answer in answers)
    assert total == told(sandbox.calls(account.api_key))


@pytest.mark.parametrize("repeats", [3, 3000])
async def test_signs_without_words_are_spoken_or_refused(account: Account, repeats: int) -> None:
    for sign in ("😀", "<", "。"):
        answer = await ask(account, sign * repeats, sample_rate=8000)
        if answer.status_code == 200:
            assert data_of(answer).keys() == ANSWER, f"a success without audio: {sign}"
            assert data_of(answer)["duration"] > 0


# ---- Memory


def memory_kb(server: Server, name: str) -> int:
    """A line of the process' status: `VmRSS` is now, `VmHWM` the peak since it was last reset."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1])


def forget_peak(server: Server) -> None:
    """Measure from now on: else the peak is that of the passwords' hashes."""
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")


async def test_memory_does_not_grow_with_the_text(account: Account, backend: Server) -> None:
    await narrate(account, "你好。")
    forget_peak(backend)
    idle = memory_kb(backend, "VmRSS")
    data = await narrate(account, "word " * 6000, format="wav", sample_rate=24000)
    assert data["total_characters"] == 30_000
    assert data["duration"] * 24000 * SAMPLE_BYTES > MEMORY_KB * 1024, "it would fit into the memory allowed"
    assert memory_kb(backend, "VmHWM") - idle < MEMORY_KB
