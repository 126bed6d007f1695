"""Waiting for a change that somebody else in this process makes."""

import asyncio
from collections.abc import Callable


class Bell:
    """Rung at every change; whoever waits looks each time whether it was the one he waits for."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def ring(self) -> None:
        """Tell that something changed."""
        self._rung.set()
        self._rung = asyncio.Event()

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait until it is so."""
        while not is_so():
            await self._rung.wait()

    async def wait(self, seconds: float) -> None:
        """Wait for the next change, but no longer than that."""
        try:
            async with asyncio.timeout(seconds):
                await self._rung.wait()
        except TimeoutError:
            return
