"""Chained streams, really decoded: one stream of everything that was spoken, in order, whatever the pieces were."""

import io
import math
import random
import shutil
import struct
import subprocess
import tracemalloc
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import av
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.audio import AudioFormat
from app.chaining import Chain, create_chain
from tests.skipping import skip_without
from tests.sound import decode

FORMATS: tuple[AudioFormat, ...] = ("pcm", "wav", "mp3", "opus")
LENGTHS = (0.61, 0.47, 0.333)
FREQUENCIES = (330, 660, 990)
SEAM_SECONDS = 0.03
BEGINS, ENDS = 2, 4
NO_GRANULE = 0xFFFFFFFFFFFFFFFF
PACKET = 960
MAX_PAGE = 65_307
UNKNOWN_SIZE = 0xFFFFFFFF
MIRROR = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
PLAIN = (("write_xing", "0"), ("id3v2_version", "0"))
TAGGED = (("write_xing", "0"), ("id3v2_version", "3"))
XING = (("write_xing", "1"), ("id3v2_version", "0"))
XING_AND_TAG = (("write_xing", "1"), ("id3v2_version", "4"))
SHORT_PAGES = (("page_duration", "100000"),)
LONG_PAGES = (("page_duration", "1000000"),)

Options = tuple[tuple[str, str], ...]


# ---- Streams as the provider sends them


@cache
def stream(
    format: AudioFormat,
    rate: int = 24000,
    part: int = 0,
    options: Options = (),
    *,
    codec_options: Options = (),
    kbps: int = 64,
    layout: str = "mono",
    comment: str = "",
) -> bytes:
    """A tone as a complete stream; each part has a length and a frequency of its own."""
    count, step = round(rate * LENGTHS[part]), 2 * math.pi * FREQUENCIES[part] / rate
    samples = array("h", (round(9000 * math.sin(i * step)) for i in range(count))).tobytes()
    if format == "pcm":
        return samples
    if format == "wav":
        return wav(samples, rate)
    codec, container_format, sample_format = {
        "mp3": ("libmp3lame", "mp3", "s16p"),
        "opus": ("libopus", "ogg", "s16"),
    }[format]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_format, container_options=dict(options)) as container:
        container.metadata.update({"comment": comment} if comment else {})
        output = container.add_stream(codec, rate=rate, options=dict(codec_options))
        assert isinstance(output, av.AudioStream)
        output.layout = layout
        output.format = sample_format
        output.bit_rate = kbps * 1000
        frame = av.AudioFrame(format="s16", layout="mono", samples=count)
        frame.planes[0].update(samples.ljust(frame.planes[0].buffer_size, b"\0"))
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        for fitting in av.AudioResampler(format=sample_format, layout=layout, rate=rate).resample(frame):
            container.mux(output.encode(fitting))
        container.mux(output.encode(None))
    return buffer.getvalue()


def wav(samples: bytes, rate: int = 24000, *, size: int = UNKNOWN_SIZE, before: bytes = b"") -> bytes:
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, rate * 2, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", size, b"WAVE") + form + before + struct.pack("<4sI", b"data", size) + samples


def parts_of(format: AudioFormat, count: int, rate: int = 24000, options: Options = ()) -> list[bytes]:
    return [stream(format, rate, part, options) for part in range(count)]


def cut(content: bytes, seed: int) -> Iterator[bytes]:
    """Pieces of any size, some of one byte, some of none."""
    yield b""
    sizes, start = random.Random(seed), 0
    while start < len(content):
        size = sizes.choice([0, 1, 2, 7, 150, 900, 8000])
        yield content[start : start + size]
        start += size


def feed(chain: Chain, content: bytes, seed: int = 1) -> bytes:
    return b"".join(map(chain.feed, cut(content, seed)))


def chain_up(format: AudioFormat, parts: Iterable[bytes], seed: int = 1) -> bytes:
    """All that a listener gets."""
    chain, heard = create_chain(format), []
    for part in parts:
        chain.next_stream()
        heard.append(feed(chain, part, seed))
    return b"".join(heard) + chain.end()


class Page(NamedTuple):
    """An Ogg page, as read here and not there."""

    content: bytes
    flags: int
    granule: int
    serial: int
    number: int
    crc: int
    laces: bytes
    body: bytes


