"""What is counted while speech passes by, against what decoding finds."""

import io
import math
from array import array
from fractions import Fraction
from functools import cache

import av
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.audio import AudioFormat, measure_duration_ms
from app.playtime import MAX_ID3_BYTES, begin_playtime

PLAIN = (("write_xing", "0"), ("id3v2_version", "0"))
FRAME_SAMPLES = 1152


@cache
def encode(
    codec: str,
    rate: int,
    seconds: float,
    kbps: int = 32,
    options: tuple[tuple[str, str], ...] = (),
    layout: str = "mono",
) -> bytes:
    """A tone, as an encoder writes it."""
    file = io.BytesIO()
    container_format = "mp3" if codec == "libmp3lame" else "ogg"
    with av.open(file, "w", format=container_format, options=dict(options)) as container:
        stream = container.add_stream(codec, rate=rate)
        assert isinstance(stream, av.AudioStream)
        stream.layout, stream.bit_rate = layout, kbps * 1000
        for start in range(0, int(rate * seconds), FRAME_SAMPLES):
            size = min(FRAME_SAMPLES, int(rate * seconds) - start)
            tone = array("h", (int(9000 * math.sin(i * 0.05)) for i in range(start, start + size)))
            frame = av.AudioFrame(format="s16", layout=layout, samples=size)
            frame.planes[0].update((tone * stream.channels).tobytes().ljust(frame.planes[0].buffer_size, b"\0"))
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def count(audio: bytes, audio_format: AudioFormat, rate: int = 0, piece_bytes: int = 8000) -> int | None:
    """What is counted of audio that comes in pieces."""
    playtime = begin_playtime(audio_format, rate)
    for start in range(0, len(audio), piece_bytes):
        playtime.feed(audio[start : start + piece_bytes])
    return playtime.duration_ms


def decode(audio: bytes, audio_format: AudioFormat) -> int:
    return measure_duration_ms(io.BytesIO(audio), audio_format, 0)


@pytest.mark.parametrize("options", [(), PLAIN], ids=["with notes", "plain"])
@pytest.mark.parametrize("kbps", [16, 32, 128])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 24000, 44100, 48000])
@pytest.mark.parametrize("seconds", [0.05, 1.2345])
def test_mp3_is_counted_as_it_decodes(
    rate: int, kbps: int, options: tuple[tuple[str, str], ...], seconds: float
) -> None:
    audio = encode("libmp3lame", rate, seconds, kbps, options)
    assert count(audio, "mp3") == decode(audio, "mp3")


@pytest.mark.parametrize("options", [(), (("page_duration", "20000"),)], ids=["long pages", "short pages"])
@pytest.mark.parametrize("rate", [8000, 16000, 24000, 48000])
@pytest.mark.parametrize("seconds", [0.05, 1.2345, 3.3])
def test_opus_is_counted_as_it_decodes(rate: int, options: tuple[tuple[str, str], ...], seconds: float) -> None:
    audio = encode("libopus", rate, seconds, 32, options)
    assert count(audio, "opus") == decode(audio, "opus")


@pytest.mark.parametrize(("codec", "audio_format"), [("libmp3lame", "mp3"), ("libopus", "opus")])
def test_stereo_is_counted_as_it_decodes(codec: str, audio_format: AudioFormat) -> None:
    audio = encode(codec, 48000, 1.0, 64, layout="stereo")
    assert count(audio, audio_format) == decode(audio, audio_format)


def test_pcm_is_counted_by_its_bytes() -> None:
    assert count(bytes(3001), "pcm", 1000, piece_bytes=7) == 1500
    assert count(b"\0", "pcm", 1000) is None


def test_the_header_of_wav_tells_and_nothing_is_counted() -> None:
    assert count(b"RIFF" + bytes(100), "wav") is None


