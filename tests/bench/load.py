"""Many streams at once: the first byte, memory, stalls and fairness.

Streams last some seconds and follow each other without a pause. One user opens a fifth of all with his one key, the
others one each. The same load is put on the bare call (warm connections, nothing between), on us, and on the baseline.
"""

import asyncio
import re
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from functools import partial
from urllib.request import urlopen

import pytest
import uvloop

from tests.bench import bare
from tests.bench.client import SYNTHESIZE, Caller, order
from tests.bench.crowd import Outcomes, Stalls, Way, hold, press, watching_stalls
from tests.bench.heard import Heard
from tests.bench.plan import Stage
from tests.bench.servers import (
    Running,
    database_url,
    provide_database,
    run_backend,
    run_baseline,
)
from tests.bench.stand_in import Pace
from tests.bench.table import NOTHING, Findings, Panel, Row, added, p99, show_added, spread
from tests.bench.tenants import Tenant, move_in

PACE = Pace(20, 0.4, 0.2)  # mp3 that comes five times as fast as it plays
HELD_PACE = Pace(10, 1.0, 0.5)
# As long as a stream, so that they begin evenly ever after.
RAMP_SECONDS = PACE.seconds
HELD_RAMP_SECONDS, HOLD_SECONDS = 3.0, 6.0
GREEDY_SHARE = 0.2
GREEDY = "greedy"
FIRST_BYTE_P99_MS, STREAM_KILOBYTES, STALL_MS = 15.0, 300, 20.0
JUDGED_STREAMS = 200
PROBE_LINES = 4


@dataclass(frozen=True, slots=True)
class Pressed:
    """What came of a load on us."""

    outcomes: Outcomes
    stalls: Stalls
    opened: int
    stream_bytes: float
    """Of memory for each of those that were open at once."""
    cpu_shares: dict[str, float]
    """Of one processor: of the server, of the stand-in, and of those who asked."""
    lags: tuple[int, int]
    """Of the server's own probes, one a second: how many there were, and how many came more than 25 ms late."""


def measure(stage: Stage) -> Findings:
    """Every number of streams, with every number of workers."""
    found = Findings()
    for streams in (50,) if stage.plan.quick else (200, 500):
        bare_calls = uvloop.run(_press_bare(stage, streams))
        first: dict[str, Sequence[float]] = {"bare": bare_calls.first_ms}
        baseline_calls = _press_baseline(stage, streams) if streams <= JUDGED_STREAMS else None
        if baseline_calls is not None:
            found.notes.append(f"baseline at {streams} streams: {baseline_calls.summary}")
        for workers in _worker_counts(stage):
            try:
                pressed = _press_ours(stage, streams, workers)
            except pytest.skip.Exception as reason:
                found.notes.append(f"load with {workers} workers was not measured: {reason}")
                continue
            found += _judge(streams, workers, bare_calls, pressed, baseline_calls)
            first[f"ours, WORKERS={workers}"] = pressed.outcomes.first_ms
        if baseline_calls is not None:
            first["baseline"] = baseline_calls.first_ms
        found.panels.append(Panel(f"{streams} streams, first byte", "ms", first))
    return found


def _worker_counts(stage: Stage) -> list[int]:
    if stage.plan.workers is not None:
        return [stage.plan.workers]
    return [1] if stage.plan.quick else [1, 2]


def _judge(
    streams: int, workers: int, bare_calls: Outcomes, pressed: Pressed, baseline_calls: Outcomes | None
) -> Findings:
    outcomes, stalls = pressed.outcomes, pressed.stalls
    place = f"{streams} streams, {workers} worker{'s' if workers > 1 else ''}"
    addition = added(bare_calls.first_ms, outcomes.first_ms)
    is_judged = streams == JUDGED_STREAMS
    has_failed = bool(outcomes.failures)
    goal = f"addition p99 ≤ {FIRST_BYTE_P99_MS:g} ms" if is_judged else "told"
    first = Row(
        f"{place}: first byte, {goal}",
        spread(outcomes.first_ms),
        addition[1] <= FIRST_BYTE_P99_MS and not has_failed if is_judged else None,
        spread(bare_calls.first_ms),
        show_added(addition),
        spread(baseline_calls.first_ms) if baseline_calls and workers == 1 else NOTHING,
    )
    kilobytes = pressed.stream_bytes / 1024
    memory = Row(
        f"{place}: memory per stream ≤ {STREAM_KILOBYTES} KB",
        f"{kilobytes:.0f} KB ({pressed.opened} open)",
        kilobytes <= STREAM_KILOBYTES,
    )
    worst = max(stalls.server_ms)
    stall = Row(
        f"{place}: no stall above {STALL_MS:g} ms",
        f"{spread(stalls.server_ms)}, most {worst:.0f} ms",
        worst <= STALL_MS,
        f"(our own timer: p99 {p99(stalls.own_ms):.1f}, most {max(stalls.own_ms):.0f} ms)",
    )
    fair, starved = _tell_fairness(outcomes, streams)
    probes, late = pressed.lags
    shares = ", ".join(f"{name} {share:.0%}" for name, share in pressed.cpu_shares.items())
    note = (
        f"{place}: {outcomes.summary}; processor: {shares}; event_loop_lag_seconds: {late} of"
        f" {probes} probes above 25 ms"
    )
    return Findings([first, memory, stall, Row(f"{place}: nobody starves", fair, not starved)], notes=[note])


