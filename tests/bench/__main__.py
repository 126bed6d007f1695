"""Command line: `python -m tests.bench [parts…] [--quick] [--database postgresql] [--workers N] [--report FOLDER]`."""

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from tests.bench import history, latency, load, long_text, startup
from tests.bench.plan import Plan, Stage
from tests.bench.plot import draw
from tests.bench.servers import run_stand_in
from tests.bench.table import Findings, Row

PARTS: dict[str, Callable[[Stage], Findings]] = {
    "synthesize": latency.measure_synthesize,
    "stream": latency.measure_stream,
    "load": load.measure,
    "long_text": long_text.measure,
    "history": history.measure,
    "startup": startup.measure,
}


def main() -> int:
    """Measure the parts that were named, or all, and print what was found; the exit code is 1 if a goal is missed."""
    options = _parser().parse_args()
    plan = Plan(options.quick, options.database, options.workers, options.report)
    report: Path = options.report or Path(gettempdir()) / "ai-voice-backend-bench"
    report.mkdir(parents=True, exist_ok=True)
    findings = Findings()
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with run_stand_in(folder / "stand-in") as stand_in:
            for part in options.parts or PARTS:
                began_at = time.monotonic()
                found = _measure(part, Stage(plan, folder / part, stand_in))
                sys.stderr.write(f"{found}\n\n{part}: {time.monotonic() - began_at:.0f} s\n\n")
                findings += found
    if plan.quick:
        findings = findings.without_verdicts()
    draw(findings.panels, report / "bench.svg")
    (report / "bench.md").write_text(f"{findings}\n")
    print(findings)  # noqa: T201 - a script's output
    sys.stderr.write(f"table and plot: {report}\n")
    return int(any(row.is_held is False for row in findings.rows))


def _measure(part: str, stage: Stage) -> Findings:
    """One part; what keeps it from its end is told, and the others are measured all the same."""
    try:
        return PARTS[part](stage)
    except Exception as error:
        traceback.print_exc()
        return Findings([Row(f"{part}: measured to its end", f"{type(error).__name__}, see above", is_held=False)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="part", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="smaller numbers: about two minutes, and no verdicts")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--workers", type=int, metavar="N", help="of the load (default: 1, and 2 on PostgreSQL)")
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="where the table, the plot and the filled database go"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
