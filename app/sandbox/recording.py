"""One task's audio: lines go in, frames of the stream come out. Everything here blocks; it runs in a thread."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from app.sandbox.characters import HAN
from app.sandbox.encoder import create_encoder
from app.sandbox.script import Line
from app.sandbox.speech_order import SpeechOrder
from app.sandbox.voice import SPEECH_RATE, Manner, silence, speak

FRAME_BYTES: Final = 8000
"""How large the service's binary frames are, about (§1.6)."""

_SLICE_BYTES: Final = SPEECH_RATE * 2
_SENTENCE_PAUSE_MILLISECONDS: Final = 150
_WORD: Final = re.compile(rf"{HAN.pattern}|[^\W_]+(?:['’.-][^\W_]+)*")


@dataclass(frozen=True, slots=True)
class Frame:
    """One binary frame. `until` is the second of the task that it plays to, `share` how much of the line it ends."""

    data: bytes
    until: float
    share: float


class Recording:
    """Speaks lines into one encoded stream."""

    def __init__(self, order: SpeechOrder, wav_header: int) -> None:
        self._order = order
        self._encoder = create_encoder(order, wav_header)
        self._pending = bytearray()
        self._samples_in = 0
        self._line_began = 0.0
        self._line_spoke = 0.0

    def record(self, line: Line, is_last: Callable[[], bool]) -> Iterator[list[Frame]]:
        """The frames of a line, slice by slice; the end of the stream too if nothing follows, as `is_last` knows."""
        speech = self._speak(line)
        self._line_began = self._seconds
        self._line_spoke = len(speech) / 2 / SPEECH_RATE
        samples = speech + silence(_SENTENCE_PAUSE_MILLISECONDS)
        for start in range(0, len(samples), _SLICE_BYTES):
            piece = samples[start : start + _SLICE_BYTES]
            done_before = start / len(samples)
            done_after = (start + len(piece)) / len(samples)
            last_piece = done_after == 1.0
            before = self._seconds
            encoded = self._encoder.encode(piece)
            self._samples_in += len(piece) // 2
            if last_piece and is_last():
                encoded += self._encoder.finish()
            yield self._frames(encoded, before, done_before, done_after, whole=last_piece)

    def finish(self) -> Iterator[list[Frame]]:
        """What the encoder still held, when the task ended only after its last line was spoken."""
        yield self._frames(self._encoder.finish(), self._seconds, 1.0, 1.0, whole=True)

    def words(self, text: str) -> list[dict[str, object]]:
        """Word timestamps of the line just recorded (§1.5), spread evenly: ms from the start of the task's audio."""
        words = list(_WORD.finditer(text))
        weights = [max(1.0, (match.end() - match.start()) / 3) for match in words]
        scale = 1000 * self._line_spoke / sum(weights) if weights else 0.0
        stamped: list[dict[str, object]] = []
        time = 1000 * self._line_began
        for match, weight in zip(words, weights, strict=True):
            end = time + weight * scale
            stamped.append(
                {
                    "text": match[0],
                    "begin_index": match.start(),
                    "end_index": match.end(),
                    "begin_time": round(time),
                    "end_time": round(end),
                }
            )
            time = end
        return stamped

    @property
    def _seconds(self) -> float:
        return self._samples_in / SPEECH_RATE

    def _speak(self, line: Line) -> bytes:
        order = self._order
        voice = order.voice
        manner = Manner(
            voice_id=voice.voice_id,
            gender=voice.gender,
            languages=voice.languages,
            hint=order.language,
            rate=order.rate if line.rate is None else line.rate,
            pitch=order.pitch if line.pitch is None else line.pitch,
            volume=order.volume if line.volume is None else line.volume,
            height=voice.height,
        )
        speech = bytearray()
        for text, pause in line.pieces():
            for old, new in order.replacements:
                text = text.replace(old, new)
            speech += speak(text, manner) if text else b""
            speech += silence(pause)
        return bytes(speech)

    def _frames(
        self, encoded: bytes, before: float, done_before: float, done_after: float, *, whole: bool
    ) -> list[Frame]:
        """Cut what is ready into frames; a remainder waits for more unless the line is `whole`."""
        self._pending += encoded
        total = len(self._pending)
        cuts = list(range(FRAME_BYTES, total + 1, FRAME_BYTES))
        if whole and total and (not cuts or cuts[-1] < total):
            cuts.append(total)
        frames = []
        start = 0
        for cut in cuts:
            reached = cut / total
            frames.append(
                Frame(
                    data=bytes(self._pending[start:cut]),
                    until=before + (self._seconds - before) * reached,
                    share=done_before + (done_after - done_before) * reached,
                )
            )
            start = cut
        del self._pending[:start]
        return frames
