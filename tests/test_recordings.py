"""Uploads as they come: really encoded audio of every kind, what only pretends to be audio, and traps."""

import io
import math
import random
import socket
import struct
import subprocess
import sys
import time
import wave
import zlib
from array import array
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import av
import pytest
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.stream import VideoStream
from hypothesis import given, settings
from hypothesis import strategies as st

from app import recordings
from app.errors import AudioTooLong, InvalidAudio
from app.recordings import RECOGNIZABLE, Recording, probe
from tests.servers import PROJECT

SECONDS = 1.2345
TOLERANCE_MS = 50
VARIABLE = "flags=+qscale,global_quality=500"
MIB = 1 << 20


@lru_cache
def tone(frames: int) -> bytes:
    """Samples of a tone."""
    return array("h", (int(9000 * math.sin(i * 0.05)) for i in range(frames))).tobytes()


@lru_cache
def encode(
    codec: str,
    format: str,
    rate: int,
    *,
    options: str = "",
    codec_options: str = "",
    layout: str = "mono",
    seconds: float = SECONDS,
    silent: bool = False,
    picture: str = "",
) -> bytes:
    """Encode a tone, with a small moving picture if its codec is given."""
    frames = int(rate * seconds)
    samples = bytes(2 * frames) if silent else tone(frames)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format, options=pairs(options)) as container:
        audio = container.add_stream(codec, rate=rate, options=pairs(f"strict=-2,{codec_options}"))
        assert isinstance(audio, AudioStream)
        audio.layout, audio.bit_rate = layout, 64_000
        video = container.add_stream(picture, rate=25, options={"deadline": "realtime"}) if picture else None
        if isinstance(video, VideoStream):
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            for number in range(int(25 * seconds)):
                image = av.VideoFrame(64, 48, "yuv420p")
                image.pts, image.time_base = number, Fraction(1, 25)
                container.mux(video.encode(image))
        for start in range(0, frames, 1 << 16):
            part = samples[2 * start : 2 * (start + (1 << 16))]
            frame = av.AudioFrame(format="s16", layout="mono", samples=len(part) // 2)
            frame.planes[0].update(part.ljust(frame.planes[0].buffer_size, b"\0"))
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), start
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
        if isinstance(video, VideoStream):
            container.mux(video.encode(None))
    return buffer.getvalue()


def pairs(options: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in options.split(",") if pair)


def chunk(name: bytes, content: bytes, *, order: str = "<", size: int | None = None) -> bytes:
    declared = len(content) if size is None else size
    return name + struct.pack(f"{order}I", declared) + content + bytes(len(content) % 2)


def form(*, tag: int = 1, channels: int = 1, rate: int = 16000, align: int = 2, bits: int = 16) -> bytes:
    return chunk(b"fmt ", struct.pack("<HHIIHH", tag, channels, rate, rate * align % (1 << 32), align, bits))


def riff(*chunks: bytes, size: int | None = None) -> bytes:
    body = b"WAVE" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


SECOND = chunk(b"data", bytes(32000))


def tag(*frames: bytes) -> bytes:
    """An ID3v2.4 tag."""
    return b"ID3\x04\0\0" + syncsafe(len(b"".join(frames))) + b"".join(frames)


def syncsafe(number: int) -> bytes:
    return bytes(number >> shift & 0x7F for shift in (21, 14, 7, 0))


def examine(content: bytes, max_ms: int | None = None, containers: frozenset[str] = RECOGNIZABLE) -> Recording:
    return probe(io.BytesIO(content), containers=containers, max_ms=max_ms)


def refusal(content: bytes, containers: frozenset[str] = RECOGNIZABLE) -> str:
    with pytest.raises(InvalidAudio) as refused:
        examine(content, containers=containers)
    return refused.value.message


# ---- What there is


class Made(NamedTuple):
    """How to make a file, and what it should be taken for."""

    codec: str
    format: str
    rate: int
    container: str
    content_type: str
    decoded: str
    layout: str = "mono"
    options: str = ""
    codec_options: str = ""
    picture: str = ""

    def content(self) -> bytes:
        return encode(
            self.codec,
            self.format,
            self.rate,
            layout=self.layout,
            options=self.options,
            codec_options=self.codec_options,
            picture=self.picture,
        )


