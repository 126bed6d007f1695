"""The clock that both timeouts of a socket read (PROTOCOL.md §1.7)."""

from __future__ import annotations

import asyncio
import contextlib
import time


class SilenceClock:
    """Counts silence up to a limit: the time without a task, or the time of a task since its last text that no audio
    is sent in. While audio is sent it stands still."""

    def __init__(self, limit: float) -> None:
        self._changed = asyncio.Event()
        self.start(limit)

    def start(self, limit: float) -> None:
        """Count from nothing."""
        self._limit = limit
        self._counted = 0.0
        self._going_since: float | None = time.monotonic()
        self._changed.set()

    def start_over(self) -> None:
        """Forget what was counted; standing still is not ended by that."""
        self._counted = 0.0
        if self._going_since is not None:
            self._going_since = time.monotonic()
        self._changed.set()

    def stop(self) -> None:
        """Stand still."""
        if self._going_since is not None:
            self._counted += time.monotonic() - self._going_since
            self._going_since = None
            self._changed.set()

    def go_on(self) -> None:
        """Count again."""
        if self._going_since is None:
            self._going_since = time.monotonic()
            self._changed.set()

    @property
    def has_run_out(self) -> bool:
        left = self._seconds_left()
        return left is not None and left <= 0

    async def run_out(self) -> None:
        """Return when the limit is reached."""
        while not self.has_run_out:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds_left()):
                    await self._changed.wait()

    def _seconds_left(self) -> float | None:
        if self._going_since is None:
            return None
        return self._limit - self._counted - (time.monotonic() - self._going_since)
