"""What was found, in one Markdown table."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

NOTHING = "–"


@dataclass(frozen=True, slots=True)
class Row:
    """One goal and what came of it. `is_held` is None where nothing was promised."""

    goal: str
    ours: str
    is_held: bool | None
    bare: str = NOTHING
    addition: str = NOTHING
    baseline: str = NOTHING

    @property
    def verdict(self) -> str:
        """In a word."""
        return NOTHING if self.is_held is None else "held" if self.is_held else "**missed**"

    def __str__(self) -> str:
        cells = (self.goal, self.bare, self.ours, self.addition, self.baseline, self.verdict)
        return f"| {' | '.join(cells)} |"


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture of the plot: what was measured, each series by its name, and the limit if there is one."""

    title: str
    unit: str
    series: Mapping[str, Sequence[float]]
    limit: float | None = None


@dataclass(slots=True)
class Findings:
    """What a part has found; notes stand below the table."""

    rows: list[Row] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __iadd__(self, other: "Findings") -> "Findings":
        self.rows += other.rows
        self.panels += other.panels
        self.notes += other.notes
        return self

    def without_verdicts(self) -> "Findings":
        """The same, of numbers that are too small for a judgement."""
        return Findings([replace(row, is_held=None) for row in self.rows], self.panels, self.notes)

    def __str__(self) -> str:
        head = ["| goal | bare | ours | addition | baseline | verdict |", "|---|---|---|---|---|---|"]
        return "\n".join([*head, *map(str, self.rows), "", *(f"- {note}" for note in self.notes)])


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]


def p99(values: Sequence[float]) -> float:
    """All but one of a hundred are not above it."""
    return percentile(values, 0.99)


def spread(values: Sequence[float], unit: str = "ms") -> str:
    """Median and p99, in words."""
    if not values:
        return NOTHING
    return f"{statistics.median(values):.1f}, p99 {p99(values):.1f} {unit}"


def added(bare: Sequence[float], ours: Sequence[float]) -> tuple[float, float]:
    """By how much the median and the p99 are larger than those of the bare call; without end, where nothing came."""
    if not bare or not ours:
        return math.inf, math.inf
    return statistics.median(ours) - statistics.median(bare), p99(ours) - p99(bare)


def show_added(addition: tuple[float, float], unit: str = "ms") -> str:
    """An addition, in words."""
    if math.isinf(addition[0]):
        return "nothing came"
    return f"{addition[0]:+.1f}, p99 {addition[1]:+.1f} {unit}"
