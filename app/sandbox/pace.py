"""When a frame of audio may be sent: not before the first audio is due, and not faster than it should go."""

from __future__ import annotations

import asyncio
import time


class Pace:
    """The pace of one task. `speed` and `first_audio_seconds` are those of the options."""

    def __init__(self, speed: float | None, first_audio_seconds: float) -> None:
        self._speed = speed
        self._first_audio_seconds = first_audio_seconds
        self._texts_since: float | None = None
        self._playing_since: float | None = None
        self._playing_until = 0.0

    def start(self) -> None:
        """A text has come; the first one counts."""
        if self._texts_since is None:
            self._texts_since = time.monotonic()

    async def wait_for_first(self) -> None:
        """Wait until the first audio is due."""
        if self._texts_since is not None:
            await asyncio.sleep(self._texts_since + self._first_audio_seconds - time.monotonic())

    async def wait(self, until: float) -> None:
        """Wait until the frames sent so far would have been heard. The next one plays to second `until`."""
        if self._speed is not None:
            now = time.monotonic()
            if self._playing_since is None or self._playing_since + self._playing_until < now:
                self._playing_since = now - self._playing_until
            else:
                await asyncio.sleep(self._playing_since + self._playing_until - now)
            self._playing_until = until / self._speed
