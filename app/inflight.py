"""Work that outlives the request it came from: tracked, and waited for at shutdown."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import structlog

from app.errors import AppError

log = structlog.get_logger(__name__)

# How long work may go on at shutdown by itself, after it was asked to stop, and between cancellations.
GRACE_SECONDS = 5.0
STOP_SECONDS = 8.0
CANCEL_SECONDS = 5.0
Result = TypeVar("Result")


class InFlight:
    """Tasks that no hang-up cancels. `drain()` lets them end, then asks them to stop, and cancels them at last."""

    def __init__(self, is_outage: Callable[[Exception], bool] = lambda _: False) -> None:
        """`is_outage` tells what a database that is busy or away raises, which is no failure of the work."""
        self._is_outage = is_outage
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stops: set[Callable[[], object]] = set()
        self._haste: set[Callable[[], object]] = set()
        self.leaving = False
        self.stopping = False
        self._hurried_at: float | None = None

    @property
    def hurried(self) -> bool:
        """Whether the process is about to end."""
        return self._hurried_at is not None

    @property
    def hurried_for_seconds(self) -> float:
        """How long ago that was told; 0 if it was not."""
        return 0.0 if self._hurried_at is None else time.monotonic() - self._hurried_at

    def start(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """Run work on its own; its unexpected failures are logged even when nobody waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finish)
        return task

    @contextmanager
    def stoppable(self, stop: Callable[[], object]) -> Iterator[None]:
        """Inside the block, have `stop` called when the process is about to end; at once when it already is."""
        self._stops.add(stop)
        try:
            if self.stopping:
                stop()
            yield
        finally:
            self._stops.discard(stop)

    @contextmanager
    def hastened(self, hasten: Callable[[], object]) -> Iterator[None]:
        """Inside the block, have `hasten` called once the process is about to end."""
        loop = asyncio.get_running_loop()

        def call() -> None:
            loop.call_soon_threadsafe(hasten)  # who tells it is a signal handler

        self._haste.add(call)
        try:
            if self.hurried:
                call()
            yield
        finally:
            self._haste.discard(call)

    def take_leave(self) -> None:
        """Let it be known that no more requests should come: the process will end soon."""
        self.leaving = True

    def hurry(self) -> None:
        """Let those who only wait for something wait no longer: the process is about to end."""
        self.leaving = True
        if self._hurried_at is None:
            self._hurried_at = time.monotonic()
        for call in list(self._haste):
            call()

    async def drain(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Bring everything under way to its settlement: by waiting, by asking it to stop, by cancelling it.

        The grace is counted from when the end was told, and is a little longer for what began late.
        """
        await self._wait(max(grace_seconds - self.hurried_for_seconds, min(grace_seconds, GRACE_SECONDS)))
        self.stopping = True
        for stop in list(self._stops):
            stop()
        await self._wait(STOP_SECONDS)
        while self._tasks:  # some libraries swallow a cancellation on Python 3.11: say it until it is heard
            log.warning("drain_cut_short", tasks=len(self._tasks))
            for task in self._tasks:
                task.cancel()
            await self._wait(CANCEL_SECONDS)

    async def _wait(self, seconds: float) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while self._tasks and (left := deadline - asyncio.get_running_loop().time()) > 0:
            await asyncio.wait(set(self._tasks), timeout=left)

    def _finish(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, Exception) and self._is_outage(error):
            log.warning("background_work_met_outage", error=type(error).__name__)
        elif error is not None and not isinstance(error, AppError):
            log.error("background_work_failed", error=type(error).__name__, exc_info=error)
