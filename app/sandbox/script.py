"""What is to be said, line by line: one line is one sentence of the protocol, with its pauses and its manner."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """A sentence. `pauses` are (offset in the text, milliseconds); the rest overrides the order (SSML, §1.9)."""

    text: str
    pauses: tuple[tuple[int, int], ...] = ()
    rate: float | None = None
    pitch: float | None = None
    volume: int | None = None

    def pieces(self) -> list[tuple[str, int]]:
        """The text cut at its pauses, each piece with the milliseconds of silence that follow it."""
        pieces: list[tuple[str, int]] = []
        start = 0
        for offset, milliseconds in self.pauses:
            pieces.append((self.text[start:offset], milliseconds))
            start = offset
        pieces.append((self.text[start:], 0))
        return pieces
