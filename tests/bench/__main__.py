"""Command line: `python -m tests.bench [parts…] [--quick] [--database postgresql] [--workers N] [--report FOLDER]`."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.bench import latency, load, long_text
from tests.bench.plan import Plan, Stage
from tests.bench.servers import run_stand_in
from tests.bench.table import Findings

PARTS: dict[str, Callable[[Stage], Findings]] = {
    "synthesize": latency.measure_synthesize,
    "stream": latency.measure_stream,
    "load": load.measure,
    "long_text": long_text.measure,
}


def main() -> int:
    """Measure the parts that were named, or all; print what was found, and give the exit code: 1 if a goal is missed."""
    options = _parser().parse_args()
    plan = Plan(options.quick, options.database, options.workers, options.report)
    findings = Findings()
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with run_stand_in(folder / "stand-in") as stand_in:
            for part in options.parts or PARTS:
                began_at = time.monotonic()
                findings += PARTS[part](Stage(plan, folder / part, stand_in))
                print(f"{part}: {time.monotonic() - began_at:.0f} s", file=sys.stderr)
    print(findings)
    return int(any(row.is_held is False for row in findings.rows))


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
