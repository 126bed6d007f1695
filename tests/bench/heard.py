"""What was heard of a call, and when: the same for the bare call, ours and the baseline's."""

import time
from dataclasses import dataclass, field

from tests.bench.recording import PIECE_BYTES
from tests.bench.stand_in import STAMP


@dataclass(slots=True)
class Heard:
    """Audio of one call; moments of CLOCK_MONOTONIC in seconds. What it consisted of is kept only when asked for."""

    began_at: float = field(default_factory=time.monotonic)
    first_at: float | None = None
    ended_at: float | None = None
    size: int = 0
    is_whole: bool = False
    pieces: list[tuple[float, bytes]] | None = None

    def hear(self, piece: bytes) -> None:
        """Take note of some bytes."""
        now = time.monotonic()
        if self.first_at is None:
            self.first_at = now
        self.size += len(piece)
        if self.pieces is not None:
            self.pieces.append((now, piece))

    def end(self, *, is_whole: bool) -> None:
        """Take note of the end."""
        self.ended_at = time.monotonic()
        self.is_whole = is_whole

    @property
    def first_ms(self) -> float:
        """From the wish to the first byte."""
        assert self.first_at is not None
        return (self.first_at - self.began_at) * 1000

    @property
    def whole_ms(self) -> float:
        """From the wish to the end."""
        assert self.ended_at is not None
        return (self.ended_at - self.began_at) * 1000

    def chunks(self) -> list[tuple[float, float]]:
        """When the stand-in sent each chunk of pcm, and when its last byte was here."""
        assert self.pieces is not None
        chunks, rest = [], bytearray()
        for at, piece in self.pieces:
            rest += piece
            while len(rest) >= PIECE_BYTES:
                chunks.append((STAMP.unpack_from(rest)[0] / 1e9, at))
                del rest[:PIECE_BYTES]
        return chunks
