"""Several encoded streams, one after the other, made one stream while they come. Pure, no settings.

A live utterance may be spoken in several tasks, and each sends a complete stream, header and all. What is heard, and
kept as the file, is to be one stream. Nothing is decoded: the first stream passes byte for byte, later ones lose what
a stream begins with. At most one Ogg page, or the header of one stream, is held in memory.
"""

import struct
from collections.abc import Callable
from typing import NamedTuple, Protocol

from app.audio import CHUNK_HEADER_BYTES, MAX_CHUNKS, PCM_FRAME_BYTES, RIFF_HEADER_BYTES, AudioFormat

MAX_HEADER_BYTES = 64 * 1024


class Chain(Protocol):
    """Takes the pieces of one stream after another, cut anywhere, and gives the pieces of a single one."""

    def next_stream(self) -> None:
        """Another stream begins, also the first."""

    def feed(self, piece: bytes) -> bytes:
        """Give what is to be passed on now. It may be nothing, or what was held back before."""

    def end(self) -> bytes:
        """Give what was held back: no stream follows."""


def create_chain(format: AudioFormat) -> Chain:
    """What turns out to be of another format passes as it is; nothing that comes makes a chain raise."""
    match format:
        case "pcm":
            return _SampleChain()
        case "wav":
            return _HeadedChain(_start_of_samples, _SampleChain())
        case "mp3":
            return _HeadedChain(_start_of_frames, _FrameChain())
        case "opus":
            return _PageChain()


class _SampleChain:
    """16-bit samples: half of one at the end of a stream would shift all that follow."""

    def __init__(self) -> None:
        self._odd = b""

    def next_stream(self) -> None:
        self._odd = b""

    def feed(self, piece: bytes) -> bytes:
        content = self._odd + piece
        whole = len(content) // PCM_FRAME_BYTES * PCM_FRAME_BYTES
        self._odd = content[whole:]
        return content[:whole]

    def end(self) -> bytes:
        return self._odd


class _HeadedChain:
    """Leaves out what the streams begin with, but for the first one that brings anything.

    `start_of_audio` finds the first byte of audio in the beginning of a stream, or None while more must be seen; a
    stream that ends before has no audio. What remains goes through `audio`.
    """

    def __init__(self, start_of_audio: Callable[[bytes], int | None], audio: Chain) -> None:
        self._start_of_audio = start_of_audio
        self._audio = audio
        self._begun = False
        self._head: bytes | None = None

    def next_stream(self) -> None:
        self._audio.next_stream()
        self._head = b"" if self._begun else None

    def feed(self, piece: bytes) -> bytes:
        self._begun = self._begun or bool(piece)
        if self._head is None:
            return self._audio.feed(piece)
        self._head += piece
        start = self._start_of_audio(self._head)
        if start is None:
            if len(self._head) <= MAX_HEADER_BYTES:
                return b""
            start = 0
        audio, self._head = self._head[start:], None
        return self._audio.feed(audio)

    def end(self) -> bytes:
        return self._audio.end()


def _start_of_samples(head: bytes) -> int | None:
    """Walk the chunks of a WAV; the size of the data may be unknown, and counts for nothing."""
    if not (b"RIFF".startswith(head[:4]) and b"WAVE".startswith(head[8:RIFF_HEADER_BYTES])):
        return 0
    offset = RIFF_HEADER_BYTES
    for _ in range(MAX_CHUNKS):
        if offset + CHUNK_HEADER_BYTES > len(head):
            return None
        if head[offset : offset + 4] == b"data":
            return offset + CHUNK_HEADER_BYTES
        size = int.from_bytes(head[offset + 4 : offset + CHUNK_HEADER_BYTES], "little")
        offset += CHUNK_HEADER_BYTES + size + size % 2
    return 0


# ---- MP3

