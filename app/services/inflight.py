"""Work that outlives the request it came from: tracked, and waited for at shutdown."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import structlog

from app.errors import AppError

log = structlog.get_logger(__name__)
CANCEL_SECONDS = 5.0
Result = TypeVar("Result")


class InFlight:
    """Tasks that no hang-up cancels. `drain()` lets them end, and cancels what does not end in time."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """Run work on its own; its unexpected failures are logged even when nobody waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finish)
        return task

    async def drain(self, seconds: float) -> None:
        """Wait for what is under way; after `seconds` cancel it, and wait until it has settled."""
        if not self._tasks:
            return
        _, late = await asyncio.wait(set(self._tasks), timeout=seconds)
        if late:
            log.warning("drain_cut_short", tasks=len(late))
        while late:  # some libraries swallow a cancellation on Python 3.11: say it until it is heard
            for task in late:
                task.cancel()
            _, late = await asyncio.wait(late, timeout=CANCEL_SECONDS)

    def _finish(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not isinstance(error, AppError):
            log.error("background_work_failed", error=type(error).__name__, exc_info=error)