def _tell_fairness(outcomes: Outcomes, streams: int) -> tuple[str, int]:
    """First byte and end by user, and how many users had not one stream."""
    users = streams - int(streams * GREEDY_SHARE) + 1
    told = []
    for what, of in (("first byte", lambda call: call.first_ms), ("end", lambda call: call.whole_ms)):
        medians = outcomes.medians_ms(of)
        others = [value for user, value in medians.items() if user != GREEDY]
        if others and GREEDY in medians:
            told.append(
                f"{what}: greedy {medians[GREEDY]:.0f}, others {statistics.median(others):.0f},"
                f" worst {max(others):.0f} ms"
            )
    starved = users - len(outcomes.served)
    return f"{'; '.join(told)}; starved: {starved}", starved


# ---- The same load on each


def _users(streams: int) -> list[str]:
    greedy = int(streams * GREEDY_SHARE)
    return [
        GREEDY if place * greedy // streams < (place + 1) * greedy // streams else f"user {place}"
        for place in range(streams)
    ]


async def _press_bare(stage: Stage, streams: int) -> Outcomes:
    async with AsyncExitStack() as stack:
        callers: list[tuple[str, Way]] = []
        for user in _users(streams):
            line = await stack.enter_async_context(bare.open_line(stage.stand_in.ws_url))
            callers.append((user, partial(bare.speak, line, PACE.as_text())))
        return await press(callers, RAMP_SECONDS, stage.pick(8, 4))


def _press_baseline(stage: Stage, streams: int) -> Outcomes:
    async def pressed(port: int) -> Outcomes:
        callers = [(user, _streaming(Caller(port), PACE)) for user in _users(streams)]
        return await press(callers, RAMP_SECONDS, stage.pick(8, 4))

    with run_baseline(stage.folder / f"baseline-{streams}", stage.stand_in) as baseline:
        return uvloop.run(pressed(baseline.port))


def _press_ours(stage: Stage, streams: int, workers: int) -> Pressed:
    folder = stage.folder / f"{streams}-{workers}"
    with ExitStack() as stack:
        kind = stage.plan.database if workers == 1 else "postgresql"
        settings = stack.enter_context(provide_database(kind))
        server = stack.enter_context(run_backend(folder, stage.stand_in, settings, workers))
        names = _users(streams)
        tenants = asyncio.run(move_in(database_url(folder, settings), len(set(names))))
        by_name = dict(zip(dict.fromkeys(names), tenants, strict=True))
        return uvloop.run(_press_server(stage, server, [(name, by_name[name]) for name in names]))


async def _press_server(stage: Stage, server: Running, users: list[tuple[str, Tenant]]) -> Pressed:
    lines = [(name, Caller(server.port, tenant.token)) for name, tenant in users]
    warm_up = [(name, _streaming(line, Pace(2, 0.01, 0.01))) for name, line in lines[:10]]
    for _ in range(3):
        await hold(warm_up, 0.001, 0.0, lambda: 0)
    before_bytes = server.memory_bytes
    held = [(name, _streaming(line, HELD_PACE)) for name, line in lines]
    held_bytes, opened = await hold(held, HELD_RAMP_SECONDS, HOLD_SECONDS, lambda: server.memory_bytes)
    probes, late = await asyncio.to_thread(_read_lags, server.port)
    before = _cpu_seconds(stage, server)
    began_at = time.monotonic()
    seconds = stage.pick(8, 4)
    async with watching_stalls(server.port, PROBE_LINES) as stalls:
        outcomes = await press([(name, _streaming(line, PACE)) for name, line in lines], RAMP_SECONDS, seconds)
    lasted = time.monotonic() - began_at
    cpu_shares = {name: (then - before[name]) / lasted for name, then in _cpu_seconds(stage, server).items()}
    probes_then, late_then = await asyncio.to_thread(_read_lags, server.port)
    for _, line in lines:
        line.hang_up()
    stream_bytes = (held_bytes - before_bytes) / max(1, opened)
    return Pressed(outcomes, stalls, opened, stream_bytes, cpu_shares, (probes_then - probes, late_then - late))


def _cpu_seconds(stage: Stage, server: Running) -> dict[str, float]:
    return {"server": server.cpu_seconds, "stand-in": stage.stand_in.cpu_seconds, "callers": time.process_time()}


def _streaming(caller: Caller, pace: Pace) -> Way:
    body = order(pace.as_text(), stream=True)

    async def stream() -> Heard:
        answer = await caller.ask("POST", SYNTHESIZE, body, is_stream=True)
        return answer.require_success().heard

    return stream


def _read_lags(port: int) -> tuple[int, int]:
    """The server's own probes of its loop so far, and how many of them were more than 25 ms late."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        page = answer.read().decode()
    counts = [
        sum(float(value) for value in re.findall(rf"^event_loop_lag_seconds_{name}\S* (\S+)$", page, re.MULTILINE))
        for name in ("count", r'bucket\{[^}]*le="0.025"[^}]*\}')
    ]
    return int(counts[0]), int(counts[0] - counts[1])
