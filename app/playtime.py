"""How long speech plays, counted while it passes by: MP3 by its frames, Ogg Opus by the positions of its pages.

Decoding finds the same at a hundred times the cost. What is not plainly one stream, from its beginning and in whole
frames, is not judged here.
"""

from functools import cache
from typing import NamedTuple

from app.audio import PCM_FRAME_BYTES, AudioFormat

# By the header's two bits of the MPEG version: 2.5, none, 2 and 1.
_MP3_RATES = ((11025, 12000, 8000), (), (22050, 24000, 16000), (44100, 48000, 32000))
_MPEG_1 = 3
_KBPS_OF_MPEG_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KBPS_OF_OTHERS = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_ID3_BYTES = 10
MAX_ID3_BYTES = 64 * 1024
# The first frame may hold notes of the encoder: which there are, frames, bytes, a table, a quality, and 24 of LAME.
# The last three of those tell how many samples were put before the sound and after it, 529 of them by the decoder.
_ALL_NOTES = 0x0F
_NOTES_BYTES = 120 + 24
_DECODER_SAMPLES = 529
_PAGE_BYTES = 27
_FIRST_PAGE, _LAST_PAGE = 0x02, 0x04
_OPUS_RATE = 48_000
# By the configuration of a packet: SILK, hybrid and CELT.
_OPUS_FRAME_SAMPLES = (480, 960, 1920, 2880) * 3 + (480, 960) * 2 + (120, 240, 480, 960) * 4


class Playtime:
    """Is fed the whole of a file, piece by piece; then knows how long it plays, or that it must be decoded for that."""

    def __init__(self) -> None:
        """Nothing was heard yet."""
        self._rest = b""
        self._is_odd = False

    def feed(self, piece: bytes) -> None:
        """Count what comes next."""
        if not self._is_odd:
            data = self._rest + piece
            try:
                self._rest = data[self._count(data) :]
            except _Odd:
                self._is_odd, self._rest = True, b""

    @property
    def duration_ms(self) -> int | None:
        """The milliseconds that a player would play; None for what must be decoded to know."""
        samples, rate = (0, 0) if self._is_odd or self._rest else self._counted
        return round(samples * 1000 / rate) if samples > 0 else None

    @property
    def _counted(self) -> tuple[int, int]:
        """Samples, and how many of them play in a second."""
        return 0, 0

    def _count(self, data: bytes) -> int:
        """Count the whole units at the beginning, and give their size in bytes. Raises _Odd."""
        raise _Odd


class _Odd(ValueError):
    """This is not plainly one stream from its beginning."""


class _Pcm(Playtime):
    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        self._sample_rate = sample_rate
        self._bytes = 0

    def _count(self, data: bytes) -> int:
        self._bytes += len(data)
        return len(data)

    @property
    def _counted(self) -> tuple[int, int]:
        return self._bytes // PCM_FRAME_BYTES, self._sample_rate


class _Frames(NamedTuple):
    """What all the frames have in common that begin with the same three bytes."""

    size: int
    rate: int
    samples: int
    is_mpeg_1: bool


class _Mp3(Playtime):
    """Frames all play for the same time. What an encoder notes as silence of its own is left out."""

    def __init__(self) -> None:
        super().__init__()
        self._first: _Frames | None = None
        self._frames = 0
        self._frames_noted: int | None = None
        self._silence = 0

    @property
    def _counted(self) -> tuple[int, int]:
        if self._first is None or self._frames_noted not in {None, self._frames}:
            return 0, 0
        return self._frames * self._first.samples - self._silence, self._first.rate

    def _count(self, data: bytes) -> int:
        end = 0 if self._first else self._begin(data)
        while self._first and end + 3 <= len(data):
            frame = _frames_of(data[end : end + 3])
            if frame.rate != self._first.rate or frame.samples != self._first.samples:
                raise _Odd
            if end + frame.size > len(data):
                break
            self._frames += 1
            end += frame.size
        return end

    def _begin(self, data: bytes) -> int:
        """Read the first frame, behind a tag. Gives its end; 0 as long as it is not all there."""
        start = 0
        if b"ID3".startswith(data[:3]):
            if len(data) < _ID3_BYTES:
                return 0
            for byte in data[6:_ID3_BYTES]:
                start = start << 7 | byte
            start += _ID3_BYTES
            if start > MAX_ID3_BYTES:
                raise _Odd
        if start + 3 > len(data):
            return 0
        first = _frames_of(data[start : start + 3])
        frame = data[start : start + first.size]
        if len(frame) < first.size:
            return 0
        self._first = first
        self._read_first(frame, first)
        return start + first.size

    def _read_first(self, frame: bytes, first: _Frames) -> None:
        is_mono = frame[3] >> 6 == 3
        side = 4 if frame[1] & 1 else 6  # a checksum comes before it
        side_bytes = (17 if is_mono else 32) if first.is_mpeg_1 else (9 if is_mono else 17)
        notes = frame[side + side_bytes :]
        if notes[:4] not in {b"Xing", b"Info"}:
            if frame[side]:
                raise _Odd  # it goes on with what an earlier frame began, which is not here
            self._frames = 1
            return
        if len(notes) < _NOTES_BYTES or int.from_bytes(notes[4:8], "big") != _ALL_NOTES:
            raise _Odd
        before_and_after = int.from_bytes(notes[_NOTES_BYTES - 3 : _NOTES_BYTES], "big")
        before, after = before_and_after >> 12, before_and_after & 0xFFF
        if not before or after < _DECODER_SAMPLES:
            raise _Odd
        self._frames_noted = int.from_bytes(notes[8:12], "big")
        self._silence = before + after


