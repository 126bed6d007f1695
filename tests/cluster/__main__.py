"""Command line: `python -m tests.cluster --streams 200 --seconds 120`."""

import argparse
import asyncio
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.cluster.scenario import Plan, Report, run


def main() -> int:
    """Run the cluster, print what was found, and give the exit code: 0 when nothing was wrong."""
    options = _parser().parse_args()
    plan = Plan(
        streams=options.streams,
        seconds=options.seconds,
        speed=options.speed,
        sentences=options.sentences,
        plain=max(1, options.streams // 20),
        long_texts=options.long_texts,
        segments=options.segments,
        ramp_seconds=min(10.0, options.seconds / 6),
        kill_backend_after=options.seconds * 0.3,
        kill_worker_after=options.seconds * 0.15,
        replace_after=options.replace_after,
        restart_backend_after=options.seconds * 0.65 if options.rolling else None,
    )
    with TemporaryDirectory() as scratch:
        report = asyncio.run(run(plan, options.keep or Path(scratch)))
    print(describe(report))  # noqa: T201 - a script's output
    return 1 if report.breaches else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument("--streams", type=int, default=200, help="streams at once (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=120, help="how long they are asked for (default %(default)s)")
    parser.add_argument("--speed", type=float, default=1.0, help="of the audio: 1 is as fast as it plays")
    parser.add_argument("--sentences", type=int, default=4, help="of each stream: about two seconds each")
    parser.add_argument("--long-texts", type=int, default=3)
    parser.add_argument("--segments", type=int, default=12, help="of each long text (default %(default)s)")
    parser.add_argument("--replace-after", type=float, default=5.0, metavar="S", help="seconds from a kill to the next")
    parser.add_argument("--rolling", action="store_true", help="also restart the second backend in order")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where logs are kept")
    return parser


def describe(report: Report) -> str:
    """The numbers, and what was wrong, in lines."""
    lines = [f"{len(report.outcomes)} requests, {report.streams_at_once} streams at once at most"]
    for kind in ("stream", "named", "live", "plain", "long", "poll"):
        told = ", ".join(f"{what}: {number}" for what, number in report.told(kind).most_common())
        lines.append(f"  {kind:8} {told}")
        if waits := report.first_bytes_ms(kind):
            p50, p99 = statistics.median(waits), waits[min(len(waits) - 1, int(len(waits) * 0.99))]
            lines.append(f"  {'':8} first byte: p50 {p50:.0f} ms, p99 {p99:.0f} ms, max {waits[-1]:.0f} ms")
    takeovers = ", ".join(f"{seconds:.1f} s" for seconds in report.takeovers)
    starts = ", ".join(f"{seconds:.1f} s" for seconds in report.starts)
    lines += [
        f"records: {', '.join(f'{status}: {number}' for status, number in report.statuses.most_common())}",
        f"requests that were passed on to the other backend: {report.passed_on}",
        f"long texts taken over after: {takeovers}",
        f"the killed backend's records were settled after {report.settled_after:.1f} s",
        f"quiet {report.quiet_after:.1f} s after the load; new processes were up after {starts}",
    ]
    if report.orderly_stop is not None:
        lines.append(f"the orderly stop took {report.orderly_stop:.1f} s")
    lines += [f"recordings played: {report.played}", f"processor and memory over {report.load_seconds:.0f} s of load:"]
    for name, usage in report.usage.items():
        share = usage.cpu_seconds / report.load_seconds
        lines.append(f"  {name:12} {share:7.1%} {usage.memory_mb:7.0f} MB")
    lines += [f"WRONG: {breach}" for breach in report.breaches[:100]]
    lines.append(f"{len(report.breaches)} things wrong" if report.breaches else "nothing wrong")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
