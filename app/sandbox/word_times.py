"""When each word of a line is heard (PROTOCOL.md §1.5): words share out what is audible, so that none falls silent."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from app.sandbox.characters import HAN
from app.sandbox.voice import SPEECH_RATE

Word = dict[str, str | int]
"""A word as it is sent: its characters in the sentence, and milliseconds from the start of the task's audio."""

_WORD: Final = re.compile(rf"{HAN.pattern}|[^\W_]+(?:['’.-][^\W_]+)*")
_STEP: Final = SPEECH_RATE // 100
_AUDIBLE_SHARE: Final = 0.02


@dataclass(frozen=True, slots=True)
class Passage:
    """Speech without a pause: characters `first` to `end` of the line, from sample `offset` of the line's on."""

    first: int
    end: int
    speech: bytes
    offset: int


def time_words(text: str, passages: Sequence[Passage], began: float) -> list[Word]:
    """The words of a line that began at second `began` of the task's audio."""
    words = list(_WORD.finditer(text))
    timed: list[Word] = []
    for passage in passages:
        own = [word for word in words if passage.first <= word.start() < passage.end]
        for word, (start, end) in zip(own, _share_out(passage.speech, [_weight(word) for word in own]), strict=True):
            timed.append(
                {
                    "text": word[0],
                    "begin_index": word.start(),
                    "end_index": word.end(),
                    "begin_time": _milliseconds(began, passage.offset + start),
                    "end_time": _milliseconds(began, passage.offset + end),
                }
            )
    return timed


def _weight(word: re.Match[str]) -> float:
    return max(1.0, (word.end() - word.start()) / 3)


def _milliseconds(began: float, samples: int) -> int:
    return round(1000 * (began + samples / SPEECH_RATE))


def _share_out(speech: bytes, weights: Sequence[float]) -> list[tuple[int, int]]:
    """The first and last sample of each word, by its weight."""
    steps = _audible_steps(speech) or [0]
    scale = len(steps) / sum(weights) if weights else 0.0
    shares: list[tuple[int, int]] = []
    begun = 0.0
    for weight in weights:
        first = min(round(begun * scale), len(steps) - 1)
        begun += weight
        last = max(first, round(begun * scale) - 1)
        shares.append((steps[first] * _STEP, min((steps[last] + 1) * _STEP, len(speech) // 2)))
    return shares


def _audible_steps(speech: bytes) -> list[int]:
    """The hundredths of a second that are not silent next to the loudest."""
    samples = memoryview(speech).cast("h")
    peaks = [
        max(max(piece), -min(piece))
        for piece in (samples[start : start + _STEP] for start in range(0, len(samples), _STEP))
    ]
    quietest = _AUDIBLE_SHARE * max(peaks, default=0)
    return [step for step, peak in enumerate(peaks) if peak >= quietest]
