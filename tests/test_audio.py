"""Durations against really encoded audio, and WAV headers against everything that streams put there."""

import io
import math
import random
import struct
import wave
from array import array
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.audio import CONTENT_TYPES, AudioFormat, correct_wav_header, measure_duration_ms
from app.errors import InvalidAudio

RATES = (8000, 16000, 22050, 24000, 44100, 48000)
SECONDS = 1.2345
UNKNOWN_SIZES = (0, 0x7FFFFFFF, 0x7FFFF000, 0x80000000, 0xFFFFFFFF)
GIB = 1 << 30


def tone(frames: int) -> bytes:
    return array("h", (int(9000 * math.sin(i * 0.05)) for i in range(frames))).tobytes()


def encode(codec: str, container_format: str, rate: int, *, options: dict[str, str] | None = None) -> bytes:
    """Encode a mono tone of SECONDS."""
    frames = int(rate * SECONDS)
    frame = av.AudioFrame(format="s16", layout="mono", samples=frames)
    frame.planes[0].update(tone(frames).ljust(frame.planes[0].buffer_size, b"\0"))
    frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_format, options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        assert isinstance(stream, av.AudioStream)
        stream.layout = "mono"
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def wav(frames: int, rate: int = 16000, *, width: int = 2, channels: int = 1) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(bytes(frames * width * channels))
    return buffer.getvalue()


def chunk(name: bytes, content: bytes, *, size: int | None = None) -> bytes:
    declared = len(content) if size is None else size
    return name + struct.pack("<I", declared) + content + bytes(len(content) % 2)


FORM = chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, 16000, 32000, 2, 16))


def riff(*chunks: bytes, size: int | None = None) -> bytes:
    body = b"WAVE" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


def corrected(content: bytes) -> tuple[bool, bytes]:
    file = io.BytesIO(content)
    changed = correct_wav_header(file)
    return changed, file.getvalue()


@pytest.mark.parametrize("rate", RATES)
def test_mp3_is_measured_to_the_sample(rate: int) -> None:
    encoded = encode("libmp3lame", "mp3", rate)

    assert measure_duration_ms(io.BytesIO(encoded), "mp3", rate) == round(int(rate * SECONDS) * 1000 / rate)


@pytest.mark.parametrize("rate", [8000, 12000, 16000, 24000, 48000])
def test_opus_is_measured_to_the_sample(rate: int) -> None:
    encoded = encode("libopus", "ogg", rate)

    assert measure_duration_ms(io.BytesIO(encoded), "opus", rate) == pytest.approx(SECONDS * 1000, abs=1)


@pytest.mark.parametrize("rate", RATES)
def test_wav_from_an_encoder_is_measured_and_left_alone(rate: int) -> None:
    encoded = encode("pcm_s16le", "wav", rate)

    assert measure_duration_ms(io.BytesIO(encoded), "wav", 0) == round(int(rate * SECONDS) * 1000 / rate)
    assert corrected(encoded) == (False, encoded)


def test_mp3_without_a_xing_header_counts_what_plays() -> None:
    encoded = encode("libmp3lame", "mp3", 24000, options={"write_xing": "0"})

    measured = measure_duration_ms(io.BytesIO(encoded), "mp3", 24000)

    # Whole frames of 576 samples: the encoder's delay and padding cannot be told from audio.
    assert measured * 24 % 576 < 24 or 576 - measured * 24 % 576 < 24
    assert 0 < measured - SECONDS * 1000 < 120


@pytest.mark.parametrize("rate", RATES)
def test_pcm_is_measured_by_its_size(rate: int) -> None:
    assert measure_duration_ms(io.BytesIO(bytes(rate * 3 + 1)), "pcm", rate) == 1500


@pytest.mark.parametrize(("width", "channels"), [(1, 1), (2, 1), (2, 2), (3, 2), (4, 1)])
def test_wav_of_any_width_is_measured(width: int, channels: int) -> None:
    content = wav(24000, 48000, width=width, channels=channels)

    assert measure_duration_ms(io.BytesIO(content), "wav", 0) == 500


@pytest.mark.parametrize("size", UNKNOWN_SIZES)
def test_wav_is_measured_by_its_bytes_and_not_its_header(size: int) -> None:
    content = riff(FORM, chunk(b"data", bytes(32000), size=size), size=size)

    assert measure_duration_ms(io.BytesIO(content), "wav", 0) == 1000


