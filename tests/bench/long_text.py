"""A long text: how long it takes, when its file is ready, and whether memory grows with it.

The ideal is what the stand-in itself takes, and nothing else: the due time of each segment (from its start to its last
piece, as the stand-in's own timetable has it), put in order on LONG_TEXT_PARALLELISM lines, each on the first that is
free. Each text has a server of its own, so that the peaks can be compared.
"""

import asyncio
import heapq
import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import uvloop

from tests.bench.client import SYNTHESIZE_LONG, Answer, Caller, order
from tests.bench.plan import Stage
from tests.bench.servers import Running, database_url, provide_database, run_backend
from tests.bench.table import Findings, Panel, Row
from tests.bench.tenants import move_in

PARALLELISM = 4  # the default of LONG_TEXT_PARALLELISM
SENTENCE = "山不在高有仙则名水不在深有龙则灵斯是陋室惟吾德馨苔痕上阶绿草色入帘青谈笑有鸿儒往来无白丁。"
SENTENCES_PER_SEGMENT = 22
TIMES_AS_LONG = 4
RATIO, READY_SECONDS = 1.2, 2.0
# What the memory of the same work differs by from one process to the next.
NOISE_BYTES = 10 * 1024 * 1024
SAMPLE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Narrated:
    """One long text; `rest_bytes` is the server's memory before it."""

    segments: int
    seconds: float
    ideal_seconds: float
    ready_seconds: float
    rest_bytes: int
    peak_bytes: int


class Peak:
    """The most memory that a server was seen to have."""

    def __init__(self) -> None:
        self.bytes = 0


def measure(stage: Stage) -> Findings:
    """A text, and one several times as long."""
    segments = stage.pick(4, 2)
    short, long = (_narrate(stage, segments * times) for times in (1, TIMES_AS_LONG))
    rows = []
    for text in (short, long):
        ratio = text.seconds / text.ideal_seconds
        what = f"long text, {text.segments} segments"
        rows.append(
            Row(
                f"{what}: ≤ {RATIO:g} × the ideal of {PARALLELISM} at once",
                f"{text.seconds:.1f} s, {ratio:.2f} ×",
                ratio <= RATIO,
                f"{text.ideal_seconds:.1f} s",
                f"{text.seconds - text.ideal_seconds:+.1f} s",
            )
        )
        rows.append(
            Row(
                f"{what}: file ready ≤ {READY_SECONDS:g} s after the last piece",
                f"{text.ready_seconds:.2f} s",
                text.ready_seconds <= READY_SECONDS,
            )
        )
    growth = long.peak_bytes - short.peak_bytes
    rows.append(
        Row(
            f"memory for a text {TIMES_AS_LONG} times as long: no more",
            f"{_mb(short.peak_bytes)} and {_mb(long.peak_bytes)} at most",
            growth <= NOISE_BYTES,
            addition=f"{growth / 1e6:+.0f} MB",
        )
    )
    note = f"memory before the long texts: {_mb(short.rest_bytes)}, {_mb(long.rest_bytes)}"
    shown = {"ideal": [short.ideal_seconds, long.ideal_seconds], "ours": [short.seconds, long.seconds]}
    return Findings(rows, [Panel("long texts", "s", shown)], [note])


def ideal_seconds(due_seconds: Iterable[float], lines: int) -> float:
    """When the last of some tasks would end that follow each other on so many lines."""
    ends = [0.0] * lines
    for due in due_seconds:
        heapq.heapreplace(ends, ends[0] + due)
    return max(ends)


def _narrate(stage: Stage, segments: int) -> Narrated:
    folder = stage.folder / f"{segments}"
    with ExitStack() as stack:
        settings = stack.enter_context(provide_database(stage.plan.database))
        server = stack.enter_context(
            run_backend(folder, stage.stand_in, {**settings, "LONG_TEXT_PARALLELISM": str(PARALLELISM)})
        )
        [tenant] = asyncio.run(move_in(database_url(folder, settings), 1))
        text = SENTENCE * SENTENCES_PER_SEGMENT
        uvloop.run(_ask(server, tenant.token, text[:100]))  # whatever is loaded at the first text
        rest_bytes = server.memory_bytes
        began_at = time.monotonic()
        with _watching_memory(server) as peak:
            answer = uvloop.run(_ask(server, tenant.token, text * segments))
        tasks = [task for task in json.loads(stage.stand_in.tasks()) if task["started_at"] >= began_at]
    ended_at = answer.heard.ended_at or 0.0
    return Narrated(
        answer.data["segments"],
        ended_at - answer.heard.began_at,
        ideal_seconds(
            (task["due_seconds"] for task in sorted(tasks, key=lambda task: task["started_at"])), PARALLELISM
        ),
        ended_at - max(task["last_audio_at"] for task in tasks),
        rest_bytes,
        peak.bytes,
    )


async def _ask(server: Running, token: str, text: str) -> Answer:
    caller = Caller(server.port, token)
    answer = await caller.ask("POST", SYNTHESIZE_LONG, order(text))
    caller.hang_up()
    return answer.require_success()


@contextmanager
def _watching_memory(server: Running) -> Iterator[Peak]:
    peak, is_over = Peak(), threading.Event()

    def watch() -> None:
        while not is_over.wait(SAMPLE_SECONDS):
            peak.bytes = max(peak.bytes, server.memory_bytes)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        is_over.set()
        watcher.join()


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f} MB"
