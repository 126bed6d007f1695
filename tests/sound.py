"""Listening to what came out: real decoding."""

from __future__ import annotations

import io
from array import array

import av


def decode(audio: bytes, audio_format: str, sample_rate: int) -> tuple[array[int], int]:
    """The samples (16-bit, mono) of a whole file, and their rate."""
    if audio_format == "pcm":
        return array("h", audio), sample_rate
    samples: array[int] = array("h")
    with av.open(io.BytesIO(audio), "r") as container:
        stream = container.streams.audio[0]
        resampler = av.AudioResampler("s16", "mono", stream.rate)
        for frame in container.decode(stream):
            for plain in resampler.resample(frame):
                samples.frombytes(bytes(plain.planes[0])[: plain.samples * 2])
        for plain in resampler.resample(None):
            samples.frombytes(bytes(plain.planes[0])[: plain.samples * 2])
        return samples, stream.rate


def duration(audio: bytes, audio_format: str, sample_rate: int) -> float:
    """How long a file plays, in seconds."""
    samples, rate = decode(audio, audio_format, sample_rate)
    return len(samples) / rate


def loudness(samples: array[int]) -> float:
    """Root mean square of 16-bit samples: silence is 0."""
    return float((sum(sample * sample for sample in samples) / max(1, len(samples))) ** 0.5)