def test_measuring_begins_at_the_start_of_the_file() -> None:
    source = io.BytesIO(wav(1600))
    source.seek(0, io.SEEK_END)

    assert measure_duration_ms(source, "wav", 0) == 100


@pytest.mark.parametrize(("format", "codec", "container"), [("mp3", "libmp3lame", "mp3"), ("opus", "libopus", "ogg")])
def test_a_cut_off_tail_is_tolerated(format: AudioFormat, codec: str, container: str) -> None:
    short_pages = {"page_duration": "100000"} if container == "ogg" else None
    encoded = encode(codec, container, 24000, options=short_pages)
    half = encoded[: len(encoded) // 2 + 7]

    assert 0.2 < measure_duration_ms(io.BytesIO(half), format, 24000) / (SECONDS * 1000) < 0.8


def rubbish() -> dict[str, bytes]:
    noise = random.Random(7).randbytes(600_000)
    return {
        "empty": b"",
        "zeros": bytes(5000),
        "noise": noise,
        "text": b"<html><body>502 Bad Gateway</body></html>" * 50,
        "short": b"RIFF\0\0\0\0WAVE",
        "frame headers in noise": b"".join(b"\xff\xfb\x90\x00" + noise[i : i + 413] for i in range(0, 413 * 200, 413)),
        "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n",
        "header without data": riff(FORM),
        "data without form": riff(chunk(b"data", bytes(100))),
        "no rate": riff(chunk(b"fmt ", bytes(16)), chunk(b"data", bytes(100))),
        "compressed": riff(
            chunk(b"fmt ", struct.pack("<HHIIHH", 2, 1, 16000, 8000, 256, 4)), chunk(b"data", bytes(512))
        ),
        "no audio": wav(0),
    }


@pytest.mark.parametrize("name", sorted(rubbish()))
@pytest.mark.parametrize("format", ["mp3", "opus", "wav"])
def test_rubbish_is_not_audio(format: AudioFormat, name: str) -> None:
    with pytest.raises(InvalidAudio):
        measure_duration_ms(io.BytesIO(rubbish()[name]), format, 16000)


def test_no_pcm_is_not_audio() -> None:
    with pytest.raises(InvalidAudio):
        measure_duration_ms(io.BytesIO(b"\0"), "pcm", 16000)


def test_another_format_than_promised_is_not_audio() -> None:
    with pytest.raises(InvalidAudio):
        measure_duration_ms(io.BytesIO(encode("libopus", "ogg", 16000)), "mp3", 16000)
    with pytest.raises(InvalidAudio):
        measure_duration_ms(io.BytesIO(wav(1600)), "opus", 16000)


@pytest.mark.parametrize("size", UNKNOWN_SIZES)
@pytest.mark.parametrize("before", [b"", chunk(b"LIST", b"INFOISFT\x0e\0\0\0Lavf60.3.100\0\0")])
def test_unknown_sizes_are_filled_in(size: int, before: bytes) -> None:
    streamed = riff(FORM, before, chunk(b"data", b"\x01\x02" * 1000, size=size), size=size)

    changed, content = corrected(streamed)

    assert changed
    assert content == riff(FORM, before, chunk(b"data", b"\x01\x02" * 1000))
    with wave.open(io.BytesIO(content)) as file:
        assert file.getnframes() == 1000


def test_python_s_own_streaming_header_is_filled_in() -> None:
    changed, content = corrected(wav(0) + bytes(2000))

    assert changed
    assert content == wav(1000)


@pytest.mark.parametrize(
    "content",
    [
        riff(FORM, chunk(b"data", b"abcd")),
        riff(FORM, chunk(b"data", b"abc")),
        riff(FORM, chunk(b"data", b"abc"))[:-1],
        riff(FORM, chunk(b"data", b"abc"), size=36 + 3),
        riff(FORM, chunk(b"data", b"abc"), size=36 + 3)[:-1],
        riff(FORM, chunk(b"data", b"")),
        riff(chunk(b"JUNK", bytes(27)), FORM, chunk(b"data", b"abcdef"), chunk(b"LIST", b"INFO"), chunk(b"id3 ", b"x")),
        riff(FORM, chunk(b"data", b""), chunk(b"LIST", b"INFO")),
    ],
)
def test_a_right_header_stays_untouched(content: bytes) -> None:
    assert corrected(content) == (False, content)


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
def test_a_wrong_outer_size_alone_is_corrected(size: int) -> None:
    chunks = FORM, chunk(b"data", b"abcd"), chunk(b"LIST", b"INFO")

    assert corrected(riff(*chunks, size=size)) == (True, riff(*chunks))


def test_the_size_of_a_first_frame_is_no_size_of_the_stream() -> None:
    first = riff(FORM, chunk(b"data", b"\x10\x00" * 100))

    assert corrected(first + b"\x20\x00" * 500) == (
        True,
        riff(FORM, chunk(b"data", b"\x10\x00" * 100 + b"\x20\x00" * 500)),
    )


def test_a_cut_off_file_is_corrected_to_what_is_left() -> None:
    assert corrected(riff(FORM, chunk(b"data", bytes(4000)))[:-1000]) == (True, riff(FORM, chunk(b"data", bytes(3000))))


@pytest.mark.parametrize("name", sorted(set(rubbish()) - {"data without form", "no rate", "compressed"}))
def test_what_is_no_wav_with_data_is_left_alone(name: str) -> None:
    content = rubbish()[name]

    assert corrected(content) == (False, content)


def test_headers_that_never_end_are_given_up() -> None:
    content = riff(*[chunk(b"JUNK", b"") for _ in range(100_000)], chunk(b"data", b"ab", size=0))
    source = CountingFile(content)

    assert not correct_wav_header(source)
    assert source.bytes_read < 1000


class CountingFile(io.BytesIO):
    bytes_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        self.bytes_read += len(content)
        return content


def test_a_long_file_is_not_read() -> None:
    source = CountingFile(riff(FORM, chunk(b"data", bytes(5_000_000), size=0), size=0))

    assert correct_wav_header(source)
    assert source.bytes_read < 200


@pytest.fixture
def sparse_file(tmp_path: Path) -> BinaryIO:
    """5 GiB of silence that take no space on the disk."""
    file = (tmp_path / "long.wav").open("w+b")
    file.write(riff(FORM, chunk(b"data", b"", size=0), size=0))
    file.truncate(5 * GIB)
    return file


def test_a_file_beyond_32_bits_gets_the_largest_size(sparse_file: BinaryIO) -> None:
    with sparse_file as file:
        assert measure_duration_ms(file, "wav", 0) == round((5 * GIB - 44) / 32)
        assert correct_wav_header(file)
        file.seek(0)
        header = file.read(44)
        assert not correct_wav_header(file)

    assert header[4:8] == header[40:44] == b"\xff\xff\xff\xff"


chunks = st.builds(chunk, st.sampled_from([b"LIST", b"JUNK", b"fact", b"id3 "]), st.binary(max_size=40))


@given(
    before=st.lists(chunks, max_size=3),
    after=st.lists(chunks, max_size=3),
    data=st.binary(max_size=200),
)
def test_every_well_formed_file_stays_untouched(before: list[bytes], after: list[bytes], data: bytes) -> None:
    content = riff(*before, FORM, chunk(b"data", data), *after)

    assert corrected(content) == (False, content)


@given(
    before=st.lists(chunks, max_size=3),
    data=st.binary(min_size=1, max_size=200),
    riff_size=st.integers(0, 0xFFFFFFFF),
    data_size=st.sampled_from(UNKNOWN_SIZES),
)
def test_every_streamed_header_ends_right(before: list[bytes], data: bytes, riff_size: int, data_size: int) -> None:
    stream = riff(*before, FORM, b"data" + struct.pack("<I", data_size) + data, size=riff_size)

    changed, content = corrected(stream)

    assert changed
    assert content == riff(*before, FORM, b"data" + struct.pack("<I", len(data)) + data)
    assert corrected(content) == (False, content)


@given(st.binary(max_size=300) | st.binary(max_size=100).map(lambda tail: b"RIFF\0\0\0\0WAVE" + tail))
def test_any_bytes_keep_their_length_and_settle_at_once(content: bytes) -> None:
    _, once = corrected(content)

    assert len(once) == len(content)
    assert corrected(once) == (False, once)


def test_every_format_has_a_content_type() -> None:
    assert CONTENT_TYPES == {"mp3": "audio/mpeg", "wav": "audio/wav", "pcm": "audio/pcm", "opus": "audio/ogg"}
