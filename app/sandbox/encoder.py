"""Turning samples into the stream a task asked for, piece by piece (PROTOCOL.md §1.4, §1.6).

One encoder serves one task, so only the first bytes hold a header. Opus comes in Ogg; libopus knows 8, 12, 16, 24 and
48 kHz, so 22050 Hz is encoded at 24 kHz and 44100 Hz at 48 kHz. Bit rates that a codec lacks are brought into its
range. Encoding blocks: call it in a thread.
"""

from __future__ import annotations

import io
import struct
from typing import Any, Final, Protocol

import av
from av import AudioFrame, AudioResampler, AudioStream

from app.sandbox.speech_order import SpeechOrder
from app.sandbox.voice import SPEECH_RATE

_OPUS_RATES: Final = {22050: 24000, 44100: 48000}
_OPUS_HIGHEST_KBPS: Final = 256
_MP3_LOWEST_HIGHEST_KBPS: Final = {8000: (8, 64), 16000: (8, 160), 22050: (8, 160), 24000: (8, 160)}
_CODEC_OPTIONS: Final[dict[str, dict[str, str]]] = {
    "libmp3lame": {"compression_level": "7"},
    "libopus": {"compression_level": "0", "vbr": "constrained"},
}
"""Little effort: a load test should find the limits of the product, not of its stand-in."""
_OGG_PAGE_MICROSECONDS: Final = 100_000


class Encoder(Protocol):
    """Takes 16-bit mono samples at `SPEECH_RATE`, returns the bytes that are ready."""

    def encode(self, samples: bytes) -> bytes: ...

    def finish(self) -> bytes: ...


def create_encoder(order: SpeechOrder, wav_header: int) -> Encoder:
    """The encoder for the format and rate of an order."""
    if order.format == "mp3":
        lowest, highest = _MP3_LOWEST_HIGHEST_KBPS.get(order.sample_rate, (32, 320))
        kbps = min(max(order.bit_rate, lowest), highest)
        options = {"write_xing": "0", "id3v2_version": "0"}
        return _CompressedEncoder("mp3", "libmp3lame", "s16p", order.sample_rate, kbps, options)
    if order.format == "opus":
        rate = _OPUS_RATES.get(order.sample_rate, order.sample_rate)
        kbps = min(order.bit_rate, _OPUS_HIGHEST_KBPS)
        options = {"page_duration": str(_OGG_PAGE_MICROSECONDS)}
        return _CompressedEncoder("ogg", "libopus", "s16", rate, kbps, options)
    return _PlainEncoder(
        order.sample_rate, _wav_header(order.sample_rate, wav_header) if order.format == "wav" else b""
    )


def _wav_header(sample_rate: int, size: int) -> bytes:
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        b"RIFF",
        size,
        b"WAVE",
        b"fmt ",
        16,
        1,
        1,
        sample_rate,
        sample_rate * 2,
        2,
        16,
        b"data",
        size,
    )


def _frame(samples: bytes) -> AudioFrame:
    frame = AudioFrame(format="s16", layout="mono", samples=len(samples) // 2)
    frame.sample_rate = SPEECH_RATE
    frame.planes[0].update(samples)
    return frame


class _PlainEncoder:
    """pcm, and wav: the same behind a header."""

    def __init__(self, sample_rate: int, header: bytes) -> None:
        self._header = header
        self._resampler = (
            None if sample_rate == SPEECH_RATE else AudioResampler(format="s16", layout="mono", rate=sample_rate)
        )

    def encode(self, samples: bytes) -> bytes:
        header, self._header = self._header, b""
        if self._resampler is None or not samples:
            return header + samples
        return header + self._resampled(_frame(samples))

    def finish(self) -> bytes:
        return b"" if self._resampler is None else self._resampled(None)

    def _resampled(self, frame: AudioFrame | None) -> bytes:
        assert self._resampler is not None  # noqa: S101 - both callers checked
        return b"".join(bytes(piece.planes[0])[: piece.samples * 2] for piece in self._resampler.resample(frame))


class _Pipe(io.RawIOBase):
    """Where a muxer writes to: what was written since the last look can be taken away."""

    def __init__(self) -> None:
        super().__init__()
        self._written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._written += data
        return len(data)

    def take(self) -> bytes:
        written = bytes(self._written)
        self._written.clear()
        return written


class _CompressedEncoder:
    """mp3 and Ogg Opus by libav."""

    def __init__(
        self, container: str, codec: str, sample_format: str, rate: int, kbps: int, options: dict[str, str]
    ) -> None:
        self._pipe = _Pipe()
        self._container = av.open(self._pipe, "w", format=container, options=options)
        stream = self._container.add_stream(codec, rate=rate, options=_CODEC_OPTIONS[codec])
        assert isinstance(stream, AudioStream)  # noqa: S101 - both codecs are of audio
        stream.codec_context.layout = "mono"
        stream.codec_context.format = sample_format
        stream.bit_rate = kbps * 1000
        self._stream = stream
        self._resampler = AudioResampler(format=sample_format, layout="mono", rate=rate)

    def encode(self, samples: bytes) -> bytes:
        if samples:
            self._feed(_frame(samples))
        return self._pipe.take()

    def finish(self) -> bytes:
        self._feed(None)
        for packet in self._stream.encode(None):
            self._container.mux(packet)
        self._container.close()
        return self._pipe.take()

    def _feed(self, frame: AudioFrame | None) -> None:
        for piece in self._resampler.resample(frame):
            piece.pts = None
            for packet in self._stream.encode(piece):
                self._container.mux(packet)
