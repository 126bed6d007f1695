"""Raising or lowering speech without changing its length."""

from __future__ import annotations

from typing import Final

from av import AudioFrame
from av.error import BlockingIOError as NothingYet
from av.error import EOFError as EndOfGraph
from av.filter import Graph

_FURTHEST: Final = 4.0


def shift_pitch(samples: bytes, sample_rate: int, factor: float) -> bytes:
    """16-bit mono `samples`, `factor` times as high: played faster, then stretched back to its length.

    One stretch goes no further than twice the length, so there are two; beyond four times as high nothing changes.
    """
    if factor == 1.0 or not samples:
        return samples
    factor = min(max(factor, 1 / _FURTHEST), _FURTHEST)
    stretch = f"{factor**-0.5:.6f}"
    graph = Graph()
    chain = [
        graph.add_abuffer(sample_rate=sample_rate, format="s16", layout="mono"),
        graph.add("asetrate", f"{round(sample_rate * factor)}"),
        graph.add("aresample", f"{sample_rate}"),
        graph.add("atempo", stretch),
        graph.add("atempo", stretch),
        graph.add("aformat", f"sample_fmts=s16:channel_layouts=mono:sample_rates={sample_rate}"),
        graph.add("abuffersink"),
    ]
    graph.link_nodes(*chain).configure()
    frame = AudioFrame(format="s16", layout="mono", samples=len(samples) // 2)
    frame.sample_rate = sample_rate
    frame.planes[0].update(samples)
    graph.push(frame)
    graph.push(None)
    shifted = bytearray()
    while True:
        try:
            piece = graph.pull()
        except (NothingYet, EndOfGraph):
            return bytes(shifted)
        if isinstance(piece, AudioFrame):
            shifted += bytes(piece.planes[0])[: piece.samples * 2]