MADE = {
    "mp3": Made("libmp3lame", "mp3", 44100, "mp3", "audio/mpeg", "mp3"),
    "mp3 stereo 16 kHz": Made("libmp3lame", "mp3", 16000, "mp3", "audio/mpeg", "mp3", layout="stereo"),
    "mp3 without Xing": Made("libmp3lame", "mp3", 44100, "mp3", "audio/mpeg", "mp3", options="write_xing=0"),
    "mp3 VBR": Made("libmp3lame", "mp3", 44100, "mp3", "audio/mpeg", "mp3", codec_options=VARIABLE),
    "mp3 VBR without Xing": Made(
        "libmp3lame", "mp3", 44100, "mp3", "audio/mpeg", "mp3", options="write_xing=0", codec_options=VARIABLE
    ),
    "wav": Made("pcm_s16le", "wav", 16000, "wav", "audio/wav", "pcm_s16le"),
    "wav stereo": Made("pcm_s16le", "wav", 44100, "wav", "audio/wav", "pcm_s16le", layout="stereo"),
    "wav 24 bit": Made("pcm_s24le", "wav", 48000, "wav", "audio/wav", "pcm_s24le"),
    "wav float": Made("pcm_f32le", "wav", 48000, "wav", "audio/wav", "pcm_f32le"),
    "wav A-law": Made("pcm_alaw", "wav", 8000, "wav", "audio/wav", "pcm_alaw"),
    "wav ADPCM": Made("adpcm_ima_wav", "wav", 44100, "wav", "audio/wav", "adpcm_ima_wav"),
    "wav with mp3": Made("libmp3lame", "wav", 44100, "wav", "audio/wav", "mp3"),
    "opus": Made("libopus", "ogg", 48000, "opus", "audio/ogg", "opus"),
    "vorbis": Made("vorbis", "ogg", 44100, "ogg", "audio/ogg", "vorbis", layout="stereo"),
    "ogg flac": Made("flac", "ogg", 44100, "ogg", "audio/ogg", "flac"),
    "flac": Made("flac", "flac", 44100, "flac", "audio/flac", "flac"),
    "aac": Made("aac", "adts", 44100, "aac", "audio/aac", "aac"),
    "amr": Made("libopencore_amrnb", "amr", 8000, "amr", "audio/amr", "amr_nb"),
    "aiff": Made("pcm_s16be", "aiff", 44100, "aiff", "audio/aiff", "pcm_s16be"),
    "mkv aac": Made("aac", "matroska", 44100, "mkv", "audio/x-matroska", "aac"),
    "mkv pcm": Made("pcm_s16le", "matroska", 44100, "mkv", "audio/x-matroska", "pcm_s16le"),
    "mkv picture": Made("libmp3lame", "matroska", 44100, "mkv", "video/x-matroska", "mp3", picture="mpeg4"),
    "webm opus": Made("libopus", "webm", 48000, "webm", "audio/webm", "opus"),
    "webm vorbis": Made("vorbis", "webm", 44100, "webm", "audio/webm", "vorbis", layout="stereo"),
    "webm picture": Made("libopus", "webm", 48000, "webm", "video/webm", "opus", picture="libvpx"),
    "avi mp3": Made("libmp3lame", "avi", 44100, "avi", "video/x-msvideo", "mp3"),
    "avi picture": Made("pcm_s16le", "avi", 44100, "avi", "video/x-msvideo", "pcm_s16le", picture="mpeg4"),
    "flv mp3": Made("libmp3lame", "flv", 44100, "flv", "video/x-flv", "mp3"),
    "flv aac": Made("aac", "flv", 44100, "flv", "video/x-flv", "aac"),
    "flv picture": Made("aac", "flv", 44100, "flv", "video/x-flv", "aac", picture="flv"),
    "wma": Made("wmav2", "asf", 44100, "wma", "audio/x-ms-wma", "wmav2"),
    "wma 1": Made("wmav1", "asf", 44100, "wma", "audio/x-ms-wma", "wmav1", layout="stereo"),
    "wmv": Made("wmav2", "asf", 44100, "wmv", "video/x-ms-wmv", "wmav2", picture="wmv2"),
    "mpeg layer 2": Made("mp2", "mp2", 44100, "mpeg", "audio/mpeg", "mp2"),
    "mpeg program": Made("mp2", "mpeg", 44100, "mpeg", "audio/mpeg", "mp2"),
    "mpeg program picture": Made("mp2", "mpeg", 44100, "mpeg", "video/mpeg", "mp2", picture="mpeg1video"),
    "mpeg program ac3": Made("ac3", "dvd", 48000, "mpeg", "audio/mpeg", "ac3"),
    "mpeg transport": Made("aac", "mpegts", 44100, "mpeg", "audio/mpeg", "aac"),
}


