"""Many callers at once: each has speech streamed again and again, and what became of every call is written down."""

import asyncio
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.bench.client import Caller, Refused
from tests.bench.heard import Heard

CALL_SECONDS = 30.0
PAUSE_AFTER_FAILURE_SECONDS = 0.5
PROBES_PER_SECOND = 50
Way = Callable[[], Awaitable[Heard]]


@dataclass(slots=True)
class Outcomes:
    """The calls that were begun in steady state, and who had one at any time."""

    calls: dict[str, list[Heard]] = field(default_factory=lambda: defaultdict(list))
    failures: Counter[str] = field(default_factory=Counter)
    served: set[str] = field(default_factory=set)
    seconds: float = 0.0

    @property
    def first_ms(self) -> list[float]:
        """The first byte of every stream."""
        return [call.first_ms for calls in self.calls.values() for call in calls]

    def medians_ms(self, of: Callable[[Heard], float]) -> dict[str, float]:
        """The median of each user's calls."""
        return {user: statistics.median(map(of, calls)) for user, calls in self.calls.items()}

    @property
    def summary(self) -> str:
        """How many, how many a second, and what failed."""
        count = sum(map(len, self.calls.values()))
        failed = ", ".join(f"{number} × {reason}" for reason, number in self.failures.most_common(3))
        return f"{count} streams ({count / self.seconds:.0f}/s), failed: {failed or 'none'}"


async def press(callers: list[tuple[str, Way]], ramp_seconds: float, steady_seconds: float) -> Outcomes:
    """Have everybody begin within the ramp, and go on to the end of the steady state; the last calls are heard out."""
    outcomes = Outcomes(seconds=steady_seconds)
    steady_at = time.monotonic() + ramp_seconds
    ends_at = steady_at + steady_seconds

    async def repeat(user: str, way: Way, wait_seconds: float) -> None:
        await asyncio.sleep(wait_seconds)
        while (began_at := time.monotonic()) < ends_at:
            try:
                async with asyncio.timeout(CALL_SECONDS):
                    heard = await way()
            except (Refused, OSError) as error:
                outcomes.failures[f"{type(error).__name__} {error}"[:80]] += began_at >= steady_at
                await asyncio.sleep(PAUSE_AFTER_FAILURE_SECONDS)
            else:
                outcomes.served.add(user)
                if began_at >= steady_at:
                    outcomes.calls[user].append(heard)

    pause = ramp_seconds / len(callers)
    await asyncio.gather(*(repeat(user, way, place * pause) for place, (user, way) in enumerate(callers)))
    outcomes.failures += Counter()  # without those that are none
    return outcomes


async def hold(
    callers: list[tuple[str, Way]], ramp_seconds: float, seconds: float, look: Callable[[], int]
) -> tuple[int, int]:
    """Have everybody listen to one stream, and look after some time; gives what was seen, and how many were open."""

    async def listen(way: Way, wait_seconds: float) -> Heard:
        await asyncio.sleep(wait_seconds)
        return await way()

    pause = ramp_seconds / len(callers)
    streams = [asyncio.create_task(listen(way, place * pause)) for place, (_, way) in enumerate(callers)]
    await asyncio.sleep(seconds)
    seen, looked_at = look(), time.monotonic()
    calls = await asyncio.gather(*streams)
    return seen, sum((call.first_at or looked_at) < looked_at < (call.ended_at or 0.0) for call in calls)


@dataclass(slots=True)
class Stalls:
    """How long others kept somebody waiting who asked for next to nothing, in milliseconds; and how late our own timer
    rang meanwhile, which is no fault of the server."""

    server_ms: list[float] = field(default_factory=list)
    own_ms: list[float] = field(default_factory=list)


@asynccontextmanager
async def watching_stalls(port: int, lines: int) -> AsyncIterator[Stalls]:
    """Ask a server inside the block, many times a second, whether it lives; on several lines in turn."""
    stalls, callers = Stalls(), [Caller(port) for _ in range(lines)]

    async def probe(caller: Caller) -> None:
        answer = await caller.get("/health/live")
        stalls.server_ms.append(answer.heard.whole_ms)

    async def watch() -> None:
        next_at = time.monotonic()
        async with asyncio.TaskGroup() as probes:
            while True:
                for caller in callers:
                    next_at += 1 / PROBES_PER_SECOND
                    await asyncio.sleep(max(0.0, next_at - time.monotonic()))
                    stalls.own_ms.append(max(0.0, time.monotonic() - next_at) * 1000)
                    if caller.is_free:
                        probes.create_task(probe(caller))

    watcher = asyncio.create_task(watch())
    try:
        yield stalls
    finally:
        watcher.cancel()
        await asyncio.wait([watcher])
        for caller in callers:
            caller.hang_up()