def pages_of(content: bytes) -> list[Page]:
    pages, start = [], 0
    while start < len(content):
        capture, _, flags, granule, serial, number, crc, count = struct.unpack_from("<4sBBQIIIB", content, start)
        assert capture == b"OggS"
        laces = content[start + 27 : start + 27 + count]
        end = start + 27 + count + sum(laces)
        body = content[start + 27 + count : end]
        pages.append(Page(content[start:end], flags, granule, serial, number, crc, laces, body))
        start = end
    return pages


def checksum(content: bytes) -> int:
    """The CRC of Ogg by that of zlib: every bit the other way round, and nothing inverted."""
    crc = zlib.crc32(content.translate(MIRROR), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{crc:032b}"[::-1], 2)


def page(flags: int, granule: int, number: int, laces: Sequence[int], body: bytes, serial: int = 77) -> bytes:
    def write(crc: int) -> bytes:
        head = struct.pack("<4sBBQIIIB", b"OggS", 0, flags, granule, serial, number, crc, len(laces))
        return head + bytes(laces) + body

    return write(checksum(write(0)))


def sound_of(content: bytes) -> list[Page]:
    """The pages behind the headers."""
    pages = pages_of(content)
    heads = [index for index, each in enumerate(pages) if each.body.startswith((b"OpusHead", b"OpusTags"))]
    return pages[heads[-1] + 1 :]


def assert_one_logical_stream(content: bytes) -> None:
    pages = pages_of(content)
    assert len({each.serial for each in pages}) == 1
    assert [each.number for each in pages] == list(range(len(pages)))
    assert [bool(each.flags & BEGINS) for each in pages] == [True] + [False] * (len(pages) - 1)
    assert [bool(each.flags & ENDS) for each in pages] == [False] * (len(pages) - 1) + [True]
    assert [each.crc for each in pages] == [
        checksum(each.content[:22] + bytes(4) + each.content[26:]) for each in pages
    ]
    assert content.count(b"OpusHead") == content.count(b"OpusTags") == 1


def loudest(samples: "array[int]", rate: int) -> int:
    """Which of the frequencies is heard."""

    def strength(frequency: int) -> float:
        step = 2 * math.pi * frequency / rate
        real = sum(sample * math.cos(i * step) for i, sample in enumerate(samples))
        imaginary = sum(sample * math.sin(i * step) for i, sample in enumerate(samples))
        return math.hypot(real, imaginary)

    return max(FREQUENCIES, key=strength)


def assert_heard_in_order(content: bytes, format: AudioFormat, parts: list[bytes], rate: int = 24000) -> None:
    heard, heard_rate = decode(content, format, rate)
    lengths = [len(decode(part, format, rate)[0]) for part in parts]
    assert abs(len(heard) - sum(lengths)) <= SEAM_SECONDS * heard_rate * (len(parts) - 1)
    starts = list(accumulate(lengths, initial=0))
    middles = [start + length // 2 for start, length in zip(starts, lengths, strict=False)]
    tones = [loudest(heard[middle : middle + heard_rate // 50], heard_rate) for middle in middles]
    assert tones == list(FREQUENCIES[: len(parts)])


def complaints(content: bytes, format: AudioFormat) -> list[str]:
    """What ffmpeg warns of, but for its guess at the length of an MP3 that does not tell it."""
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        skip_without("ffmpeg in PATH")
    container = "ogg" if format == "opus" else format
    command = [ffmpeg, "-v", "warning", "-f", container, "-i", "-", "-f", "null", "-"]
    said = subprocess.run(command, input=content, capture_output=True, check=True).stderr.decode()
    messages = [line.split("] ", 1)[-1] for line in said.splitlines()]
    return [each for each in messages if "Estimating duration from bitrate" not in each]


# ---- Every format

STREAMS: dict[str, tuple[AudioFormat, Options]] = {
    "pcm": ("pcm", ()),
    "wav": ("wav", ()),
    "mp3": ("mp3", PLAIN),
    "mp3 with ID3": ("mp3", TAGGED),
    "mp3 with ID3 and ID3v1": ("mp3", (*TAGGED, ("write_id3v1", "1"))),
    "mp3 with Xing": ("mp3", XING),
    "opus": ("opus", SHORT_PAGES),
    "opus in one page": ("opus", LONG_PAGES),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", STREAMS)
def test_a_single_stream_passes_byte_for_byte(name: str, seed: int) -> None:
    format, options = STREAMS[name]
    content = stream(format, 24000, 0, options)
    for whole in (content, content[:-777], content + b"x"):
        assert chain_up(format, [whole], seed) == whole
        assert chain_up(format, [b"", whole], seed) == whole


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    ("format", "rate", "options"),
    [
        ("pcm", 24000, ()),
        ("wav", 24000, ()),
        ("mp3", 24000, PLAIN),
        ("mp3", 48000, TAGGED),
        ("opus", 24000, SHORT_PAGES),
        ("opus", 24000, LONG_PAGES),
        ("opus", 48000, SHORT_PAGES),
    ],
)
def test_streams_are_heard_one_after_the_other(format: AudioFormat, rate: int, options: Options, count: int) -> None:
    parts = parts_of(format, count, rate, options)

    chained = chain_up(format, parts, seed=count)

    assert_heard_in_order(chained, format, parts, rate)
    if format in {"mp3", "opus"}:
        assert complaints(chained, format) == []


@pytest.mark.parametrize("name", STREAMS)
def test_it_does_not_matter_where_the_pieces_were_cut(name: str) -> None:
    format, options = STREAMS[name]
    parts = parts_of(format, 3, 24000, options)
    whole = create_chain(format)
    expected = []
    for part in parts:
        whole.next_stream()
        expected.append(whole.feed(part))
    expected.append(whole.end())

    single = create_chain(format)
    heard = b""
    for part in parts:
        single.next_stream()
        heard += b"".join(single.feed(part[i : i + 1]) for i in range(len(part)))

    assert heard + single.end() == b"".join(expected)
    assert chain_up(format, parts, seed=9) == b"".join(expected)


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_without_audio_changes_nothing(name: str) -> None:
    format, options = STREAMS[name]
    first, second = parts_of(format, 2, 24000, options)
    assert chain_up(format, [b"", first, b"", second, b""]) == chain_up(format, [first, second])


# ---- Raw samples and WAV


@pytest.mark.parametrize("format", ["pcm", "wav"])
def test_half_a_sample_at_the_end_of_a_stream_shifts_nothing(format: AudioFormat) -> None:
    first, second = parts_of(format, 2)
    expected = first + stream("pcm", part=1)
    assert chain_up(format, [first + b"\x7f", second]) == expected
    assert chain_up(format, [first, second + b"\x7f"]) == expected + b"\x7f"


@pytest.mark.parametrize("size", [0, 10, 0x7FFFFFFF, UNKNOWN_SIZE])
@pytest.mark.parametrize("before", [b"", struct.pack("<4sI", b"LIST", 5) + b"noise\0", b"JUNK" + bytes(4)])
def test_only_the_samples_of_a_later_wav_follow(size: int, before: bytes) -> None:
    samples = b"datasamples!" * 9
    first = wav(b"data", size=size)
    for seed in range(4):
        assert chain_up("wav", [first, wav(samples, size=size, before=before)], seed) == first + samples


@pytest.mark.parametrize(
    "strange",
    [
        b'{"error": "internal"}.',
        b"RIFX\0\0\0\0WAVEdata" + bytes(40),
        b"RIFF\0\0\0\0AVI LIST" + bytes(90),
        b"RIFF\0\0\0\0WAVEfmt \xff\xff\xff\x7f" + bytes(70_000),
        b"RIFF\0\0\0\0WAVE" + b"tiny\0\0\0\0" * 65 + wav(b"more"),
    ],
)
def test_what_is_no_wav_passes_as_it_is(strange: bytes) -> None:
    first = stream("wav")
    assert chain_up("wav", [first, strange]) == first + strange
    assert chain_up("wav", [strange, wav(b"samples.")]) == strange + b"samples."


# ---- MP3


def tag(size: int, *, footer: bool = False) -> bytes:
    sizes = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\4\0" + (b"\x10" if footer else b"\0") + sizes + b"t" * size + (b"3DI" + bytes(7) if footer else b"")


def frame(header: bytes, size: int, mark: bytes, offset: int) -> bytes:
    return (header + bytes(offset - 4) + mark).ljust(size, b"\0")


@pytest.mark.parametrize("rate", [8000, 24000, 48000])
@pytest.mark.parametrize("layout", ["mono", "stereo"])
@pytest.mark.parametrize("options", [XING, TAGGED, XING_AND_TAG])
def test_later_mp3_loses_its_tag_and_its_telling_frame(rate: int, layout: str, options: Options) -> None:
    first, plain, dressed = (stream("mp3", rate, 1, each, layout=layout) for each in (PLAIN, PLAIN, options))
    assert len(dressed) > len(plain)
    assert chain_up("mp3", [first, dressed, dressed]) == first + plain + plain


@pytest.mark.parametrize(
    "leading",
    [
        tag(0),
        tag(300, footer=True),
        tag(200) + tag(4000),
        tag(60_000) + frame(b"\xff\xf3\x84\xc4", 192, b"Info", 13),
        frame(b"\xff\xf3\x84\xc4", 192, b"VBRI", 36),
        frame(b"\xff\xfb\x92\x00", 418, b"Xing", 36),  # padded
        frame(b"\xff\xf2\x84\xc4", 192, b"Xing", 15),  # with a checksum
    ],
    ids=["empty tag", "footer", "two tags", "tag and Info", "VBRI", "Xing of MPEG 1", "Xing behind a checksum"],
)
def test_whatever_tells_of_a_later_mp3_is_left_out(leading: bytes) -> None:
    first, second = parts_of("mp3", 2, 24000, PLAIN)
    for seed in range(3):
        assert chain_up("mp3", [first, leading + second], seed) == first + second


@pytest.mark.parametrize(
    "leading",
    [
        b'{"error": "internal"}',
        b"ID3\4\0\0\0\0\1\x80" + bytes(300),
        tag(100_000),
        tag(100_000)[:5000],
        frame(b"\xff\xf3\x06\xc4", 192, b"Info", 13),  # a free bit rate
        frame(b"\xff\x93\x84\xc4", 192, b"Info", 13),
        frame(b"\xff\xf3\xf4\xc4", 192, b"Info", 13),
        frame(b"\xff\xf3\x8c\xc4", 192, b"Info", 13),
        frame(b"\xff\xeb\x84\xc4", 192, b"Info", 13),
        frame(b"\xff\xf5\x84\xc4", 192, b"Info", 13),  # layer II
        frame(b"\xff\xf3\x84\xc4", 192, b"Info", 14),
        b"\0" * 20,
    ],
)
def test_what_tells_nothing_stays_in_a_later_mp3(leading: bytes) -> None:
    first, second = parts_of("mp3", 2, 24000, PLAIN)
    assert chain_up("mp3", [first, leading + second]) == first + leading + second


def test_the_shortest_frame_is_sound() -> None:
    first, smallest = stream("mp3", 24000, 0, PLAIN), frame(b"\xff\xf3\x14\xc4", 24, b"...", 13)
    assert chain_up("mp3", [first, smallest]) == first + smallest


def test_a_tag_at_the_end_of_mp3_stays_at_the_end_only() -> None:
    first, second = parts_of("mp3", 2, 24000, PLAIN)
    trailing = b"TAG" + b"t" * 125

    assert chain_up("mp3", [first + trailing, second + trailing, b""]) == first + second
    assert chain_up("mp3", [first + trailing, second + trailing]) == first + second + trailing
    assert chain_up("mp3", [first + trailing[:-1], second]) == first + trailing[:-1] + second
    assert chain_up("mp3", [trailing[:-1], second]) == trailing[:-1] + second


def test_xing_stays_in_the_first_mp3_only() -> None:
    parts = [stream("mp3", 24000, 0, XING_AND_TAG), stream("mp3", 24000, 1, XING_AND_TAG)]

    chained = chain_up("mp3", parts)

    plain = stream("mp3", 24000, 1, PLAIN)
    assert chained == parts[0] + plain
    heard, rate = decode(chained, "mp3", 24000)
    expected = sum(len(decode(each, "mp3", 24000)[0]) for each in (parts[0], plain))
    assert abs(len(heard) - expected) <= SEAM_SECONDS * rate
    assert complaints(chained, "mp3") == complaints(parts[0], "mp3")


# ---- Opus


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("options", [SHORT_PAGES, LONG_PAGES])
def test_chained_opus_is_one_logical_stream(options: Options, count: int) -> None:
    parts = parts_of("opus", count, 24000, options)

    chained = chain_up("opus", parts)

    assert_one_logical_stream(chained)
    first = pages_of(parts[0])
    assert chained.startswith(b"".join(each.content for each in first[:-1]))
    sound = sound_of(chained)
    assert [each.body for each in sound] == [each.body for part in parts for each in sound_of(part)]
    packets = list(accumulate(len(each.laces) - each.laces.count(255) for each in sound))
    assert [each.granule for each in sound[:-1]] == [PACKET * each for each in packets[:-1]]
    cut_off = PACKET - (pages_of(parts[-1])[-1].granule % PACKET)
    assert sound[-1].granule == PACKET * packets[-1] - cut_off


@pytest.mark.parametrize(
    ("duration", "application", "kbps"),
    [(each, "audio", 96) for each in ("2.5", "5", "10", "20", "40", "60")]
    + [(each, "voip", 12) for each in ("10", "20", "40", "60", "120")],
)
def test_opus_packets_of_any_length_are_counted(duration: str, application: str, kbps: int) -> None:
    codec_options = (("frame_duration", duration), ("application", application))
    parts = [stream("opus", 48000, part, SHORT_PAGES, codec_options=codec_options, kbps=kbps) for part in (0, 1)]

    sound = sound_of(chain_up("opus", parts))

    packets = list(accumulate(len(each.laces) - each.laces.count(255) for each in sound))
    assert [each.granule for each in sound[:-1]] == [round(float(duration) * 48) * each for each in packets[:-1]]


PACKETS = [
    (b"", 0),
    (b"\x03", 0),
    (b"\x0b\x42", 2 * 20),
    (b"\x00", 10),
    (b"\x29" + bytes(700), 2 * 20),
    (b"\x5a", 2 * 60),
    (b"\x68", 20),
    (b"\x70", 10),
    (b"\xc3\x87" + bytes(253), 7 * 2.5),
    (b"\xe8", 5),
    (b"\xf3\x01", 10),
    (b"\xf8", 20),
]


def laces_of(packet: bytes) -> list[int]:
    return [255] * (len(packet) // 255) + [len(packet) % 255]


def test_the_first_bytes_of_an_opus_packet_tell_its_length() -> None:
    second = stream("opus", 24000, 1, SHORT_PAGES)
    laces = [lace for packet, _ in PACKETS for lace in laces_of(packet)]
    body = b"".join(packet for packet, _ in PACKETS)
    headers = [page(BEGINS, 0, 0, [8], b"OpusHead"), page(0, 0, 1, [8], b"OpusTags")]

    chained = chain_up("opus", [b"".join(headers) + page(ENDS, 7, 2, laces, body), second])

    whole = sum(round(milliseconds * 48) for _, milliseconds in PACKETS)
    assert sound_of(chained)[0].granule == whole
    assert sound_of(chained)[1].granule == whole + sound_of(second)[0].granule


def test_a_last_page_on_which_no_packet_ends_has_no_granule() -> None:
    first, second = page(ENDS, NO_GRANULE, 0, [255], bytes(255)), stream("opus", 24000, 1, SHORT_PAGES)
    assert pages_of(chain_up("opus", [first, second]))[0].granule == NO_GRANULE


def test_page_numbers_begin_again_after_the_largest() -> None:
    first, second = page(0, 480, 0xFFFFFFFE, [1], b"\0"), stream("opus", 24000, 1, SHORT_PAGES)
    numbers = [each.number for each in pages_of(chain_up("opus", [first, second]))]
    assert numbers[:4] == [0xFFFFFFFE, 0xFFFFFFFF, 0, 1]


def test_the_last_page_of_opus_waits_for_what_comes() -> None:
    first, second = parts_of("opus", 2, 24000, SHORT_PAGES)
    last = pages_of(first)[-1].content
    headers = b"".join(each.content for each in pages_of(second)[:2])
    chain = create_chain("opus")
    chain.next_stream()
    assert feed(chain, first) == first[: -len(last)]
    chain.next_stream()
    assert feed(chain, headers) == b""

    went_on = pages_of(feed(chain, second[len(headers) :]))

    assert went_on[0].body == pages_of(last)[0].body
    assert [each.flags for each in went_on] == [0] * len(went_on)
    assert [each.flags for each in pages_of(chain.end())] == [ENDS]


def test_opus_that_was_to_go_on_and_did_not_is_as_it_was() -> None:
    first, second = parts_of("opus", 2, 24000, SHORT_PAGES)
    for nothing in (b"", second[:30], second[: second.index(b"OpusTags") + 20], first[: first.index(b"OggS", 9)]):
        assert chain_up("opus", [first, nothing]) == first


@pytest.mark.parametrize("lost", [1, 300, 2000])
def test_opus_that_was_cut_off_goes_on_with_the_next(lost: int) -> None:
    first, second = parts_of("opus", 2, 24000, SHORT_PAGES)

    chained = chain_up("opus", [first[:-lost], second])

    assert_one_logical_stream(chained)
    assert complaints(chained, "opus") == []
    assert first.startswith(b"".join(each.content for each in pages_of(chained)[:5]))


def test_an_empty_page_at_the_end_of_opus_leaves_no_gap() -> None:
    first, second = parts_of("opus", 2, 24000, SHORT_PAGES)
    *whole, last = pages_of(first)
    open_end = page(0, PACKET * 32, last.number, last.laces, last.body, last.serial)
    empty = page(ENDS, last.granule, last.number + 1, b"", b"", last.serial)
    ended = b"".join(each.content for each in whole) + open_end + empty

    assert chain_up("opus", [ended]) == ended
    chained = chain_up("opus", [ended, second])

    assert_one_logical_stream(chained)
    assert [each.body for each in sound_of(chained)] == [each.body for each in (*sound_of(first), *sound_of(second))]
    assert complaints(chained, "opus") == []


def in_small_pages(content: bytes, laces: int) -> bytes:
    """The same packets, cut over pages that have so many laces each."""
    head, tags, *sound = pages_of(content)
    sizes = b"".join(each.laces for each in sound)
    body = b"".join(each.body for each in sound)
    made, start, packets = [head.content, tags.content], 0, 0
    for index in range(0, len(sizes), laces):
        here = sizes[index : index + laces]
        ended = len(here) - here.count(255)
        packets += ended
        is_last = index + laces >= len(sizes)
        granule = sound[-1].granule if is_last else PACKET * packets if ended else NO_GRANULE
        goes_on = index and sizes[index - 1] == 255
        flags = (1 if goes_on else 0) | (ENDS if is_last else 0)
        made.append(page(flags, granule, len(made), here, body[start : start + sum(here)], head.serial))
        start += sum(here)
    return b"".join(made)


def test_opus_packets_may_lie_on_several_pages() -> None:
    parts = [in_small_pages(stream("opus", 48000, part, kbps=256), 2) for part in range(3)]
    granules = [each.granule for each in pages_of(parts[0])]
    assert NO_GRANULE in granules

    chained = chain_up("opus", parts)

    assert_one_logical_stream(chained)
    assert_heard_in_order(chained, "opus", parts)
    assert complaints(chained, "opus") == []
    packets = 0
    for each in sound_of(chained)[:-1]:
        packets += len(each.laces) - each.laces.count(255)
        assert each.granule in {PACKET * packets, NO_GRANULE}


def test_comments_of_a_later_opus_stream_may_take_several_pages() -> None:
    first, second = parts_of("opus", 2, 24000, SHORT_PAGES)
    talkative = stream("opus", 24000, 1, SHORT_PAGES, comment="OggS and more " * 9000)
    assert len(talkative) > len(second) + MAX_PAGE
    assert chain_up("opus", [first, talkative]) == chain_up("opus", [first, second])


def test_opus_that_began_in_the_middle_of_time_is_moved() -> None:
    first, second = parts_of("opus", 2, 24000, SHORT_PAGES)
    moved = b"".join(
        page(each.flags, each.granule + 777_777 if each.granule else 0, each.number + 5, each.laces, each.body)
        for each in pages_of(second)
    )
    assert chain_up("opus", [first, moved]) == chain_up("opus", [first, second])


def test_opus_without_headers_or_with_more_channels_follows_all_the_same() -> None:
    first, second = parts_of("opus", 2, 24000, SHORT_PAGES)
    begun, *sound = sound_of(second)
    beginning = page(BEGINS, begun.granule, 0, begun.laces, begun.body)
    headless = beginning + b"".join(each.content for each in sound)
    assert chain_up("opus", [first, headless]) == chain_up("opus", [first, second])

    stereo = stream("opus", 24000, 1, SHORT_PAGES, layout="stereo")
    chained = chain_up("opus", [first, stereo])
    assert_one_logical_stream(chained)
    assert_heard_in_order(chained, "opus", [first, second])


def test_a_stream_of_several_opus_streams_is_one_as_well() -> None:
    first, second, third = parts_of("opus", 3, 24000, SHORT_PAGES)
    assert chain_up("opus", [first, second + third]) == chain_up("opus", [first, second, third])
    assert chain_up("opus", [first + second]) == first + second
    for pages in (SHORT_PAGES, LONG_PAGES):
        second = stream("opus", 24000, 1, pages)
        joined, alone = chain_up("opus", [first + second, third]), chain_up("opus", [second, third])
        assert joined == first + alone


def test_what_is_no_ogg_passes_as_it_is() -> None:
    first, second = parts_of("opus", 2, 24000, SHORT_PAGES)
    error = b'{"error": "OggX"}'
    last = len(pages_of(first)[-1].content)
    assert chain_up("opus", [error, first]) == error + first
    assert chain_up("opus", [first, error]) == first[:-last] + error + first[-last:]
    assert chain_up("opus", [first, second, error]).replace(error, b"") == chain_up("opus", [first, second])


# ---- Trouble

BLOCKS = [
    stream("opus", 24000, 0, SHORT_PAGES)[:900],
    *(each.content for each in pages_of(stream("opus", 24000, 1, SHORT_PAGES))[:3]),
    pages_of(stream("opus", 24000, 1, SHORT_PAGES))[-1].content,
    page(0xFF, 0, 0, b"", b""),
    page(ENDS, NO_GRANULE, 0xFFFFFFFF, [0], b""),
    page(ENDS, 1 << 63, 0, [2], b"\x03\xff"),
    page(0, 5, 0xFFFFFFFF, [255, 255], bytes(510)),
    page(0, 0, 0, [1], b"\x03"),
    b"OggS",
    b"OggS" + b"\xff" * 40,
    stream("mp3", 24000, 0, XING_AND_TAG)[:400],
    stream("mp3", 24000, 0, XING),
    tag(200)[:50],
    b"ID3",
    b"\xff\xfb",
    b"TAG" + bytes(125),
    wav(b"sound"),
    wav(b"")[:20],
    b"RIFF",
]
content = st.lists(st.sampled_from(BLOCKS) | st.binary(max_size=60), max_size=5).map(b"".join)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(FORMATS), st.lists(content, max_size=4), st.integers(0, 9))
def test_nothing_that_comes_is_trouble(format: AudioFormat, parts: list[bytes], seed: int) -> None:
    whole = sum(map(len, parts))
    assert len(chain_up(format, parts, seed)) <= whole
    for part in parts:
        assert chain_up(format, [part], seed) == part


@pytest.mark.parametrize("format", FORMATS)
def test_damage_does_not_stop_the_chain(format: AudioFormat) -> None:
    dice = random.Random(5)
    options = {"mp3": XING_AND_TAG, "opus": SHORT_PAGES}.get(format, ())
    for _ in range(15):
        parts = [bytearray(part) for part in parts_of(format, 3, 24000, options)]
        for part in parts[:2]:
            for _ in range(dice.randrange(40)):
                part[dice.randrange(min(len(part), dice.choice([60, 3000])))] = dice.randrange(256)
        chained = chain_up(format, map(bytes, parts), dice.randrange(99))
        assert chained.endswith(bytes(parts[2][-300:]) if format != "opus" else pages_of(bytes(parts[2]))[-1].body)


@pytest.mark.parametrize(
    ("format", "beginning"),
    [
        ("pcm", b"x"),
        ("wav", b"RIFF\0\0\0\0WAVEfmt \xff\xff\xff\x7f"),
        ("mp3", b"ID3\4\0\0\x7f\x7f\x7f\x7f"),
        ("opus", b"OggS\0\0" + bytes(20) + b"\xff" * 256),
        ("opus", b"OggX"),
    ],
)
def test_little_is_held_in_memory(format: AudioFormat, beginning: bytes) -> None:
    piece = bytes(8000)
    chain = create_chain(format)
    tracemalloc.start()
    passed = 0
    for _ in range(2):
        chain.next_stream()
        passed += len(chain.feed(beginning))
        for _ in range(60):
            passed += len(chain.feed(piece))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 5 * MAX_PAGE
    assert passed > 2 * 60 * len(piece) - 2 * MAX_PAGE
