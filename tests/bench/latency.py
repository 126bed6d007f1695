"""One call at a time: what we add to the whole of it, and to the first byte of a stream. Calls take turns."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from itertools import count

import uvloop

from tests.bench import bare
from tests.bench.client import SYNTHESIZE, Caller, order
from tests.bench.heard import Heard
from tests.bench.plan import Stage
from tests.bench.servers import Running, database_url, provide_database, run_backend, run_baseline
from tests.bench.stand_in import Pace
from tests.bench.table import Findings, Panel, Row, added, show_added, spread
from tests.bench.tenants import move_in

WARM_UP_ROUNDS = 10
WHOLE_MS, FIRST_BYTE_MS = 5.0, 3.0
WHOLE_PACE, STREAM_PACE = Pace(4, 0.01, 0.02), Pace(10, 0.025, 0.05)
Way = Callable[[], Awaitable[Heard]]


def measure_synthesize(stage: Stage) -> Findings:
    """The whole call, answered with the address of the stored audio."""
    return _with_servers(stage, _measure_synthesize)


def measure_stream(stage: Stage) -> Findings:
    """The first byte of a stream, and how long chunks are held back."""
    return _with_servers(stage, _measure_stream)


class Ways:
    """The same speech had in three ways: bare, from us, from the baseline."""

    def __init__(self, stage: Stage, ours: Running, baseline: Running, token: str) -> None:
        self.stage, self.ours, self.baseline = stage, ours, baseline
        self._token = token

    async def take_turns(self, pace: Pace, audio_format: str, *, stream: bool, rounds: int) -> dict[str, list[Heard]]:
        """Ask so many times in each way, one after the other."""
        text, body = pace.as_text(), order(pace.as_text(), format=audio_format, stream=stream)
        async with AsyncExitStack() as stack:
            line = await stack.enter_async_context(bare.open_line(self.stage.stand_in.ws_url))
            ours, baseline = Caller(self.ours.port, self._token), Caller(self.baseline.port)

            async def ask(caller: Caller) -> Heard:
                answer = await caller.ask("POST", SYNTHESIZE, body, is_stream=stream, keeps=stream)
                return answer.require_success().heard

            ways: dict[str, Way] = {
                "bare": lambda: bare.speak(line, text, audio_format, keeps=stream),
                "ours": lambda: ask(ours),
                "baseline": lambda: ask(baseline),
            }
            heard: dict[str, list[Heard]] = {name: [] for name in ways}
            for number in count(-WARM_UP_ROUNDS):
                if number == rounds:
                    break
                for name, way in ways.items():
                    call = await way()
                    if number >= 0:
                        heard[name].append(call)
            for caller in (ours, baseline):
                caller.hang_up()
        return heard


def _with_servers(stage: Stage, measure: Callable[[Ways], Awaitable[Findings]]) -> Findings:
    folder = stage.folder / "backend"
    with ExitStack() as stack:
        settings = stack.enter_context(provide_database(stage.plan.database))
        ours = stack.enter_context(run_backend(folder, stage.stand_in, settings))
        baseline = stack.enter_context(run_baseline(stage.folder / "baseline", stage.stand_in))
        [tenant] = asyncio.run(move_in(database_url(folder, settings), 1))

        async def measured() -> Findings:
            return await measure(Ways(stage, ours, baseline, tenant.token))

        return uvloop.run(measured())


async def _measure_synthesize(ways: Ways) -> Findings:
    rounds = ways.stage.pick(120, 25)
    cpu = {"ours": -ways.ours.cpu_seconds, "baseline": -ways.baseline.cpu_seconds}
    heard = await ways.take_turns(WHOLE_PACE, "mp3", stream=False, rounds=rounds)
    cpu["ours"] += ways.ours.cpu_seconds
    cpu["baseline"] += ways.baseline.cpu_seconds
    took = {name: [call.whole_ms for call in calls] for name, calls in heard.items()}
    addition = added(took["bare"], took["ours"])
    row = Row(
        f"warm synthesize: addition, median ≤ {WHOLE_MS:g} ms",
        spread(took["ours"]),
        addition[0] <= WHOLE_MS,
        spread(took["bare"]),
        show_added(addition),
        f"{spread(took['baseline'])} ({show_added(added(took['bare'], took['baseline']))})",
    )
    per_call = {name: seconds * 1000 / (rounds + WARM_UP_ROUNDS) for name, seconds in cpu.items()}
    note = f"processor per synthesis: ours {per_call['ours']:.1f} ms, baseline {per_call['baseline']:.1f} ms"
    return Findings([row], [Panel("synthesize, whole call", "ms", took)], [note])


async def _measure_stream(ways: Ways) -> Findings:
    rounds = ways.stage.pick(60, 15)
    heard = await ways.take_turns(STREAM_PACE, "pcm", stream=True, rounds=rounds)
    first = {name: [call.first_ms for call in calls] for name, calls in heard.items()}
    addition = added(first["bare"], first["ours"])
    late = {name: [late for call in calls for late in lateness_ms(call)] for name, calls in heard.items()}
    held = {name: max(chunks_held(call) for call in calls) for name, calls in heard.items()}
    rows = [
        Row(
            f"stream=true, 1 stream: addition to the first byte, median ≤ {FIRST_BYTE_MS:g} ms",
            spread(first["ours"]),
            addition[0] <= FIRST_BYTE_MS,
            spread(first["bare"]),
            show_added(addition),
            f"{spread(first['baseline'])} ({show_added(added(first['bare'], first['baseline']))})",
        ),
        Row(
            "chunks held back: at most 1",
            str(held["ours"]),
            held["ours"] <= 1,
            str(held["bare"]),
            baseline=str(held["baseline"]),
        ),
        Row(
            "a chunk at the client after the stand-in sent it",
            spread(late["ours"], "ms"),
            None,
            spread(late["bare"]),
            show_added(added(late["bare"], late["ours"])),
            spread(late["baseline"]),
        ),
    ]
    note = (
        f"the latest chunk of a single stream came {max(late['ours']):.1f} ms after it was sent;"
        f" one is sent every {STREAM_PACE.every_seconds * 1000:.0f} ms"
    )
    panels = [Panel("stream, first byte", "ms", first), Panel("stream, chunk after it was sent", "ms", late)]
    return Findings(rows, panels, [note])


def lateness_ms(call: Heard) -> list[float]:
    """How long after it was sent each chunk was here."""
    return [(here - sent) * 1000 for sent, here in call.chunks()]


def chunks_held(call: Heard) -> int:
    """How many later chunks had been sent, at most, before one was here."""
    chunks = call.chunks()
    return max(
        sum(later_sent < here for later_sent, _ in chunks[number + 1 :]) for number, (_, here) in enumerate(chunks)
    )
