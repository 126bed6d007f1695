"""Voice samples as users send them: the provider's rules at their borders, and files that are out to do harm."""

import asyncio
import io
import json
import os
import random
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import av
import pytest
import uvloop
from av.audio.stream import AudioStream
from av.stream import Disposition
from av.video.stream import VideoStream

from app import samples
from app.errors import AudioTooLarge, InvalidAudio
from app.recordings import PADDING_MS
from app.samples import Sample, examine_sample
from tests.servers import PROJECT
from tests.test_computation import LONGEST_GAP_SECONDS, ticking
from tests.test_recordings import MIB, chunk, encode, form, riff, syncsafe, tag

SECONDS = 5.5
AAC = ("aac", "ipod", 16000)
ALAC = ("alac", "ipod", 16000)
MP3 = ("libmp3lame", "mp3", 16000)
WAV = ("pcm_s16le", "wav", 16000)
# A quarter of a second of a tone, so that what is made by hand is not silent.
TONE = encode(*WAV, seconds=0.25)[-8000:]


async def examine(content: bytes) -> Sample:
    return await examine_sample(io.BytesIO(content))


def judge(content: bytes) -> Sample:
    """The same without a thread or a process, for what these tests made themselves: it is faster."""
    source = io.BytesIO(content)
    samples._needs_confinement(source)
    return samples._examine(source)


def refusal(content: bytes) -> str:
    with pytest.raises(InvalidAudio) as refused:
        judge(content)
    return refused.value.message


async def told(content: bytes) -> str:
    with pytest.raises(InvalidAudio) as refused:
        await examine(content)
    return refused.value.message


