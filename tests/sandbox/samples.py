"""Recordings to make voices from."""

from __future__ import annotations

import io
import math
import wave
from array import array
from fractions import Fraction

import av


def hum(height: float = 200.0, seconds: float = 6.0, *, rate: int = 16000, loud: float = 1.0) -> array[int]:
    """16-bit samples of something like a voice: `height` Hz and its overtones."""
    period = round(rate / height)
    overtones = range(1, 9)
    wave_form = array(
        "h",
        (
            round(loud * 4000 * sum(math.sin(2 * math.pi * n * k / period) / k for k in overtones))
            for n in range(period)
        ),
    )
    size = round(seconds * rate)
    return (wave_form * (size // period + 1))[:size]


def as_wav(samples: array[int], *, rate: int = 16000, channels: int = 1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(channels)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(samples.tobytes())
    return file.getvalue()


def stereo(left: array[int], right: array[int]) -> array[int]:
    return array("h", (sample for pair in zip(left, right, strict=True) for sample in pair))


def encoded(samples: array[int], container: str, codec: str, *, rate: int = 16000) -> bytes:
    """The samples in another format, e.g. ("mp3", "libmp3lame") or ("ipod", "aac"), which is M4A."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        assert isinstance(stream, av.AudioStream)
        stream.codec_context.layout = "mono"
        frame = av.AudioFrame(format="s16", layout="mono", samples=len(samples))
        frame.sample_rate = rate
        frame.time_base = Fraction(1, rate)
        frame.planes[0].update(samples.tobytes())
        target = stream.codec_context.codec.audio_formats
        assert target is not None
        resampler = av.AudioResampler(format=target[0].name, layout="mono", rate=rate)
        fifo = av.AudioFifo()
        for piece in resampler.resample(frame):
            fifo.write(piece)
        while (piece_ready := fifo.read(1024, partial=True)) is not None:
            piece_ready.pts = None
            output.mux(stream.encode(piece_ready))
        output.mux(stream.encode(None))
    return file.getvalue()
