"""One task's audio: lines go in, frames of the stream come out. Everything here blocks; it runs in a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from app.sandbox.encoder import create_encoder
from app.sandbox.script import Line
from app.sandbox.speech_order import SpeechOrder
from app.sandbox.voice import SPEECH_RATE, Manner, silence, speak
from app.sandbox.word_times import Passage, Word, time_words

FRAME_BYTES: Final = 8000
"""How large the service's binary frames are, about (§1.6)."""

_SLICE_BYTES: Final = SPEECH_RATE * 2
_SENTENCE_PAUSE_MILLISECONDS: Final = 150


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
        self._passages: list[Passage] = []

    def record(self, line: Line, is_last: Callable[[], bool]) -> Iterator[list[Frame]]:
        """The frames of a line, slice by slice; the end of the stream too if nothing follows, as `is_last` knows."""
        self._line_began = self._seconds
        samples = self._speak(line) + silence(_SENTENCE_PAUSE_MILLISECONDS)
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

    def words(self, text: str) -> list[Word]:
        """Word timestamps of the line just recorded (§1.5)."""
        return time_words(text, self._passages, self._line_began)

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
        self._passages = []
        begin = 0
        for piece, pause in line.pieces():
            text = piece
            for old, new in order.replacements:
                text = text.replace(old, new)
            said = speak(text, manner) if text else b""
            self._passages.append(Passage(begin, begin + len(piece), said, len(speech) // 2))
            begin += len(piece)
            speech += said + silence(pause)
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