@cache
def _frames_of(head: bytes) -> _Frames:
    version, layer_3 = head[1] >> 3 & 3, head[1] >> 1 & 3 == 1
    kbps_index, rate_index = head[2] >> 4, head[2] >> 2 & 3
    rates = _MP3_RATES[version]
    if head[0] != 0xFF or head[1] < 0xE0 or not layer_3 or kbps_index in {0, 15} or rate_index >= len(rates):
        raise _Odd
    is_mpeg_1 = version == _MPEG_1
    kbps = (_KBPS_OF_MPEG_1 if is_mpeg_1 else _KBPS_OF_OTHERS)[kbps_index]
    samples, rate = 1152 if is_mpeg_1 else 576, rates[rate_index]
    return _Frames(samples // 8 * kbps * 1000 // rate + (head[2] >> 1 & 1), rate, samples, is_mpeg_1)


class _Opus(Playtime):
    """The position of the last page, without what the head says that a decoder needs to settle."""

    def __init__(self) -> None:
        super().__init__()
        self._pages = 0
        self._serial = b""
        self._skipped = 0
        self._position = 0
        self._is_over = False

    @property
    def _counted(self) -> tuple[int, int]:
        return self._position - self._skipped, _OPUS_RATE

    def _count(self, data: bytes) -> int:
        at = 0
        while at + _PAGE_BYTES <= len(data):
            if not data.startswith(b"OggS\0", at) or self._is_over:
                raise _Odd
            table = data[at + _PAGE_BYTES : at + _PAGE_BYTES + data[at + 26]]
            body = at + _PAGE_BYTES + data[at + 26]
            end = body + sum(table)
            if len(table) < data[at + 26] or end > len(data):
                break
            self._read_page(data[at:body], table, data[body:end])
            at = end
        return at

    def _read_page(self, head: bytes, table: bytes, body: bytes) -> None:
        kind, serial = head[5], head[14:18]
        position = int.from_bytes(head[6:14], "little", signed=True)
        if (kind & _FIRST_PAGE) != (0 if self._pages else _FIRST_PAGE) or serial != (self._serial or serial):
            raise _Odd
        self._serial = serial
        if self._pages == 0:
            if body[:8] != b"OpusHead" or len(body) < 19:
                raise _Odd
            self._skipped = int.from_bytes(body[10:12], "little")
        if position > 0:
            _require_whole(position - self._position, _play(table, body), is_last=bool(kind & _LAST_PAGE))
            self._position = position
        self._is_over = bool(kind & _LAST_PAGE)
        self._pages += 1


def _require_whole(step: int, samples: int, *, is_last: bool) -> None:
    """See that a page is as far from the one before it as it plays; the last one may be cut short."""
    if step != samples and not (is_last and 0 <= step < samples):
        raise _Odd


def _play(table: bytes, body: bytes) -> int:
    """How many samples the packets of a page play. Raises _Odd where one goes on in the next page."""
    samples, start, size = 0, 0, 0
    for lacing in table:
        size += lacing
        if lacing < 255:
            packet, start, size = body[start : start + size], start + size, 0
            if not packet or (packet[0] & 3 == 3 and len(packet) < 2):
                raise _Odd
            frames = (1, 2, 2, packet[1] & 63 if packet[0] & 3 == 3 else 0)[packet[0] & 3]
            samples += frames * _OPUS_FRAME_SAMPLES[packet[0] >> 3]
    if size:
        raise _Odd
    return samples


def begin_playtime(audio_format: AudioFormat, sample_rate: int) -> Playtime:
    """What counts audio of a format; of WAV, whose header tells, nothing is counted. `sample_rate` is that of PCM."""
    match audio_format:
        case "pcm":
            return _Pcm(sample_rate)
        case "mp3":
            return _Mp3()
        case "opus":
            return _Opus()
        case "wav":
            return Playtime()
