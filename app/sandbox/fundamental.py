"""How high a voice is: its fundamental frequency, by autocorrelation."""

from __future__ import annotations

import io
import statistics
from array import array
from itertools import accumulate
from operator import mul
from typing import Final

import av
from av import AudioFrame, AudioResampler

from app.sandbox.hearing import frames_of

_RATE: Final = 8000
_WINDOW: Final = _RATE // 20
_SHORTEST_PERIOD, _LONGEST_PERIOD = _RATE // 500, _RATE // 60
_SECONDS_HEARD: Final = 15
_WINDOWS_MEASURED: Final = 15
_QUIETEST_SHARE: Final = 0.1
_ALIKE: Final = 0.85
_PERIODIC: Final = 0.4


def height_of(audio: bytes) -> float | None:
    """The median fundamental frequency in Hz of a file's first channel, None if it has none. Blocks."""
    samples: array[int] = array("h")
    resampler = AudioResampler(format="s16p", layout=None, rate=_RATE)
    with av.open(io.BytesIO(audio), "r") as container:
        for frame in frames_of(container, container.streams.audio[0]):
            samples.extend(_first_channel(resampler.resample(frame)))
            if len(samples) >= _SECONDS_HEARD * _RATE:
                break
    return _height(samples)


def height_of_samples(samples: bytes, sample_rate: int) -> float | None:
    """The same of 16-bit mono samples."""
    if not samples:
        return None
    frame = AudioFrame(format="s16p", layout="mono", samples=len(samples) // 2)
    frame.sample_rate = sample_rate
    frame.planes[0].update(samples)
    return _height(_first_channel(AudioResampler(format="s16p", layout=None, rate=_RATE).resample(frame)))


def _first_channel(frames: list[AudioFrame]) -> array[int]:
    samples: array[int] = array("h")
    for frame in frames:
        samples.frombytes(bytes(frame.planes[0])[: frame.samples * 2])
    return samples


def _height(samples: array[int]) -> float | None:
    """The median over the loudest windows."""
    windows = [
        samples[start : start + _WINDOW + _LONGEST_PERIOD]
        for start in range(0, len(samples) - _WINDOW - _LONGEST_PERIOD, _WINDOW)
    ]
    energies = [sum(map(mul, window, window)) for window in windows]
    loudest = sorted(range(len(windows)), key=energies.__getitem__, reverse=True)[:_WINDOWS_MEASURED]
    audible = [n for n in loudest if energies[n] > _QUIETEST_SHARE * energies[loudest[0]]]
    periods = [period for n in audible if (period := _period(windows[n])) is not None]
    return _RATE / statistics.median(periods) if periods else None


def _period(samples: array[int]) -> int | None:
    """The shortest lag at which a window is nearly as much like itself as at any."""
    window = samples.tolist()
    start = window[:_WINDOW]
    energy_before = list(accumulate(map(mul, window, window), initial=0))
    likeness = {}
    for lag in range(_SHORTEST_PERIOD, _LONGEST_PERIOD + 1):
        energy = energy_before[lag + _WINDOW] - energy_before[lag]
        product = sum(map(mul, start, window[lag : lag + _WINDOW]))
        likeness[lag] = product / (1 + energy_before[_WINDOW] * energy) ** 0.5
    best = max(likeness.values())
    if best < _PERIODIC:
        return None
    peaks = (
        lag
        for lag, value in likeness.items()
        if value >= _ALIKE * best and value >= likeness.get(lag - 1, -1.0) and value >= likeness.get(lag + 1, -1.0)
    )
    return next(peaks, None)
