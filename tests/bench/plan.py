"""What a run is to measure, and against what."""

from dataclasses import dataclass
from pathlib import Path

from tests.bench.servers import StandIn


@dataclass(frozen=True, slots=True)
class Plan:
    """The choices of the command line. `workers` is None where both one and two are meant."""

    quick: bool
    database: str
    workers: int | None
    report: Path | None


@dataclass(frozen=True, slots=True)
class Stage:
    """Where one part is measured: a folder for what its servers write, and the stand-in."""

    plan: Plan
    folder: Path
    stand_in: StandIn

    def pick(self, usual: int, quick: int) -> int:
        """A number of the full run, or the smaller one of `--quick`."""
        return quick if self.plan.quick else usual
