"""Where the time of a request goes, and what is to be known of it at its end: facts that the code below tells.

A request carries one mutable object in its context, which the tasks that it starts inherit. Outside a request nothing
is measured. It is meant for the event loop's thread only, and costs about a microsecond for each measure.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Literal

Kind = Literal["provider", "storage", "queue"]
"""Whom we wait for: the provider, the store, or our turn within the rate that the provider allows."""


class Stopwatch:
    """Adds up the time during which at least one block of it runs: those that overlap are not counted twice."""

    __slots__ = ("_around", "_began_at", "_depth", "_seconds")

    def __init__(self, around: "Stopwatch | None" = None) -> None:
        """Begin at nothing; the stopwatch `around` runs whenever this one does."""
        self._around = around
        self._began_at = 0.0
        self._depth = 0
        self._seconds = 0.0

    def __enter__(self) -> None:
        if not self._depth:
            self._began_at = time.perf_counter()
            if self._around is not None:
                self._around.__enter__()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._seconds += time.perf_counter() - self._began_at
            if self._around is not None:
                self._around.__exit__()

    @property
    def seconds(self) -> float:
        """What was measured so far, also while it runs."""
        return self._seconds + (time.perf_counter() - self._began_at if self._depth else 0.0)


class RequestTiming:
    """The times and the facts of one request, from now on."""

    __slots__ = ("_elsewhere", "_watches", "began_at", "facts", "first_byte_seconds")

    def __init__(self) -> None:
        self.began_at = time.perf_counter()
        self.first_byte_seconds: float | None = None
        self.facts: dict[str, object] = {}
        self._elsewhere = Stopwatch()
        self._watches: dict[Kind, Stopwatch] = {
            "provider": Stopwatch(self._elsewhere),
            "storage": Stopwatch(self._elsewhere),
            "queue": Stopwatch(self._elsewhere),
        }

    @property
    def seconds(self) -> float:
        """How long ago it began."""
        return time.perf_counter() - self.began_at

    def watch(self, kind: Kind) -> Stopwatch:
        """The stopwatch of whoever is waited for."""
        return self._watches[kind]

    def note_first_byte(self) -> None:
        """The first byte of the answer goes out now."""
        if self.first_byte_seconds is None:
            self.first_byte_seconds = self.seconds

    def waits_ms(self) -> dict[str, float]:
        """What was waited for, as fields of a log line."""
        return {f"{kind}_ms": to_ms(seconds) for kind, seconds in self._waits().items()}

    def server_timing(self) -> str:
        """The value of a `Server-Timing` header: what is neither the provider nor the store nor the queue is ours."""
        shares = {**self._waits(), "app": max(0.0, self.seconds - self._elsewhere.seconds)}
        return ", ".join(f"{name};dur={to_ms(seconds)}" for name, seconds in shares.items())

    def _waits(self) -> dict[str, float]:
        """Seconds by whom they were spent on; few requests queue, and only those tell of it."""
        waits: dict[str, float] = {kind: watch.seconds for kind, watch in self._watches.items()}
        return {kind: seconds for kind, seconds in waits.items() if seconds or kind != "queue"}


_current: ContextVar[RequestTiming | None] = ContextVar("request_timing", default=None)
_NOTHING: AbstractContextManager[None] = nullcontext()


@contextmanager
def timed_request() -> Iterator[RequestTiming]:
    """The block is a request: it is measured in this context, and in those that are copied from it."""
    timing = RequestTiming()
    token = _current.set(timing)
    try:
        yield timing
    finally:
        _current.reset(token)


def measure(kind: Kind) -> AbstractContextManager[None]:
    """Inside the block, somebody else is waited for."""
    timing = _current.get()
    return _NOTHING if timing is None else timing.watch(kind)


def note(**facts: object) -> None:
    """Tell something of the request for its line in the log: the latest counts, and None tells nothing."""
    timing = _current.get()
    if timing is not None:
        timing.facts.update((name, fact) for name, fact in facts.items() if fact is not None)


def to_ms(seconds: float) -> float:
    """Milliseconds as they are shown."""
    return round(seconds * 1000, 1)
