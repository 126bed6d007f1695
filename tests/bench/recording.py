"""Audio to be replayed: a real sound, cut into pieces as the provider sends them (PROTOCOL §1.6)."""

import math
from array import array
from collections.abc import Iterator

import av
from av.audio.codeccontext import AudioCodecContext

SAMPLE_RATE = 22_050
PIECE_BYTES = 8000
TONE_HZ = 220
_SECONDS = 60


def pcm_pieces() -> list[bytes]:
    """A minute of 16-bit mono samples at SAMPLE_RATE."""
    sound = _samples()
    return [sound[start : start + PIECE_BYTES] for start in range(0, len(sound) - PIECE_BYTES + 1, PIECE_BYTES)]


def mp3_pieces() -> list[bytes]:
    """The same minute as mp3 at 32 kbit/s; each piece is whole frames, so that any number of them can be played."""
    pieces, piece = [], bytearray()
    for packet in _encode(_samples()):
        piece += packet
        if len(piece) >= PIECE_BYTES:
            pieces.append(bytes(piece))
            piece.clear()
    return pieces


def _samples() -> bytes:
    step = 2 * math.pi * TONE_HZ / SAMPLE_RATE
    # The tone swells once a second, so that no two pieces are alike.
    return array(
        "h", (int(9000 * math.sin(n * step) * math.sin(n / SAMPLE_RATE)) for n in range(_SECONDS * SAMPLE_RATE))
    ).tobytes()


def _encode(sound: bytes) -> Iterator[bytes]:
    encoder = av.CodecContext.create("libmp3lame", "w")
    assert isinstance(encoder, AudioCodecContext)
    encoder.sample_rate, encoder.layout, encoder.format, encoder.bit_rate = SAMPLE_RATE, "mono", "s16p", 32_000
    encoder.open()
    size = encoder.frame_size * 2
    for start in range(0, len(sound) - size + 1, size):
        frame = av.AudioFrame("s16p", "mono", encoder.frame_size)
        frame.sample_rate, frame.pts = SAMPLE_RATE, start // 2
        frame.planes[0].update(sound[start : start + size])
        yield from map(bytes, encoder.encode(frame))
    yield from map(bytes, encoder.encode(None))