ID3V2_HEADER_BYTES = 10
ID3V2_FOOTER_FLAG = 0x10
ID3V1_BYTES = 128
FRAME_HEADER_BYTES = 4
VBRI_OFFSET = FRAME_HEADER_BYTES + 32
MPEG1, LAYER_3, MONO, UNKNOWN_RATE = 3, 1, 3, 3
_KBPS_MPEG1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0)
_KBPS_MPEG2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0)
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
"""Sample rates of MPEG 1, 2 and 2.5 by the number that a frame header has for these. A bit rate of 0 is not known."""


class _FrameChain:
    """MP3 frames: an ID3v1 tag, the last 128 bytes of a stream, stays only where nothing follows."""

    def __init__(self) -> None:
        self._tail = b""

    def next_stream(self) -> None:
        if len(self._tail) == ID3V1_BYTES and self._tail.startswith(b"TAG"):
            self._tail = b""

    def feed(self, piece: bytes) -> bytes:
        content = self._tail + piece
        passed = max(0, len(content) - ID3V1_BYTES)
        self._tail = content[passed:]
        return content[:passed]

    def end(self) -> bytes:
        return self._tail


def _start_of_frames(head: bytes) -> int | None:
    """Where the sound begins in an MP3 stream: behind ID3v2 tags, and a frame that only tells of the stream.

    A tag that is longer than a header may be is taken for no tag.
    """
    start = 0
    while b"ID3".startswith(head[start : start + 3]):
        tag = head[start : start + ID3V2_HEADER_BYTES]
        if len(tag) < ID3V2_HEADER_BYTES:
            return None
        if max(tag[6:]) > 0x7F:
            return start
        size = sum(byte << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
        end = start + ID3V2_HEADER_BYTES + size + (ID3V2_HEADER_BYTES if tag[5] & ID3V2_FOOTER_FLAG else 0)
        if end > MAX_HEADER_BYTES:
            return start
        start = end
    return _skip_telling_frame(head, start)


def _skip_telling_frame(head: bytes, start: int) -> int | None:
    header = head[start : start + FRAME_HEADER_BYTES]
    if len(header) < FRAME_HEADER_BYTES:
        return None
    version, size = header[1] >> 3 & 3, _frame_bytes(header)
    if not size:
        return start
    if len(head) < start + min(size, VBRI_OFFSET + 4):
        return None
    side_info = (17 if version == MPEG1 else 9) if header[3] >> 6 == MONO else (32 if version == MPEG1 else 17)
    checksum_bytes = 0 if header[1] & 1 else 2
    xing = start + FRAME_HEADER_BYTES + checksum_bytes + side_info
    if head[xing : xing + 4] not in (b"Xing", b"Info") and not head.startswith(b"VBRI", start + VBRI_OFFSET):
        return start
    return start + size if len(head) >= start + size else None


def _frame_bytes(header: bytes) -> int:
    """The length of a layer III frame; 0 where this is no such header, or one of a free bit rate."""
    version, layer, rate_index = header[1] >> 3 & 3, header[1] >> 1 & 3, header[2] >> 2 & 3
    if header[:2] < b"\xff\xe0" or layer != LAYER_3 or version not in _RATES or rate_index == UNKNOWN_RATE:
        return 0
    kbps = (_KBPS_MPEG1 if version == MPEG1 else _KBPS_MPEG2)[header[2] >> 4]
    unpadded = (144_000 if version == MPEG1 else 72_000) * kbps // _RATES[version][rate_index]
    return unpadded + (header[2] >> 1 & 1) if kbps else 0


# ---- Opus in Ogg

CAPTURE = b"OggS"
PAGE_HEADER = struct.Struct("<4sBBQIIIB")
BEGINS, ENDS = 0x02, 0x04
NO_GRANULE = MAX_GRANULE = 0xFFFF_FFFF_FFFF_FFFF
MAX_NUMBER = 0xFFFF_FFFF
CONTINUED_LACE = 255
POLYNOMIAL = 0x04C11DB7
FRAME_SAMPLES = (480, 960, 1920, 2880) * 3 + (480, 960) * 2 + (120, 240, 480, 960) * 4
"""Samples at 48 kHz in a frame, by the configuration in the first byte of an Opus packet: SILK, hybrid, CELT."""


def _table_entry(byte: int) -> int:
    crc = byte << 24
    for _ in range(8):
        crc = (crc << 1 ^ (POLYNOMIAL if crc & 0x8000_0000 else 0)) & 0xFFFF_FFFF
    return crc


_CRC_TABLE = tuple(map(_table_entry, range(256)))


def _checksum(content: bytes) -> int:
    """CRC-32 as Ogg has it: not reflected, and begun with zero, so that zlib's is another."""
    crc = 0
    for byte in content:
        crc = (crc << 8 & 0xFFFF_FFFF) ^ _CRC_TABLE[crc >> 24 ^ byte]
    return crc


class _Page(NamedTuple):
    """One Ogg page; `granule` is the number of samples up to the end of the last packet that ends in it."""

    flags: int
    granule: int
    serial: int
    number: int
    lacing: bytes
    body: bytes

    @classmethod
    def read(cls, content: bytes) -> "_Page":
        """Take a whole page apart."""
        _, _, flags, granule, serial, number, _, laces = PAGE_HEADER.unpack_from(content)
        start = PAGE_HEADER.size + laces
        return cls(flags, granule, serial, number, content[PAGE_HEADER.size : start], content[start:])

    def write(self) -> bytes:
        """The page with a right checksum."""
        fields = (CAPTURE, 0, self.flags, self.granule, self.serial, self.number)
        rest = self.lacing + self.body
        crc = _checksum(PAGE_HEADER.pack(*fields, 0, len(self.lacing)) + rest)
        return PAGE_HEADER.pack(*fields, crc, len(self.lacing)) + rest


def _page_bytes(content: bytes | bytearray) -> int | None:
    """The length of the page that begins here, None while a part of it is missing."""
    if len(content) < PAGE_HEADER.size:
        return None
    body = PAGE_HEADER.size + content[PAGE_HEADER.size - 1]
    size = body + sum(content[PAGE_HEADER.size : body])
    return size if len(content) >= size else None


class _OpusStream:
    """One logical stream while its pages come: first its headers, then its packets."""

    def __init__(self, shift: int | None) -> None:
        self.shift = shift
        """What its granules are moved on by: not known before its first packets."""
        self._in_headers, self._header_goes_on = True, False
        self._packet = b""

    def is_header(self, page: _Page) -> bool:
        """Whether a page holds OpusHead or OpusTags, or a part of these."""
        named = page.body.startswith((b"OpusHead", b"OpusTags"))
        self._in_headers = self._in_headers and (named or self._header_goes_on)
        self._header_goes_on = page.lacing.endswith(b"\xff")
        return self._in_headers

    def count_samples(self, page: _Page) -> int:
        """What the packets that end in a page decode to. Every page must come here, in order."""
        samples = offset = 0
        for lace in page.lacing:
            self._packet = (self._packet + page.body[offset : offset + min(lace, 2)])[:2]
            offset += lace
            if lace < CONTINUED_LACE:
                samples += _packet_samples(self._packet)
                self._packet = b""
        return samples


def _packet_samples(packet: bytes) -> int:
    """The length of an Opus packet, which its first two bytes tell."""
    if not packet:
        return 0
    code = packet[0] & 3
    frames = (packet[1] & 0x3F if len(packet) > 1 else 0) if code == 3 else (1, 2, 2)[code]
    return FRAME_SAMPLES[packet[0] >> 3] * frames


class _PageChain:
    """One logical Ogg stream: the pages of later streams take the serial number of the first, and count on from it.

    Inside a stream no packet may be cut, and granules must say what the packets decode to. So the last packet of an
    earlier stream plays to its end, and the pre-skip of a later one is heard: a seam is longer by the two, mostly 7 to
    27 ms of silence, but no sound is lost. A page that ends a stream is held back: whether it is the last is unknown.
    """

    def __init__(self) -> None:
        self._content = bytearray()
        self._is_first = True
        self._has_pages = False
        self._serial = self._number = 0
        self._position = 0  # the samples of all packets until now, in 48,000ths of a second
        self._last_page = b""
        self._stream = _OpusStream(0)

    def next_stream(self) -> None:
        """What is left of a page that was cut off is dropped."""
        self._content.clear()
        self._is_first = not self._has_pages
        self._stream = _OpusStream(0 if self._is_first else None)

    def feed(self, piece: bytes) -> bytes:
        self._content += piece
        passed: list[bytes] = []
        while self._content:
            if strange := self._take(self._start_of_page()):
                passed += self._take_last_page() if self._is_first else b"", strange
            if (size := _page_bytes(self._content)) is None:
                break
            passed.append(self._chain(self._take(size)))
        return b"".join(passed)

    def end(self) -> bytes:
        """A page that was cut off is passed on only where it comes from the first stream."""
        return self._take_last_page() + (bytes(self._content) if self._is_first else b"")

    def _take(self, size: int) -> bytes:
        taken = bytes(self._content[:size])
        del self._content[:size]
        return taken

    def _take_last_page(self) -> bytes:
        taken, self._last_page = self._last_page, b""
        return taken

    def _start_of_page(self) -> int:
        """Where the next page begins, or may begin with the last bytes that are there."""
        found = self._content.find(CAPTURE)
        begun = next(size for size in (3, 2, 1, 0) if self._content.endswith(CAPTURE[:size]))
        return found if found >= 0 else len(self._content) - begun

    def _chain(self, content: bytes) -> bytes:
        self._has_pages = True
        page = _Page.read(content)
        if page.flags & BEGINS:
            self._stream = _OpusStream(0 if self._is_first else None)
        is_header = self._stream.is_header(page)
        if not self._is_first:
            return b"" if is_header else self._go_on() + self._append(page)
        self._serial, self._number = page.serial, page.number
        self._move_on(page)
        return self._take_last_page() + self._hold_if_last(page, content)

    def _append(self, page: _Page) -> bytes:
        """Give a page of a later stream as one of the first."""
        self._number = self._number + 1 & MAX_NUMBER
        flags, granule = page.flags & ~BEGINS, self._move_on(page)
        chained = page._replace(flags=flags, granule=granule, serial=self._serial, number=self._number)
        return self._hold_if_last(chained, chained.write())

    def _hold_if_last(self, page: _Page, content: bytes) -> bytes:
        self._last_page = content if page.flags & ENDS else b""
        return b"" if self._last_page else content

    def _go_on(self) -> bytes:
        """Give the page that was thought the last, if there is one, as one in the middle."""
        content = self._take_last_page()
        if not content:
            return b""
        page = _Page.read(content)
        if not page.lacing:
            self._number = self._number - 1 & MAX_NUMBER
            return b""
        granule = NO_GRANULE if page.granule == NO_GRANULE else self._position & MAX_GRANULE
        return page._replace(flags=page.flags & ~ENDS, granule=granule).write()

    def _move_on(self, page: _Page) -> int:
        """Count the samples of a page, and give its granule as it is in the chain."""
        samples = self._stream.count_samples(page)
        start, self._position = self._position, self._position + samples
        if page.granule == NO_GRANULE:
            return NO_GRANULE
        is_last = bool(page.flags & ENDS)  # its granule may leave out the end of the last packet
        if self._stream.shift is None:
            self._stream.shift = start if is_last else start + samples - page.granule
        granule = page.granule + self._stream.shift
        if not is_last:
            self._position = granule
        return granule & MAX_GRANULE
