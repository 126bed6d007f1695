"""Joined files, really decoded: as long as the samples that went in, to the sample, and no seam to be heard."""

import base64
import io
import math
import random
import shutil
import struct
import subprocess
import tracemalloc
import wave
from array import array
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import av
import pytest
from playwright.sync_api import Page, sync_playwright

from app.audio import CONTENT_TYPES, AudioFormat, measure_duration_ms
from app.errors import InvalidAudio
from app.joining import Joiner, samples_to_ms
from tests.skipping import skip_without
from tests.sound import decode

RATES = (8000, 16000, 22050, 24000, 44100, 48000)
FORMATS: tuple[AudioFormat, ...] = ("mp3", "opus", "wav", "pcm")
ENCODED: tuple[AudioFormat, ...] = ("mp3", "opus")
KBPS = 64
FREQUENCY = 330
AMPLITUDE = 9000
WAV_HEADER_BYTES = 44
PRE_SKIP = 312
UNKNOWN_SIZES = (0, 0x7FFFFFFF, 0xFFFFFFFF)
GIB = 1 << 30
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


def tone(samples: int, rate: int, *, frequency: float = FREQUENCY) -> bytes:
    """A sine that begins at zero."""
    step = 2 * math.pi * frequency / rate
    return array("h", (round(AMPLITUDE * math.sin(i * step)) for i in range(samples))).tobytes()