def pcm(seconds: float, *, rate: int = 16000, channels: int = 1) -> bytes:
    """A WAV file of 16 bits."""
    size = 2 * channels * round(rate * seconds)
    return riff(
        form(rate=rate, channels=channels, align=2 * channels), chunk(b"data", (TONE * (size // 8000 + 1))[:size])
    )


# ---- Boxes of MP4


def boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of each box."""
    at = 0
    while at < len(content):
        size, name = struct.unpack_from(">I4s", content, at)
        yield name, content[at + 8 : at + size]
        at += size


def box(name: bytes, content: bytes, *, size: int | None = None) -> bytes:
    return struct.pack(">I4s", len(content) + 8 if size is None else size, name) + content


def changed(content: bytes, path: str, change: Callable[[bytes], bytes]) -> bytes:
    """The file with another content in the first box that has this path; the boxes around it fit again."""
    first, _, rest = path.partition("/")
    parts, done = [], False
    for name, inside in boxes(content):
        if name.decode() == first and not done:
            done = True
            inside = changed(inside, rest, change) if rest else change(inside)
        parts.append(box(name, inside))
    assert done, f"there is no {first}"
    return b"".join(parts)


STBL = "moov/trak/mdia/minf/stbl"


@lru_cache
def m4a() -> bytes:
    return encode(*AAC, seconds=SECONDS)


def in_front(content: bytes) -> bytes:
    """The same with the tables before the sound, as for streaming."""
    parts = dict(boxes(content))
    shift = len(parts[b"moov"]) + 8

    def shifted(table: bytes) -> bytes:
        head, offsets = table[:8], [offset for (offset,) in struct.iter_unpack(">I", table[8:])]
        return head + b"".join(struct.pack(">I", offset + shift) for offset in offsets)

    moov = dict(boxes(changed(content, f"{STBL}/stco", shifted)))[b"moov"]
    return b"".join(
        box(name, moov if name == b"moov" else parts[name]) for name in (b"ftyp", b"moov", b"free", b"mdat")
    )


@lru_cache
def fragmented() -> bytes:
    options = "movflags=+empty_moov+default_base_moof,frag_duration=1000000"
    return encode("aac", "mp4", 16000, seconds=SECONDS, options=options)


@lru_cache
def covered() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        audio, cover = container.add_stream("aac", rate=16000), container.add_stream("mjpeg", rate=1)
        assert isinstance(audio, AudioStream)
        assert isinstance(cover, VideoStream)
        audio.layout = "mono"
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        picture = av.VideoFrame(64, 48, "yuvj420p")
        picture.pts, picture.time_base = 0, Fraction(1, 1)
        container.mux(cover.encode(picture))
        container.mux(cover.encode(None))
        frame = av.AudioFrame(format="s16", layout="mono", samples=round(16000 * SECONDS))
        frame.planes[0].update((TONE * 22).ljust(frame.planes[0].buffer_size, b"\0"))
        frame.sample_rate, frame.time_base, frame.pts = 16000, Fraction(1, 16000), 0
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    return buffer.getvalue()


# ---- What is taken


class Taken(NamedTuple):
    """A file that is fit, and what it is."""

    content: Callable[[], bytes]
    container: str
    content_type: str
    sample_rate: int = 16000
    channels: int = 1


def made(codec: str, format: str, rate: int, layout: str = "mono", options: str = "") -> Callable[[], bytes]:
    return lambda: encode(codec, format, rate, layout=layout, options=options, seconds=SECONDS)


def extensible() -> bytes:
    guid = struct.pack("<HHIH", 22, 16, 4, 1) + bytes.fromhex("000000001000800000aa00389b71")
    described = struct.pack("<HHIIHH", 0xFFFE, 1, 16000, 32000, 2, 16) + guid
    return riff(chunk(b"fmt ", described), chunk(b"data", TONE * 22))


def high_efficiency() -> bytes:
    """AAC that announces a doubled sample rate, as HE-AAC does."""
    return encode(*AAC, layout="stereo", seconds=SECONDS).replace(b"\x56\xe5\x00", b"\x56\xe5\xa8", 1)


TAKEN = {
    "wav": Taken(lambda: pcm(SECONDS), "wav", "audio/wav"),
    "wav stereo": Taken(lambda: pcm(SECONDS, rate=48000, channels=2), "wav", "audio/wav", 48000, 2),
    "wav extensible": Taken(extensible, "wav", "audio/wav"),
    "wav streamed": Taken(
        lambda: riff(form(), chunk(b"data", TONE * 22, size=0xFFFFFFFF), size=0xFFFFFFFF), "wav", "audio/wav"
    ),
    "mp3": Taken(made(*MP3), "mp3", "audio/mpeg"),
    "mp3 stereo": Taken(made("libmp3lame", "mp3", 44100, "stereo"), "mp3", "audio/mpeg", 44100, 2),
    "mp3 22050": Taken(made("libmp3lame", "mp3", 22050), "mp3", "audio/mpeg", 22050),
    "mp3 48000": Taken(made("libmp3lame", "mp3", 48000), "mp3", "audio/mpeg", 48000),
    "mp3 without Xing": Taken(made(*MP3, options="write_xing=0"), "mp3", "audio/mpeg"),
    "mp3 with tag": Taken(lambda: tag(b"TIT2" + syncsafe(2) + b"\0\0\0a") + made(*MP3)(), "mp3", "audio/mpeg"),
    "m4a": Taken(m4a, "m4a", "audio/mp4"),
    "m4a stereo": Taken(made("aac", "ipod", 44100, "stereo"), "m4a", "audio/mp4", 44100, 2),
    "m4a 48000": Taken(made("aac", "mp4", 48000), "m4a", "audio/mp4", 48000),
    "m4a 3gp": Taken(made("aac", "3gp", 16000), "m4a", "audio/mp4"),
    "m4a in front": Taken(lambda: in_front(m4a()), "m4a", "audio/mp4"),
    "m4a HE-AAC": Taken(high_efficiency, "m4a", "audio/mp4", 32000, 2),
    "m4a lossless": Taken(made("alac", "ipod", 48000, "stereo"), "m4a", "audio/mp4", 48000, 2),
    "m4a with cover": Taken(covered, "m4a", "audio/mp4"),
    "m4a in fragments": Taken(fragmented, "m4a", "audio/mp4"),
}


@pytest.mark.parametrize("name", TAKEN)
async def test_what_the_provider_takes_is_taken_and_measured(name: str) -> None:
    taken = TAKEN[name]

    sample = await examine(taken.content())

    assert sample.duration_ms == pytest.approx(SECONDS * 1000, abs=PADDING_MS)
    assert sample == Sample(taken.container, taken.content_type, sample.duration_ms, taken.sample_rate, taken.channels)


async def test_names_and_positions_do_not_matter_and_the_file_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "voice.mp3"
    path.write_bytes(m4a())
    with path.open("rb") as source:
        source.seek(100)

        assert (await examine_sample(source)).container == "m4a"

        source.seek(0)
        assert source.read() == m4a()


def test_headers_that_lie_about_the_duration_are_not_believed() -> None:
    def an_hour(header: bytes) -> bytes:
        return header[:16] + struct.pack(">I", 3600 * 1000) + header[20:]

    lying = changed(m4a(), "moov/mvhd", an_hour)

    assert judge(lying).duration_ms < 5600


# ---- What is refused


@pytest.mark.parametrize("seconds", [5.0, 60.0])
@pytest.mark.parametrize("kind", [WAV, MP3, ALAC], ids=["wav", "mp3", "m4a"])
def test_from_5_to_60_seconds_are_taken(kind: tuple[str, str, int], seconds: float) -> None:
    sample = judge(encode(*kind, seconds=seconds))

    assert sample.duration_ms == pytest.approx(seconds * 1000, abs=PADDING_MS)


@pytest.mark.parametrize("kind", [WAV, MP3, ALAC], ids=["wav", "mp3", "m4a"])
def test_shorter_and_longer_is_refused_with_both_lengths(kind: tuple[str, str, int]) -> None:
    assert "4.8 秒，声音复刻要求不少于 5 秒" in refusal(encode(*kind, seconds=4.75))
    longer = refusal(encode(*kind, seconds=61))
    assert longer.startswith("音频时长至少 6")
    assert "超过 60 秒的限制" in longer


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (lambda: pcm(6, rate=15999), "15999 Hz，声音复刻要求不低于 16000 Hz"),
        (made("libmp3lame", "mp3", 8000), "8000 Hz"),
        (made("aac", "ipod", 12000), "12000 Hz"),
        (lambda: pcm(6, channels=6), "6 个声道"),
        (made("aac", "ipod", 44100, "5.1"), "6 个声道"),
    ],
    ids=["wav rate", "mp3 rate", "m4a rate", "wav channels", "m4a channels"],
)
def test_rates_and_channels_beyond_the_rules_are_told(content: Callable[[], bytes], wrong: str) -> None:
    assert wrong in refusal(content())


@pytest.mark.parametrize(
    ("codec", "said"),
    [
        ("pcm_u8", "8 位 PCM"),
        ("pcm_s24le", "24 位 PCM"),
        ("pcm_s32le", "32 位 PCM"),
        ("pcm_f32le", "32 位浮点"),
        ("pcm_f64le", "64 位浮点"),
        ("pcm_mulaw", "μ-law"),
        ("pcm_alaw", "A-law"),
        ("libmp3lame", "mp3 编码"),
        ("adpcm_ima_wav", "adpcm_ima_wav 编码"),
    ],
)
def test_wav_of_another_coding_is_told_to_be_16_bit(codec: str, said: str) -> None:
    assert f"是 {said}，声音复刻要求 16 位" in refusal(encode(codec, "wav", 16000, seconds=SECONDS))


OTHERS = {
    "AAC (ADTS)": lambda: encode("aac", "adts", 16000),
    "AIFF": lambda: encode("pcm_s16be", "aiff", 16000),
    "AMR": lambda: encode("libopencore_amrnb", "amr", 8000),
    "AU": lambda: encode("pcm_s16be", "au", 16000),
    "AVI": lambda: encode("libmp3lame", "avi", 16000),
    "CAF": lambda: encode("pcm_s16le", "caf", 16000),
    "FLAC": lambda: encode("flac", "flac", 16000),
    "FLV": lambda: encode("aac", "flv", 44100),
    "MP2": lambda: encode("mp2", "mp2", 16000),
    "MPEG": lambda: encode("mp2", "mpegts", 16000),
    "Matroska/WebM": lambda: encode("libopus", "webm", 48000),
    "Ogg": lambda: encode("libopus", "ogg", 48000),
    "QuickTime (MOV)": lambda: encode("aac", "mov", 16000),
    "RF64/W64": lambda: encode("pcm_s16le", "w64", 16000),
    "WMA/WMV": lambda: encode("wmav2", "asf", 16000),
    "WavPack": lambda: encode("wavpack", "wv", 16000),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_named(name: str) -> None:
    message = refusal(OTHERS[name]())

    assert message.startswith(f"文件是 {name} 格式")
    assert "WAV、MP3 或 M4A" in message


def test_other_formats_are_named_behind_a_tag() -> None:
    assert "FLAC" in refusal(tag(b"TIT2" + syncsafe(2) + b"\0\0\0a") + OTHERS["FLAC"]())


def test_a_moving_picture_is_refused() -> None:
    assert "MP4 视频" in refusal(encode("aac", "mp4", 44100, picture="mpeg4", seconds=SECONDS))


def test_an_unusual_codec_is_named() -> None:
    assert "ac3" in refusal(encode("ac3", "mp4", 48000, seconds=SECONDS))


@pytest.mark.parametrize(
    "content",
    [
        bytes(5000),
        random.Random(7).randbytes(100_000),
        "这是一段说明文字。".encode() * 100,
        b"<!DOCTYPE html><html></html>",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + random.Random(1).randbytes(5000),
        b"%PDF-1.7\n" + random.Random(2).randbytes(5000),
        b"\0",
    ],
    ids=["zeros", "noise", "text", "web page", "png", "pdf", "byte"],
)
def test_what_is_no_audio_says_so(content: bytes) -> None:
    assert "不是可识别的音频文件，请上传以下格式之一：m4a、mp3、wav" in refusal(content)


def test_raw_samples_are_told_to_become_wav() -> None:
    assert "裸 PCM" in refusal(TONE * 30)


def test_damaged_files_say_so() -> None:
    assert "WAV 文件不完整" in refusal(riff(form()))
    assert "m4a 文件已损坏或不完整" in refusal(m4a()[: len(m4a()) // 2])
    assert "m4a 文件已损坏或不完整" in refusal(m4a()[:20])


def test_a_cut_off_tail_is_left_out() -> None:
    whole = in_front(encode(*AAC, seconds=12))

    sample = judge(whole[: len(whole) * 2 // 3])

    assert 7000 < sample.duration_ms < 9000


@pytest.mark.parametrize("kind", [WAV, MP3, AAC, ALAC], ids=["wav", "mp3", "m4a", "lossless"])
def test_silence_is_refused(kind: tuple[str, str, int]) -> None:
    assert "没有声音" in refusal(encode(*kind, seconds=SECONDS, silent=True))


def test_a_single_loud_moment_is_no_silence() -> None:
    assert judge(riff(form(), chunk(b"data", bytes(160_000) + TONE))).duration_ms == 5250
    assert "没有声音" in refusal(riff(form(), chunk(b"data", struct.pack("<h", 900) * 96_000)))


async def test_bytes_are_limited() -> None:
    largest = riff(form(channels=2, align=4, rate=48000), chunk(b"data", TONE * 1311))[: samples.MAX_BYTES]
    assert len(largest) == samples.MAX_BYTES

    assert (await examine(largest)).channels == 2
    with pytest.raises(AudioTooLarge, match="10485761 字节，超过 10485760 字节"):
        await examine(largest + b"\0")
    assert "0 字节" in await told(b"")


# ---- Traps


def claiming(content: bytes, path: str, entries: int, *, at: int = 4) -> bytes:
    """Have a table claim more entries than it has."""
    return changed(content, path, lambda body: body[:at] + struct.pack(">I", entries) + body[at + 4 :])


def count(content: bytes, table: str, entries: int, *, at: int = 4) -> bytes:
    return claiming(content, f"{STBL}/{table}", entries, at=at)


def added(content: bytes, path: str, *new: bytes) -> bytes:
    return changed(content, path, lambda body: body + b"".join(new))


def nested(depth: int, name: bytes) -> bytes:
    content = b""
    for _ in range(depth):
        content = box(name, content)
    return content


def compressed_moov(claimed: int, inflated: int) -> bytes:
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(MIB)) for _ in range(inflated // MIB)) + packer.flush()
    inside = box(b"dcom", b"zlib") + box(b"cmvd", struct.pack(">I", claimed) + packed)
    return box(b"ftyp", b"M4A \0\0\2\0") + box(b"moov", box(b"cmov", inside))


def hostile() -> Iterator[tuple[str, bytes]]:
    whole, parts, lossless = m4a(), fragmented(), encode(*ALAC, seconds=SECONDS)
    for entries in (80_000_000, 0xFFFFFFFF):
        claim = struct.pack(">I", entries)
        for table, at in {"stts": 4, "stsc": 4, "stsz": 8, "stco": 4, "sbgp": 8}.items():
            yield f"{entries} in {table}", count(whole, table, entries, at=at)
        yield f"{entries} samples", count(count(whole, "stts", entries, at=8), "stsz", entries, at=8)
        yield f"{entries} of one byte", count(count(whole, "stsz", 1), "stsz", entries, at=8)
        yield f"{entries} in ctts", added(whole, STBL, box(b"ctts", bytes(4) + claim + bytes(8)))
        yield f"{entries} in stss", added(whole, STBL, box(b"stss", bytes(4) + claim + bytes(4)))
        yield f"{entries} in sdtp", added(whole, STBL, box(b"sdtp", bytes(100), size=entries))
        yield f"{entries} in elst", claiming(whole, "moov/trak/edts/elst", entries)
        yield f"{entries} in trun", claiming(parts, "moof/traf/trun", entries)
        yield f"{entries} in sidx", parts + box(b"sidx", struct.pack(">IIIIIIHH", 0, 1, 16000, 0, 0, 0, 0, 0xFFFF))
        yield f"{entries} of extradata", whole.replace(struct.pack(">I4s", 54, b"esds"), claim + b"glbl")
        cover = box(b"ilst", box(b"covr", box(b"data", bytes(100), size=entries)))
        yield f"{entries} of cover", added(whole, "moov/udta/meta", cover)
        yield f"{entries} inflated", compressed_moov(entries, MIB)
        yield f"{entries} a frame", lossless.replace(struct.pack(">I", 4096), claim)
    fragment = parts[parts.index(b"moof") - 4 : parts.index(b"mdat") - 4]
    yield "many fragments", parts + fragment * 1000
    yield "nested moov", whole + nested(5000, b"moov")
    yield "nested in a track", added(whole, "moov/trak", nested(5000, b"udta"))
    yield "many tracks", added(whole, "moov", box(b"trak", dict(boxes(dict(boxes(whole))[b"moov"]))[b"trak"]) * 5000)
    yield "empty tracks", added(whole, "moov", box(b"trak", b"") * 100_000)
    yield "inflated moov", compressed_moov(200 * MIB, 200 * MIB)
    edits = struct.pack(">II", 0, 100_000) + struct.pack(">III", 5500, 0, 0x10000) * 100_000
    yield "endless edits", changed(whole, "moov/trak/edts/elst", lambda _: edits)
    frames = struct.pack(">III", 0, 0, 2_000_000) + bytes(8_000_000)
    yield "frames of no bytes", changed(whole, f"{STBL}/stsz", lambda _: frames)


def mutated(number: int) -> bytes:
    """A file with some bytes changed, most of them in the tables."""
    dice = random.Random(number)
    whole = bytearray(dice.choice([in_front(m4a()), fragmented(), in_front(encode(*ALAC, seconds=SECONDS))]))
    tables = whole.index(b"mdat")
    for _ in range(dice.randint(1, 8)):
        at = dice.randrange(tables if dice.random() < 0.9 else len(whole))
        change = dice.choice([dice.randbytes(1), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0" * 4, dice.randbytes(4)])
        whole[at : at + len(change)] = change
    return bytes(whole[: dice.randrange(len(whole))] if dice.random() < 0.1 else whole)


class Fate(NamedTuple):
    """How the process for a file ended."""

    status: int
    answer: Any
    seconds: float
    memory: int


# As the real process does it, but forked where everything is imported already. What counts as memory then begins with
# that of this little program and not with that of the tests.
CHILDREN = """
import json, os, sys, time
from app import samples
samples.CHILD_SECONDS, samples.CHILD_BYTES = 5.0, int(sys.argv[2])
for path in sorted(os.listdir(sys.argv[1])):
    begun, (reading, writing) = time.monotonic(), os.pipe()
    child = os.fork()
    if not child:
        os.dup2(os.open(os.path.join(sys.argv[1], path), os.O_RDONLY), 0)
        os.dup2(writing, 1)
        samples._main()
        sys.stdout.flush()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        output = pipe.read()
    _, status, usage = os.wait4(child, 0)
    print(json.dumps([path, status, output, time.monotonic() - begun, usage.ru_maxrss * 1024]))
"""


def fates(folder: Path, files: dict[str, bytes], memory: int = samples.CHILD_BYTES) -> dict[str, Fate]:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    ran = subprocess.run(
        [sys.executable, "-c", CHILDREN, folder, str(memory)], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert ran.stderr == ""
    ended = {}
    for path, status, output, *spent in map(json.loads, ran.stdout.splitlines()):
        answer = output.removeprefix("ready\n")
        ended[path] = Fate(status, json.loads(answer) if answer else None, *spent)
    return ended


def test_hostile_files_take_little_memory_and_time(tmp_path: Path) -> None:
    ended = fates(tmp_path, dict(hostile()))

    assert {name: fate for name, fate in ended.items() if fate.status} == {}
    assert max(fate.memory for fate in ended.values()) < 200 * MIB


def test_memory_is_little_because_it_is_limited(tmp_path: Path) -> None:
    ended = fates(tmp_path, {"inflated": compressed_moov(200 * MIB, 200 * MIB)}, memory=1024 * MIB)

    assert ended["inflated"].memory > 200 * MIB


def test_damaged_files_take_little_memory_and_time(tmp_path: Path) -> None:
    ended = fates(tmp_path, {f"{number:03}": mutated(number) for number in range(100)})

    assert {name: fate for name, fate in ended.items() if fate.status} == {}
    assert max(fate.memory for fate in ended.values()) < 200 * MIB
    assert 13 < sum(isinstance(fate.answer, dict) for fate in ended.values()) < 87


async def test_sound_in_another_file_is_not_fetched(tmp_path: Path) -> None:
    sound, reference = tmp_path / "sound.m4a", tmp_path / "reference.m4a"
    place = str(sound).encode()
    # An alias of a volume and a file, in 150 bytes, and then the path once more.
    alias = bytes(14) + b"\1x" + bytes(38) + b"\1x" + bytes(98)
    path = struct.pack(">HH", 2, len(place)) + place + bytes(len(place) % 2) + b"\xff\xff\0\0"
    outside = struct.pack(">II", 0, 1) + box(b"alis", alias + path)
    referring = changed(m4a(), "moov/trak/mdia/minf/dinf/dref", lambda _: outside)
    sound.write_bytes(m4a())
    reference.write_bytes(referring)

    assert "m4a 文件" in await told(referring)

    # The trap is live: FFmpeg off the leash walks into it.
    leave = {"enable_drefs": "1", "use_absolute_path": "1"}
    with av.open(str(reference), container_options=leave) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) > 5 * 16000


LIMITS = """
import mmap, socket, sys
from app import samples
samples.CHILD_SECONDS = 1.0
samples._confine()
refused = 0
size = samples.CHILD_BYTES
for attempt in (lambda: open("/etc/passwd"), socket.socket, lambda: bytes(size), lambda: mmap.mmap(-1, size)):
    try:
        attempt()
    except (OSError, MemoryError):
        refused += 1
print(refused, flush=True)
while {busy}:
    pass
sys.stdin.read()
"""


@pytest.mark.parametrize("busy", [True, False])
def test_the_process_is_confined_and_dies_by_itself(busy: bool) -> None:
    begun = time.monotonic()

    with subprocess.Popen(
        [sys.executable, "-c", LIMITS.format(busy=busy)], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.read() == b"4\n"
        assert process.wait(10) < 0

    assert time.monotonic() - begun < 5


# ---- The process for M4A


def children() -> list[int]:
    """The processes that this one has started and not yet buried, but for the servers of other tests."""
    found: list[int] = []
    for each in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError):  # a thread that has ended meanwhile
            found += map(int, each.read_text().split())
    return [process for process in found if not is_server(process)]


def is_server(process: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        command = Path(f"/proc/{process}/cmdline").read_bytes()
        return b"multiprocessing" in command
    return False


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Runs to the end on an event loop of each kind, and sees that no process is left behind."""
    assert not children()
    yield request.param
    assert not children()


Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a shell script in the place of the process."""

    def write(script: str) -> None:
        path = tmp_path / "process"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(path))

    return write


Pretend = Callable[[str], None]


async def child_is_there() -> None:
    with anyio.fail_after(10):
        while not children():
            await asyncio.sleep(0.005)


async def children_are_gone() -> None:
    with anyio.fail_after(10):
        while children():
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.05)  # the event loop hears of it a little later


def test_cancelling_the_task_kills_the_process(run: Run, pretend: Pretend) -> None:
    pretend("exec sleep 60")

    async def main() -> None:
        task = asyncio.ensure_future(examine(m4a()))
        await child_is_there()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await children_are_gone()

    begun = time.monotonic()
    run(main())
    assert time.monotonic() - begun < 5


def test_leaving_the_scope_kills_the_process(run: Run, pretend: Pretend) -> None:
    pretend("exec sleep 60")

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(examine, m4a())
            await child_is_there()
            tasks.cancel_scope.cancel()
        await children_are_gone()

    run(main())


def test_cancelling_at_any_moment_leaves_nothing(run: Run) -> None:
    async def main() -> None:
        assert (await examine(m4a())).container == "m4a"
        await asyncio.sleep(0.1)
        before = descriptors()
        for number in range(30):
            task = asyncio.ensure_future(examine(m4a()))
            await asyncio.sleep(0.0005 * number if number < 24 else 0.02 * (number - 23))
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await children_are_gone()
        with anyio.fail_after(10):
            while descriptors() > before + 2:  # uvloop keeps a pair for a while
                await asyncio.sleep(0.005)

    run(main())


def test_what_the_process_refuses_is_told(run: Run) -> None:
    assert run(told(encode("aac", "ipod", 12000, seconds=SECONDS))).startswith("音频采样率为 12000 Hz")


def test_a_process_that_hangs_is_killed_in_time(run: Run, pretend: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend("echo ready\nexec sleep 60")
    monkeypatch.setattr(samples, "CHILD_SECONDS", 0.3)

    assert "超时" in run(told(m4a()))


def test_a_process_that_crashes_refuses_the_file(run: Run, pretend: Pretend, caplog: pytest.LogCaptureFixture) -> None:
    pretend("echo ready\nkill -SEGV $$")

    assert "结构异常" in run(told(m4a()))
    assert "ended with -11" in caplog.text


@pytest.mark.parametrize("script", ["exit 1", "echo something else", "exec /nowhere 2> /dev/null"])
def test_a_process_that_does_not_start_is_no_fault_of_the_file(run: Run, pretend: Pretend, script: str) -> None:
    pretend(script)

    with pytest.raises(RuntimeError, match="does not start"):
        run(examine(m4a()))


def test_the_process_is_told_no_secrets(
    run: Run, pretend: Pretend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CREDENTIAL_KEYS", "secret")
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    pretend(f"export > {tmp_path}/environment; pwd > {tmp_path}/folder")

    with suppress(RuntimeError):
        run(examine(m4a()))

    told = (tmp_path / "environment").read_text()
    assert "PYTHONUNBUFFERED" in told
    assert "secret" not in told


def test_several_wait_for_each_other_and_nobody_for_them(run: Run) -> None:
    async def main() -> None:
        most, ended = 0, False

        async def watch() -> None:
            nonlocal most
            while not ended:
                most = max(most, len(children()))
                await asyncio.sleep(0.01)

        watching = asyncio.ensure_future(watch())
        async with ticking() as measured:
            judged = await asyncio.gather(
                *(examine(content) for content in [m4a(), pcm(30), encode(*MP3, seconds=SECONDS)] * 3)
            )
        ended = True
        await watching
        assert [sample.container for sample in judged] == ["m4a", "wav", "mp3"] * 3
        assert 1 <= most <= samples.PROBES_AT_ONCE
        assert measured.longest_gap_seconds < LONGEST_GAP_SECONDS

    m4a()
    encode(*MP3, seconds=SECONDS)
    run(main())


def test_it_works_from_anywhere_in_a_bare_environment(tmp_path: Path) -> None:
    (tmp_path / "voice").write_bytes(m4a())
    program = (
        f"import asyncio, sys; sys.path.insert(0, {str(PROJECT)!r})\n"
        "from app.samples import examine_sample\n"
        "print(asyncio.run(examine_sample(open('voice', 'rb'))))"
    )

    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={}, capture_output=True, text=True)

    assert "container='m4a'" in ran.stdout, ran.stderr
    assert ran.stderr == ""