@pytest.mark.parametrize("name", MADE)
def test_every_container_is_recognized_and_measured(name: str) -> None:
    made = MADE[name]

    recording = examine(made.content(), max_ms=int(SECONDS * 1000))

    assert recording.duration_ms == pytest.approx(SECONDS * 1000, abs=TOLERANCE_MS)
    assert recording == Recording(
        made.container,
        made.content_type,
        made.decoded,
        recording.duration_ms,
        made.rate,
        {"mono": 1, "stereo": 2}[made.layout],
    )


def test_every_container_of_the_provider_is_tried_here() -> None:
    assert ",".join(sorted(RECOGNIZABLE)) == "aac,aiff,amr,avi,flac,flv,mkv,mp3,mpeg,ogg,opus,wav,webm,wma,wmv"
    assert {made.container for made in MADE.values()} == RECOGNIZABLE


@pytest.mark.parametrize("size", [0, 4, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_streamed_wav_is_measured_by_its_bytes(size: int) -> None:
    content = riff(form(), chunk(b"data", bytes(32000), size=size), size=size)

    assert examine(content) == Recording("wav", "audio/wav", "pcm_s16le", 1000, 16000, 1)


def test_streamed_compressed_wav_is_measured_by_its_bytes() -> None:
    content = MADE["wav ADPCM"].content().replace(b"data", b"data\xff\xff\xff\xff", 1)
    start = content.index(b"data") + 8

    measured = examine(content[:start] + content[start + 4 :]).duration_ms

    assert measured == pytest.approx(SECONDS * 1000, abs=TOLERANCE_MS)


@pytest.mark.parametrize("align", [1, 3, 4, 60000])
def test_a_wrong_frame_size_does_not_change_the_duration_of_wav(align: int) -> None:
    assert examine(riff(form(align=align), SECOND)).duration_ms == 1000


def test_tags_in_any_encoding_are_ignored() -> None:
    info = chunk(b"LIST", b"INFO" + chunk(b"INAM", "录音".encode("gbk")))

    assert examine(riff(info, form(), chunk(b"id3 ", tag(b"x" * 30)), SECOND)).duration_ms == 1000


@pytest.mark.parametrize("name", ["mp3", "flac", "aac"])
def test_pictures_in_front_are_skipped(name: str) -> None:
    picture = b"APIC" + syncsafe(2 * MIB) + bytes(2) + random.Random(1).randbytes(2 * MIB)

    with_picture = examine(tag(picture) + tag(b"PRIV" + syncsafe(4) + bytes(6)) + MADE[name].content())

    assert with_picture == examine(MADE[name].content())


def test_a_cover_is_no_moving_picture() -> None:
    flac = MADE["flac"].content()
    png = b"\x89PNG\r\n\x1a\n" + bytes(100)
    picture = struct.pack(">II9sIIIIII", 3, 9, b"image/png", 0, 1, 1, 24, 0, len(png)) + png
    # Behind the stream information, which every FLAC file begins with.
    covered = flac[:42] + bytes([6]) + len(picture).to_bytes(3, "big") + picture + flac[42:]

    assert examine(covered) == examine(flac)


def test_neither_names_nor_positions_matter_and_the_file_stays_open() -> None:
    class Named(io.BytesIO):
        name = "song.m3u8"

    source = Named(MADE["mp3"].content())
    source.seek(100)

    assert probe(source, containers={"mp3"}).container == "mp3"
    assert source.getvalue() == MADE["mp3"].content()


@pytest.mark.parametrize("name", ["mp3", "opus", "aac", "wav", "webm opus", "wma", "mpeg transport"])
def test_a_cut_off_tail_is_left_out(name: str) -> None:
    content = encode(*MADE[name][:3], options="page_duration=100000" if name == "opus" else "")

    assert 300 < examine(content[: len(content) * 2 // 3]).duration_ms < 1100


def test_streams_that_turn_up_late_are_left_alone() -> None:
    picture = b"\x09" + (20).to_bytes(3, "big") + bytes(7) + b"\x22" + bytes(19) + (31).to_bytes(4, "big")
    # FFmpeg looks for streams in the first 90 seconds of an FLV file.
    flv = encode("libmp3lame", "flv", 11025, seconds=100, silent=True)

    assert examine(flv + picture * 3).duration_ms == pytest.approx(100_000, abs=4 * TOLERANCE_MS)


# ---- What is none


def rubbish() -> dict[str, bytes]:
    noise = random.Random(7).randbytes(300_000)
    mp3 = MADE["mp3"].content()
    return {
        "zeros": bytes(5000),
        "noise": noise,
        "text": "会议记录：今天讨论语音识别。".encode() * 100,
        "web page": b"<!DOCTYPE html><html><body>502 Bad Gateway</body></html>" * 50,
        "json": b'{"code": 404, "message": "not found"}',
        "png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + noise[:5000],
        "jpeg": b"\xff\xd8\xff\xe0\0\x10JFIF\0" + noise[:5000],
        "zip": b"PK\3\4\x14\0\0\0\x08\0" + noise[:5000],
        "pdf": b"%PDF-1.7\n" + noise[:5000],
        "program": b"\x7fELF\2\1\1" + bytes(9) + noise[:5000],
        "frame headers in noise": b"".join(b"\xff\xfb\x90\x00" + noise[i : i + 413] for i in range(0, 413 * 200, 413)),
        "tag only": tag(b"TIT2" + syncsafe(2) + b"\0\0\0a"),
        "tag before text": tag(b"TIT2" + syncsafe(2) + b"\0\0\0a") + b"no music" * 100,
        "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        "wav header": riff(form()),
        "wav without form": riff(SECOND),
        "wav without samples": riff(form(), chunk(b"data", b"")),
        "wav without rate": riff(form(rate=0), SECOND),
        "wav without channels": riff(form(channels=0), SECOND),
        "wav of an unknown codec": riff(form(tag=0x1234), SECOND),
        "wav of another order": b"RIFX" + riff(form(), SECOND)[4:],
        "long wav": b"RF64" + riff(form(), SECOND)[4:],
        "beginning of mp3": mp3[:60],
        "beginning of ogg": MADE["opus"].content()[:60],
        "beginning of flac": MADE["flac"].content()[:60],
        "beginning of mkv": MADE["mkv aac"].content()[:200],
        "beginning of wma": MADE["wma"].content()[:200],
        "flac of noise": MADE["flac"].content()[:86] + noise[:20000],
        "m4a": encode("aac", "ipod", 44100),
        "mov": encode("pcm_s16le", "mov", 44100),
        "caf": encode("pcm_s16le", "caf", 44100),
        "au": encode("pcm_s16be", "au", 44100),
    }


@pytest.mark.parametrize("name", rubbish())
def test_what_is_no_supported_audio_is_refused(name: str) -> None:
    assert "请" in refusal(rubbish()[name])


def test_nothing_is_no_audio() -> None:
    assert "为空" in refusal(b"")


def test_the_supported_formats_are_named() -> None:
    assert refusal(MADE["opus"].content(), frozenset({"wav", "mp3"})).endswith("mp3、wav")
    assert refusal(MADE["wav"].content(), frozenset({"mp3"})).endswith("：mp3")
    assert refusal(MADE["mpeg layer 2"].content(), frozenset({"mp3"})).endswith("：mp3")
    assert refusal(MADE["mkv aac"].content(), frozenset({"webm"})).endswith("：webm")
    assert refusal(MADE["mp3"].content(), frozenset({"wav"})).endswith("：wav")


def test_a_picture_without_sound_is_refused() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        video = container.add_stream("mpeg4", rate=25)
        assert isinstance(video, VideoStream)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        container.mux(video.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(video.encode(None))

    assert "音轨" in refusal(buffer.getvalue())


def test_an_unusual_codec_is_refused() -> None:
    assert "编码" in refusal(encode("tta", "matroska", 44100))


@pytest.mark.parametrize("content", [form(rate=500_000), form(rate=0x7FFFFFFF), form(channels=9, align=18)])
def test_absurd_rates_and_channels_are_refused(content: bytes) -> None:
    assert "采样率或声道数" in refusal(riff(content, SECOND))


def test_raw_samples_are_told_to_become_wav() -> None:
    with wave.open(io.BytesIO(MADE["wav"].content())) as file:
        samples = file.readframes(file.getnframes())

    assert "PCM" in refusal(samples)
    assert "PCM" not in refusal(rubbish()["noise"])
    assert "PCM" not in refusal(rubbish()["text"])
    assert "PCM" not in refusal(bytes(5000))


# ---- How long it may be


@pytest.mark.parametrize("name", ["mp3", "wav", "opus", "flac"])
def test_what_is_too_long_is_refused_with_both_lengths(name: str) -> None:
    content = MADE[name].content()

    assert examine(content, max_ms=1150).duration_ms > 1200
    with pytest.raises(AudioTooLong, match=r"至少 1\.[0-2] 秒，超过 1 秒"):
        examine(content, max_ms=1000)


def half_an_hour() -> bytes:
    return encode("flac", "flac", 8000, seconds=1800, silent=True)


def test_long_silence_in_a_small_file_is_refused_at_once() -> None:
    assert len(half_an_hour()) < MIB / 2
    source, begun = CountingFile(half_an_hour()), time.monotonic()

    with pytest.raises(AudioTooLong):
        probe(source, containers=RECOGNIZABLE, max_ms=60_000)

    assert time.monotonic() - begun < 1
    assert source.bytes_read < MIB / 8


def test_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds in (0, 0.01):
        monkeypatch.setattr(recordings, "PROBE_SECONDS", seconds)
        assert "超时" in refusal(half_an_hour())


class CountingFile(io.BytesIO):
    bytes_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        self.bytes_read += len(content)
        return content


def test_long_wav_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    with path.open("wb") as file:
        file.write(riff(form(), chunk(b"data", b"", size=0), size=0))
        file.truncate(500 * MIB)

    class CountingReader(io.FileIO):
        bytes_read = 0

        def read(self, size: int | None = -1, /) -> bytes:
            content = super().read(size) or b""
            CountingReader.bytes_read += len(content)
            return content

    with io.BufferedReader(CountingReader(path)) as source:
        assert probe(source, containers={"wav"}).duration_ms == round((500 * MIB - 44) / 32)

    assert CountingReader.bytes_read < MIB


# ---- Traps


def test_nothing_else_is_opened(tmp_path: Path) -> None:
    (tmp_path / "sound.wav").write_bytes(MADE["wav"].content())
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/sound.wav"
        concat = f"ffconcat version 1.0\nfile {url}\n"
        for target in (url, str(tmp_path / "sound.wav"), f"file:{tmp_path}/sound.wav", "/etc/passwd", f"subfile:{url}"):
            for playlist in (
                f"ffconcat version 1.0\nfile {target}\n",
                f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n",
                f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{target}\n",
                f'<?xml version="1.0"?><MPD type="static"><BaseURL>{target}</BaseURL></MPD>',
                f"v=0\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\na=control:{target}\n",
                f"[playlist]\nFile1={target}\nNumberOfEntries=1\n",
                f"RTSPtext\n{target}\n",
            ):
                refusal(playlist.encode())
                refusal(tag(b"TIT2" + syncsafe(2) + b"\0\0\0a") + playlist.encode())
        with pytest.raises(BlockingIOError):
            server.accept()

        # The trap is live: FFmpeg without the leash walks into it.
        with pytest.raises(av.error.FFmpegError):
            av.open(io.BytesIO(concat.encode()), "r", container_options={"safe": "0"}, timeout=0.2)
        server.accept()[0].close()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | str | None, ...]]:
    """Fills with the number of streams of each file as FFmpeg opened it, and the pixel format of the picture."""
    seen: list[tuple[int | str | None, ...]] = []
    open_with_ffmpeg = av.open

    def spy(*arguments: Any, **options: Any) -> Any:
        container = open_with_ffmpeg(*arguments, **options)
        if isinstance(container, InputContainer):
            pixels = [video.codec_context.pix_fmt for video in container.streams.video]
            seen.append((len(container.streams), *pixels))
        return container

    monkeypatch.setattr(av, "open", spy)
    return seen


def test_pictures_are_not_decoded(opened: list[tuple[int | str | None, ...]]) -> None:
    examine(MADE["webm picture"].content())

    # Only the decoder of VP8 finds out how the pixels are laid out.
    assert opened == [(2, None)]


def test_streams_are_limited(opened: list[tuple[int | str | None, ...]]) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mpegts") as container:
        frame = av.AudioFrame(format="s16", layout="stereo", samples=8000)
        frame.sample_rate, frame.time_base, frame.pts = 8000, Fraction(1, 8000), 0
        for stream in [container.add_stream("mp2", rate=16000) for _ in range(2 * recordings.MAX_STREAMS)]:
            assert isinstance(stream, AudioStream)
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))

    with suppress(InvalidAudio):
        examine(buffer.getvalue())
    assert opened[-1][0] == recordings.MAX_STREAMS


def deflated(size: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(MIB)) for _ in range(size // MIB)) + packer.flush()


def test_small_files_take_little_memory(tmp_path: Path) -> None:
    size = 250 * MIB
    body = deflated(size)
    # Flagged as deflated, and preceded by its size once inflated.
    bomb = tag(b"APIC" + syncsafe(len(body) + 4) + b"\0\x09" + syncsafe(size) + body)
    common = chunk(b"COMM", struct.pack(">hIh", 1, 1000, 16) + b"\x40\x0c\xfa" + bytes(7), order=">")
    sound = chunk(b"SSND", bytes(2008), order=">")
    aiff = b"AIFF" + common + chunk(b"ID3 ", bomb, order=">") + sound
    traps = {
        "tag before mp3": bomb + MADE["mp3"].content(),
        "tag before flac": bomb + MADE["flac"].content(),
        "tag in aac": MADE["aac"].content() + bomb + MADE["aac"].content(),
        "tag in aiff": chunk(b"FORM", aiff, order=">"),
        "tag in wav": riff(form(), chunk(b"id3 ", bomb), SECOND),
        "size in wav": riff(
            form(), chunk(b"LIST", b"INFO" + chunk(b"INAM", b"", size=0x7FFFFF00), size=0x7FFFFFF0), SECOND
        ),
        "silence": half_an_hour(),
        "samples in m4a": endless_m4a(),
    }
    for name, content in traps.items():
        (tmp_path / name).write_bytes(content)
    program = (
        "import av, resource, sys, pathlib\n"
        "from app.errors import AudioTooLong, InvalidAudio\n"
        "from app.recordings import RECOGNIZABLE, probe\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "for path in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    with path.open('rb') as source:\n"
        "        try: probe(source, containers=RECOGNIZABLE, max_ms=300_000)\n"
        "        except (AudioTooLong, InvalidAudio): pass\n"
        "print(peak() - before)\n"
    )

    probed = subprocess.run(
        [sys.executable, "-c", program, tmp_path], cwd=PROJECT, capture_output=True, text=True, check=True
    )

    assert int(probed.stdout) * 1024 < 20 * MIB


def endless_m4a() -> bytes:
    """20 KB that claim 80 million frames: FFmpeg would allocate gigabytes for them."""
    m4a, count = encode("aac", "ipod", 44100), 80_000_000
    for table, before in ((b"stts", 8), (b"stsz", 8)):
        at = m4a.index(table) + 4 + before
        m4a = m4a[:at] + struct.pack(">I", count) + m4a[at + 4 :]
    return m4a


SMALL = [
    encode(*made[:3], layout=made.layout, picture=made.picture, seconds=0.2)
    for name, made in MADE.items()
    if name != "wmv"
]


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    content=st.sampled_from(SMALL),
    changes=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6
    ),
    kept=st.just(1.0) | st.floats(0, 1),
    max_ms=st.sampled_from([None, 50, 60_000]),
)
def test_damage_of_any_kind_is_survived(
    content: bytes, changes: list[tuple[float, bytes]], kept: float, max_ms: int | None
) -> None:
    damaged = bytearray(content)
    for place, change in changes:
        # The square brings most of the changes to the headers.
        start = int(place**2 * len(damaged))
        damaged[start : start + len(change)] = change
    survive(bytes(damaged[: int(kept * len(damaged))]), max_ms)


@settings(derandomize=True, deadline=None)
@given(
    st.binary(max_size=500),
    st.sampled_from(["", "ID3\4\0\0\0\0\0\5", "OggS", "fLaC", "#!AMR\n", "FLV\1", "RIFF    WAVEfmt "]),
)
def test_any_bytes_are_survived(content: bytes, magic: str) -> None:
    survive(magic.encode() + content, 60_000)


def survive(content: bytes, max_ms: int | None) -> None:
    with suppress(InvalidAudio, AudioTooLong):
        recording = examine(content, max_ms)
        assert recording.container in RECOGNIZABLE
        assert recording.duration_ms >= 0
        assert max_ms is None or recording.duration_ms <= max_ms + recordings.PADDING_MS