def voice(seconds: float, rate: int) -> bytes:
    """Many harmonics, as in a vowel, with pauses."""
    step = 2 * math.pi * 120 / rate
    beat = [sum(math.sin(k * i * step) / k for k in range(1, 12)) for i in range(rate // 10)]
    period = array("h", (round(6000 * each) for each in beat)).tobytes()
    return ((period * 4 + bytes(len(period))) * math.ceil(seconds * 2))[: round(seconds * rate) * 2]


def cut(content: bytes, pieces: int, *, seed: int = 1) -> list[bytes]:
    """So many pieces, at any byte, some of them in the middle of a sample."""
    cuts = sorted(random.Random(seed).sample(range(1, len(content)), pieces - 1))
    return [content[start:end] for start, end in pairwise([0, *cuts, len(content)])]


def join(format: AudioFormat, rate: int, *pieces: bytes, kbps: int = KBPS) -> bytes:
    """The whole file; what `finish` says of its length is checked on the way."""
    target = io.BytesIO()
    joiner = Joiner(target, format, rate, kbps)
    for piece in pieces:
        joiner.add(piece)
    samples = sum(map(len, pieces)) // 2
    assert joiner.samples_joined == samples
    assert joiner.finish() == round(samples * 1000 / rate)
    return target.getvalue()


def lengths(samples: int, rate: int, rate_out: int) -> int:
    """How many samples there are at another rate."""
    return math.ceil(samples * rate_out / rate)


def noise_to_signal(heard: "array[int]", truth: "array[int]") -> float:
    """The energy of the difference against that of the truth."""
    error = sum((a - b) ** 2 for a, b in zip(heard, truth, strict=True))
    return error / sum(b * b for b in truth)


# ---- The length, to the sample


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("format", FORMATS)
def test_a_joined_file_holds_exactly_what_went_in(format: AudioFormat, rate: int) -> None:
    samples = rate * 3 // 5 + 17

    heard, heard_rate = decode(join(format, rate, *cut(tone(samples, rate), 3)), format, rate)

    assert heard_rate == (48000 if format == "opus" else rate)
    truth = array("h", tone(lengths(samples, rate, heard_rate), heard_rate))
    assert len(heard) == len(truth)
    if format in ENCODED:
        assert noise_to_signal(heard, truth) < 0.02
    else:
        assert heard == truth


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("format", ENCODED)
def test_ffmpeg_hears_sixty_segments_without_a_warning(format: AudioFormat, rate: int, tmp_path: Path) -> None:
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        skip_without("ffmpeg in PATH")
    samples = rate * 3 + 1
    file = tmp_path / "joined"
    file.write_bytes(join(format, rate, *cut(voice(3.1, rate)[: samples * 2], 60)))

    heard = subprocess.run([ffmpeg, "-v", "warning", "-i", file, "-f", "s16le", "-"], capture_output=True, check=True)

    assert heard.stderr == b""
    assert len(heard.stdout) == 2 * lengths(samples, rate, 48000 if format == "opus" else rate)


@pytest.mark.parametrize("rate", [24000, 48000])
def test_the_padding_of_mp3_is_declared_wherever_the_last_frame_ends(rate: int) -> None:
    frame = 576 if rate == 24000 else 1152
    for samples in range(3 * frame, 4 * frame, 23):
        heard, _ = decode(join("mp3", rate, tone(samples, rate)), "mp3", rate)
        assert len(heard) == samples


def test_the_end_of_mp3_is_there_where_the_last_frame_would_be_padding_alone() -> None:
    samples = 4608 - 1105 - 20  # with the encoder's delay, twenty samples short of whole frames
    heard, _ = decode(join("mp3", 24000, tone(samples, 24000)), "mp3", 24000)
    truth = array("h", tone(samples, 24000))
    assert noise_to_signal(heard[-100:], truth[-100:]) < 0.05


@pytest.mark.parametrize("rate", RATES)
def test_the_length_of_opus_is_declared_by_granules(rate: int) -> None:
    samples = rate + 11
    file = join("opus", rate, tone(samples, rate))

    head, last = file.index(b"OpusHead"), file.rindex(b"OggS")
    (pre_skip,) = struct.unpack_from("<H", file, head + 10)
    flags, granule = struct.unpack_from("<Bq", file, last + 5)
    assert pre_skip == PRE_SKIP
    assert granule - pre_skip == lengths(samples, rate, 48000)
    assert flags & 4  # the end of the stream


@pytest.mark.parametrize("samples", [1, 7, 16, 400])
@pytest.mark.parametrize("rate", [22050, 48000])
def test_opus_of_a_blink_has_its_length(rate: int, samples: int) -> None:
    file = join("opus", rate, tone(samples, rate))
    (granule,) = struct.unpack_from("<q", file, file.rindex(b"OggS") + 6)
    assert granule - PRE_SKIP == lengths(samples, rate, 48000)


@pytest.mark.parametrize("rate", [22050, 44100])
def test_the_end_of_resampled_opus_is_not_silent(rate: int) -> None:
    heard, _ = decode(join("opus", rate, tone(rate // 2, rate, frequency=330.5), kbps=128), "opus", rate)
    truth = array("h", tone(24000, 48000, frequency=330.5))
    assert noise_to_signal(heard[-24:], truth[-24:]) < 0.3


def test_samples_are_rounded_to_milliseconds() -> None:
    assert [samples_to_ms(*each) for each in [(0, 8000), (11, 8000), (13, 8000), (22050, 22050)]] == [0, 1, 2, 1000]


# ---- Seams


@pytest.mark.parametrize("rate", [8000, 22050, 24000])
@pytest.mark.parametrize("format", FORMATS)
def test_it_does_not_matter_where_the_pieces_were_cut(format: AudioFormat, rate: int) -> None:
    content = voice(2.5, rate)
    whole, _ = decode(join(format, rate, content), format, rate)
    pieces, _ = decode(join(format, rate, *cut(content, 200)), format, rate)
    assert pieces == whole


@pytest.mark.parametrize("rate", [22050, 24000])
@pytest.mark.parametrize("format", ENCODED)
def test_no_click_is_heard_at_the_seams(format: AudioFormat, rate: int) -> None:
    pieces = cut(tone(rate * 2, rate), 20)
    heard, heard_rate = decode(join(format, rate, *pieces, kbps=96), format, rate)
    truth = array("h", tone(len(heard), heard_rate))
    errors = [abs(a - b) for a, b in zip(heard, truth, strict=True)]

    edge = heard_rate // 50
    seams = [round(each / 2 * heard_rate / rate) for each in list(accumulate(map(len, pieces)))[:-1]]
    inner = [seam for seam in seams if 4 * edge < seam < len(errors) - 4 * edge]
    near = {i for seam in inner for i in range(seam - edge // 4, seam + edge // 4)}
    at_seams = max(errors[i] for i in near)
    elsewhere = max(errors[i] for i in range(4 * edge, len(errors) - 4 * edge) if i not in near)
    assert len(inner) > 10
    assert at_seams <= 1.2 * elsewhere
    assert elsewhere < AMPLITUDE / 10


# ---- What the files are


@pytest.mark.parametrize("rate", RATES)
def test_wav_is_what_python_would_write(rate: int) -> None:
    content = tone(1000, rate)
    expected = io.BytesIO()
    with wave.open(expected, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(content)

    assert join("wav", rate, *cut(content, 5)) == expected.getvalue()


class Void(io.BytesIO):
    """Keeps what is written at the very beginning only, however much it is."""

    position = 0

    def write(self, content: Any, /) -> int:
        if self.position == 0:
            super().seek(0)
            super().write(content)
        self.position += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self.position = offset if whence == io.SEEK_SET else self.position
        return self.position


def test_wav_beyond_32_bits_gets_the_largest_size() -> None:
    target = Void()
    joiner = Joiner(target, "wav", 48000, KBPS)
    block = bytes(GIB // 16)
    for _ in range(65):
        joiner.add(block)

    assert joiner.finish() == round(65 * GIB / 16 / 2 / 48)
    header = target.getvalue()
    assert len(header) == WAV_HEADER_BYTES
    assert header[4:8] == header[40:44] == b"\xff\xff\xff\xff"


@pytest.mark.parametrize(
    ("rate", "asked", "expected"),
    [
        (8000, 1, 8),
        (8000, 30, 32),
        (8000, 128, 64),
        (16000, 8, 8),
        (22050, 100, 96),
        (24000, 320, 160),
        (24000, 150, 144),
        (44100, 16, 32),
        (48000, 500, 320),
        (48000, 128, 128),
    ],
)
def test_mp3_has_one_bit_rate_that_exists(rate: int, asked: int, expected: int) -> None:
    file = join("mp3", rate, voice(1, rate), kbps=asked)

    assert b"Info" in file[:40]
    assert not file.startswith(b"ID3")
    with av.open(io.BytesIO(file), "r", format="mp3") as container:
        sizes = [packet.size for packet in container.demux(audio=0) if packet.size]
    exact = expected * 1000 / 8 * (1152 if rate > 24000 else 576) / rate
    assert all(abs(size - exact) < 1 for size in sizes)


@pytest.mark.parametrize(("rate", "kbps"), [(8000, 32), (24000, 64), (48000, 64), (48000, 128)])
def test_opus_keeps_around_its_bit_rate(rate: int, kbps: int) -> None:
    seconds = 3
    assert len(join("opus", rate, voice(seconds, rate), kbps=kbps)) * 8 / seconds < kbps * 1000 * 1.2


@pytest.mark.parametrize("kbps", [0, 1000])
def test_opus_takes_the_nearest_bit_rate_that_it_can(kbps: int) -> None:
    assert measure_duration_ms(io.BytesIO(join("opus", 48000, tone(48000, 48000), kbps=kbps)), "opus", 0) > 990


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_joined_is_a_file_without_sound(format: AudioFormat) -> None:
    file = join(format, 22050, b"", b"\x01")

    starts: dict[AudioFormat, bytes] = {"mp3": b"\xff", "opus": b"OggS", "wav": b"RIFF", "pcm": b""}
    assert file.startswith(starts[format])
    if format == "wav":
        with wave.open(io.BytesIO(file)) as opened:
            assert opened.getnframes() == 0
    with pytest.raises(InvalidAudio):
        measure_duration_ms(io.BytesIO(file), format, 22050)


# ---- Resources and trouble


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("format", ENCODED)
def test_much_at_once_is_encoded_bit_by_bit(format: AudioFormat, tmp_path: Path) -> None:
    content = tone(1000, 8000) * 1500
    with (tmp_path / "joined").open("w+b") as target:
        joiner = Joiner(target, format, 8000, 8)
        joiner.add(content[:80_000])
        before = resident_bytes()
        tracemalloc.start()
        joiner.add(content)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert joiner.finish() == round((len(content) + 80_000) / 16)

    assert peak < 300_000
    assert resident_bytes() - before < len(content) / 2


@pytest.mark.parametrize("format", ENCODED)
def test_abandoned_files_leave_nothing_behind(format: AudioFormat) -> None:
    content = tone(4000, 22050)

    def abandon(times: int) -> None:
        for _ in range(times):
            joiner = Joiner(io.BytesIO(), format, 22050, KBPS)
            joiner.add(content)
            joiner.close()

    abandon(20)
    before = resident_bytes()
    abandon(100)
    assert resident_bytes() - before < 8_000_000


@pytest.mark.parametrize("format", FORMATS)
def test_closing_leaves_the_target_alone(format: AudioFormat) -> None:
    target = io.BytesIO()
    joiner = Joiner(target, format, 24000, KBPS)
    joiner.add(tone(24000, 24000))
    before = target.getvalue()

    joiner.close()
    joiner.close()

    assert target.getvalue() == before
    for use in (lambda: joiner.add(b"\0\0"), joiner.finish):
        with pytest.raises(ValueError, match="closed"):
            use()


@pytest.mark.parametrize("format", FORMATS)
def test_a_target_that_is_gone_is_no_trouble_to_close(format: AudioFormat, tmp_path: Path) -> None:
    with (tmp_path / "joined").open("w+b") as target:
        joiner = Joiner(target, format, 24000, KBPS)
        joiner.add(tone(24000, 24000))
    joiner.close()


@pytest.mark.parametrize("format", FORMATS)
def test_the_target_stays_open_and_complete(format: AudioFormat, tmp_path: Path) -> None:
    path = tmp_path / "joined"
    with path.open("w+b") as target:
        joiner = Joiner(target, format, 24000, KBPS)
        joiner.add(tone(24000, 24000))
        joiner.finish()
        joiner.close()

        assert not target.closed
        assert len(decode(path.read_bytes(), format, 24000)[0]) in (24000, 48000)


class Full(io.BytesIO):
    """A disk with little space left."""

    def write(self, content: Any, /) -> int:
        if self.tell() + len(content) > 3000:
            raise OSError(28, "No space left on device")
        return super().write(content)


@pytest.mark.parametrize("seconds", [0.7, 20])
@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_told_to_the_caller_and_to_nobody_else(
    format: AudioFormat, seconds: float, capfd: pytest.CaptureFixture[str]
) -> None:
    joiner = Joiner(Full(), format, 8000, KBPS)

    with pytest.raises(OSError, match="No space left"):
        joiner.add(tone(round(8000 * seconds), 8000))
        joiner.finish()
    joiner.close()

    assert len(decode(join("mp3", 8000, tone(8000, 8000)), "mp3", 8000)[0]) == 8000
    assert capfd.readouterr() == ("", "")


# ---- In a browser


@pytest.fixture
def page() -> Iterator[Page]:
    """An empty page in Debian's Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        skip_without("chromium in PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        page = browser.new_page()
        page.set_default_timeout(15_000)
        yield page
        browser.close()


LISTEN = """
async ([content, type, rate]) => {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    const audio = new Audio(URL.createObjectURL(new Blob([bytes], {type})));
    const wait = (event) => new Promise((resolve, reject) => {
        audio.addEventListener(event, resolve, {once: true});
        audio.addEventListener("error", () => reject(new Error(audio.error.message)), {once: true});
    });
    await wait("loadedmetadata");
    audio.currentTime = audio.duration / 2;
    await wait("seeked");
    const decoded = await new OfflineAudioContext(1, 1, rate).decodeAudioData(bytes.buffer);
    return [audio.duration, audio.currentTime, audio.readyState, decoded.length];
}
"""


def test_a_browser_knows_the_length_and_finds_the_middle(page: Page) -> None:
    rate, seconds = 24000, 5.5
    content = voice(seconds, rate)
    formats: tuple[AudioFormat, ...] = ("mp3", "wav", "opus")
    for format in formats:
        joined = join(format, rate, *cut(content, 20))

        duration, middle, state, decoded = page.evaluate(
            LISTEN, [base64.b64encode(joined).decode(), CONTENT_TYPES[format], rate]
        )

        # Chromium counts the pre-skip of Opus, which it does not play.
        shown = seconds + PRE_SKIP / 48000 if format == "opus" else seconds
        assert duration == pytest.approx(shown, abs=0.0001), format
        assert middle == pytest.approx(duration / 2, abs=0.001), format
        assert state >= 2, format
        assert decoded == pytest.approx(seconds * rate, abs=2), format