@given(piece_bytes=st.integers(1, 5000), is_opus=st.booleans())
def test_it_does_not_matter_how_audio_is_cut_into_pieces(piece_bytes: int, is_opus: bool) -> None:
    if is_opus:
        audio = encode("libopus", 24000, 1.2345, 32, (("page_duration", "20000"),))
        assert count(audio, "opus", piece_bytes=piece_bytes) == decode(audio, "opus")
    else:
        audio = encode("libmp3lame", 22050, 1.2345)
        assert count(audio, "mp3", piece_bytes=piece_bytes) == decode(audio, "mp3")


def frame_ends() -> tuple[bytes, list[int]]:
    """Plain MP3 of a constant rate without padding, and where its frames end."""
    audio = encode("libmp3lame", 24000, 1.0, 32, PLAIN)
    size = 72 * 32000 // 24000
    assert len(audio) % size == 0
    return audio, list(range(size, len(audio) + 1, size))


def test_what_is_not_whole_must_be_decoded() -> None:
    audio, ends = frame_ends()
    assert count(audio[: ends[20]], "mp3") == 21 * 24
    assert count(audio[: ends[20] - 1], "mp3") is None
    assert count(audio[: ends[20]] + b"TAG" + bytes(125), "mp3") is None
    noted = encode("libmp3lame", 24000, 1.0)
    assert count(noted[: -(72 * 32000 // 24000)], "mp3") is None  # one frame less than its encoder notes
    opus = encode("libopus", 24000, 1.2345)
    assert count(opus[:-1], "opus") is None


def test_what_does_not_begin_at_its_beginning_must_be_decoded() -> None:
    audio, ends = frame_ends()
    counted = [count(audio[end:], "mp3") for end in ends[:30]]
    assert None in counted
    assert all(ms in {None, decode(audio[end:], "mp3")} for ms, end in zip(counted, ends, strict=False))
    opus = encode("libopus", 24000, 3.3, 32, (("page_duration", "20000"),))
    pages = [at for at in range(len(opus)) if opus.startswith(b"OggS", at)]
    assert count(opus[: pages[2]] + opus[pages[10] :], "opus") is None


def test_a_gap_must_be_decoded() -> None:
    opus = encode("libopus", 24000, 3.3, 32, (("page_duration", "20000"),))
    pages = [at for at in range(len(opus)) if opus.startswith(b"OggS", at)]
    assert count(opus[: pages[20]] + opus[pages[25] :], "opus") is None
    at = pages[20] + 6  # where the page says how far it comes
    far = (1 << 40).to_bytes(8, "little")
    assert count(opus[:at] + far + opus[at + 8 :], "opus") is None


def test_two_streams_in_one_must_be_decoded() -> None:
    opus = encode("libopus", 24000, 1.2345)
    assert count(opus + opus, "opus") is None
    slow, fast = (encode("libmp3lame", rate, 1.0, 32, PLAIN) for rate in (16000, 24000))
    assert count(slow + fast, "mp3") is None


@given(st.binary(max_size=4000), st.sampled_from(["mp3", "opus"]), st.integers(1, 999))
def test_rubbish_is_no_failure(rubbish: bytes, audio_format: AudioFormat, piece_bytes: int) -> None:
    whole = encode("libmp3lame", 24000, 1.0) if audio_format == "mp3" else encode("libopus", 24000, 1.2345)
    for audio in (rubbish, whole[:500] + rubbish, whole + rubbish):
        counted = count(audio, audio_format, piece_bytes=piece_bytes)
        assert counted is None or counted > 0


@pytest.mark.parametrize("audio_format", ["mp3", "opus"])
def test_nothing_is_gathered_for_long(audio_format: AudioFormat) -> None:
    playtime = begin_playtime(audio_format, 0)
    beginning = (
        b"ID3\4\0\0\x7f\x7f\x7f\x7f" if audio_format == "mp3" else b"OggS\0\2" + bytes(20) + b"\xff" + b"\xff" * 255
    )
    playtime.feed(beginning)
    for _ in range(200):
        playtime.feed(bytes(8000))
    assert len(playtime._rest) <= MAX_ID3_BYTES + 8000
    assert playtime.duration_ms is None
