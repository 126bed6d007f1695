"""Audio of up to ten megabytes that is made to cost time or memory: judged within bounds, beside the event loop."""

import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from tests.servers import PROJECT
from tests.test_recordings import MADE, MIB, chunk, syncsafe, tag

LARGEST = 10 * MIB
MEMORY_BYTES = 96 * MIB
# The real limit takes longer than a test should.
PROBE_SECONDS = 0.7
SLACK_SECONDS = 8.0


def filled(beginning: bytes, piece: bytes, size: int = LARGEST) -> bytes:
    """A file of `size` bytes that says the same over and over."""
    return (beginning + piece * (size // len(piece)))[:size]


# ---- FLAC


def flac_block(kind: int, content: bytes, size: int | None = None, *, is_last: bool = False) -> bytes:
    return bytes([is_last << 7 | kind]) + (len(content) if size is None else size).to_bytes(3) + content


def stream_info(samples: int) -> bytes:
    facts = (44100 << 44 | 1 << 41 | 15 << 36 | samples).to_bytes(8)
    return flac_block(0, struct.pack(">HH", 16, 65535) + bytes(6) + facts + bytes(16))


def silent_frame(number: int) -> bytes:
    """65535 samples of silence in 16 bytes; the sums are right."""
    head = b"\xff\xf8\x79\x18" + bytes([number & 0x7F]) + struct.pack(">H", 65534)
    frame = head + bytes([crc(head, 8, 0x07)]) + b"\0\0\0" * 2
    return frame + crc(frame, 16, 0x8005).to_bytes(2)


def crc(content: bytes, width: int, polynomial: int) -> int:
    value = 0
    for byte in content:
        value ^= byte << (width - 8)
        for _ in range(8):
            value = (value << 1 ^ (polynomial if value >> (width - 1) else 0)) & ((1 << width) - 1)
    return value


# ---- Ogg and Matroska


def ogg_page(content: bytes, serial: int, *, flags: int = 0, number: int = 0, granule: int = 0) -> bytes:
    lacing = bytes([255] * (len(content) // 255) + [len(content) % 255])
    head = b"OggS\0" + struct.pack("<BqIII", flags, granule, serial, number, 0) + bytes([len(lacing)]) + lacing
    page = head + content
    return page[:22] + crc(page, 32, 0x04C11DB7).to_bytes(4, "little") + page[26:]


def element(name: str, content: bytes, size: int | None = None) -> bytes:
    """An element of EBML, its size in eight bytes."""
    return bytes.fromhex(name) + (1 << 56 | (len(content) if size is None else size)).to_bytes(8) + content


def matroska(tracks: bytes, *rest: bytes) -> bytes:
    head = element("1a45dfa3", element("4282", b"matroska"))
    return head + element("18538067", element("1654ae6b", tracks) + b"".join(rest))


def track(number: int = 1, *more: bytes, codec: bytes = b"A_PCM/INT/LIT") -> bytes:
    audio = element("e1", element("b5", struct.pack(">d", 8000)) + element("9f", b"\1") + element("6264", b"\x10"))
    facts = element("d7", bytes([number & 0x7F])) + element("73c5", number.to_bytes(4)) + element("83", b"\2")
    return element("ae", facts + element("86", codec) + audio + b"".join(more))


ZLIB = element("6d80", element("6240", element("5034", element("4254", b"\0"))))


def cluster(*blocks: bytes) -> bytes:
    content = b"".join(element("a3", b"\x81\0\0\x80" + block) for block in blocks)
    return element("1f43b675", element("e7", b"\0") + content)


# ---- All of them


def hostile() -> Iterator[tuple[str, bytes]]:
    end = flac_block(1, b"", is_last=True)
    yield "flac: hours of silence", filled(b"fLaC" + stream_info(2**36 - 1) + end, silent_frame(1))
    yield "flac: claims", b"fLaC" + stream_info(2**36 - 1) + flac_block(3, b"", 0xFFFFFF, is_last=True)
    yield (
        "flac: a large picture",
        b"fLaC" + stream_info(0) + flac_block(6, struct.pack(">II", 3, 0xFFFFFFF0) + bytes(100)),
    )
    yield "flac: empty blocks", filled(b"fLaC" + stream_info(0), flac_block(1, b""))
    yield "flac: seek points", b"fLaC" + stream_info(1) + flac_block(3, bytes(10_000_000)) + end
    opus = b"OpusHead\1\2" + bytes(9)
    yield "ogg: many streams", b"".join(ogg_page(opus, serial, flags=2) for serial in range(5000))
    yield "ogg: empty pages", filled(ogg_page(opus, 1, flags=2), ogg_page(b"", 1, number=2))
    yield "ogg: ends of time", ogg_page(opus, 1, flags=2) + ogg_page(b"\xff" * 600, 1, granule=2**63 - 1, flags=4)
    yield (
        "ogg: long comments",
        filled(ogg_page(opus, 1, flags=2), ogg_page(b"OpusTags" + b"\xff" * 60_000, 1, number=1)),
    )
    yield "ogg: claims", filled(b"", b"OggS\0\0" + bytes(20) + b"\xff" + b"\xff" * 255)
    yield "mkv: many tracks", matroska(b"".join(map(track, range(50_000))), cluster(bytes(160)))
    yield "mkv: large private data", matroska(track(1, element("63a2", b"", 2**50)))
    yield "mkv: private data", matroska(track(1, element("63a2", bytes(9 * MIB)), codec=b"A_VORBIS"))
    yield "mkv: never-ending", matroska(track(), filled(b"", element("ec", b"")))
    yield "mkv: nested", matroska(track(), bytes.fromhex("1254c367") * 500_000)
    yield "mkv: tags", matroska(track(), element("1254c367", element("7373", element("67c8", b"")) * 200_000))
    yield "mkv: cues", matroska(track(), element("1c53bb6b", element("bb", element("b3", b"\1")) * 300_000))
    packed = zlib.compress(bytes(9_000_000), 9)
    yield "mkv: deflated", matroska(track(1, ZLIB), *[cluster(packed)] * (LARGEST // len(packed) - 1))
    yield "mkv: attachments", matroska(track(), element("1941a469", element("61a7", b"") * 500_000))
    mp3 = MADE["mp3"].content()
    yield "mp3: a large tag", b"ID3\4\0\0\x7f\x7f\x7f\x7f" + mp3
    yield "mp3: only tags", filled(b"", b"ID3\4\0\0" + syncsafe(10) + bytes(10))
    yield "mp3: a picture", tag(b"APIC" + syncsafe(9 * MIB) + bytes(2 + 9 * MIB)) + mp3
    yield "mp3: hours", filled(b"", b"\xff\xf3\x14\xc4" + bytes(20))
    yield "mp3: beginnings", filled(b"", b"\xff\xfb\x90\x64")
    yield "aac: beginnings", filled(b"", b"\xff\xf1\x50\x80\x01\x1f\xfc\x00\x00")
    yield "amr: hours", filled(b"#!AMR\n", b"\x7c")
    index = b"".join(struct.pack("<4sIII", b"00wb", 16, 4, 1) for _ in range(400_000))
    streams = chunk(b"strl", chunk(b"strh", b"auds" + bytes(52)) + chunk(b"strf", bytes(18)))
    yield (
        "avi: an index",
        chunk(b"RIFF", b"AVI " + chunk(b"LIST", b"hdrl" + streams) + chunk(b"LIST", b"movi") + chunk(b"idx1", index)),
    )
    yield (
        "avi: many streams",
        chunk(b"RIFF", b"AVI " + chunk(b"LIST", b"hdrl" + chunk(b"strh", b"auds" + bytes(52)) * 100_000)),
    )
    yield "avi: lists", filled(b"RIFF\xff\xff\xff\xffAVI ", b"LIST\0\0\0\0")
    yield "wav: chunks", filled(b"RIFF\xff\xff\xff\xffWAVE", b"LIST\0\0\0\0")
    yield "wav: a large form", b"RIFF\xff\xff\xff\xffWAVEfmt \xf0\xff\xff\xff" + bytes(1000)
    yield (
        "flv: nested",
        filled(b"FLV\1\5\0\0\0\x09\0\0\0\0\x12\xff\xff\xff" + bytes(7) + b"\2\0\nonMetaData", b"\3\0\1a"),
    )
    yield "flv: tags", filled(b"FLV\1\5\0\0\0\x09\0\0\0\0", b"\x08\0\0\0" + bytes(7) + b"\0\0\0\x0b")
    asf = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
    yield "asf: claims", asf + struct.pack("<QI", 2**62, 2**31) + b"\1\2" + bytes(1000)
    yield "asf: objects", filled(asf + struct.pack("<QI", 2**40, 2**31) + b"\1\2", bytes(16) + struct.pack("<Q", 24))
    yield "aiff: chunks", filled(b"FORM\x7f\xff\xff\xffAIFF", b"ANNO\0\0\0\0")
    yield "aiff: claims", b"FORM\x7f\xff\xff\xffAIFFCOMM\x7f\xff\xff\xff" + bytes(1000)
    yield (
        "ts: many programs",
        b"".join(b"G" + struct.pack(">H", 0x4000 | n % 8192) + b"\x10" + bytes(184) for n in range(50_000)),
    )
    yield "ps: packs", filled(b"", b"\0\0\x01\xba" + bytes(10) + b"\0\0\x01\xc0\0\x08" + bytes(8))


# Each in a process of its own, forked where everything is imported already, with another thread that wants to work.
CHILDREN = """
import json, os, sys, threading, time
from app import recordings
from app.errors import AppError


def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def judge(path):
    if "aac" not in path:  # which takes its memory bit by bit
        recordings.PROBE_SECONDS = float(sys.argv[2])
    gaps, done = [0.0], threading.Event()
    def live():
        last = time.monotonic()
        while not done.is_set():
            time.sleep(0.005)
            now = time.monotonic()
            gaps.append(now - last)
            last = now
    other = threading.Thread(target=live)
    other.start()
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    begun, said = time.monotonic(), ""
    with open(path, "rb") as source:
        try:
            recordings.probe(source, containers=recordings.RECOGNIZABLE)
        except AppError as error:
            said = error.code
    seconds = time.monotonic() - begun
    done.set()
    other.join()
    return said, seconds, status("VmHWM") - before, max(gaps)

for path in sorted(os.listdir(sys.argv[1])):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, json.dumps(judge(os.path.join(sys.argv[1], path))).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    print(json.dumps([path, json.loads(answer) if answer else None]))
"""


def test_hostile_files_take_little_memory_and_time(tmp_path: Path) -> None:
    for name, content in hostile():
        assert len(content) <= LARGEST + MIB
        (tmp_path / name).write_bytes(content)
    ran = subprocess.run(
        [sys.executable, "-c", CHILDREN, tmp_path, str(PROBE_SECONDS)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    judged = dict(map(json.loads, ran.stdout.splitlines()))

    assert None not in judged.values(), "a process crashed"
    assert {error for error, *_ in judged.values()} == {"", "INVALID_AUDIO"}
    assert {name: taken for name, (_, *taken) in judged.items() if taken[0] > PROBE_SECONDS + SLACK_SECONDS} == {}
    assert {name: taken for name, (_, *taken) in judged.items() if taken[1] > MEMORY_BYTES} == {}
    assert {name: taken for name, (_, *taken) in judged.items() if taken[2] > SLACK_SECONDS} == {}
