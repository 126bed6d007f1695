"""The limit on task submissions (PROTOCOL.md §1.10): so many run-tasks per API key and model in any second."""

from __future__ import annotations

import time
from collections import deque
from typing import Final

from app.sandbox.failures import TaskFailed

_WINDOW_SECONDS: Final = 1.0


def throttled() -> TaskFailed:
    """The failure of a submission over the limit (§1.10, §11)."""
    return TaskFailed("Requests rate limit exceeded, please try again later.", "Throttling.RateQuota")


class RunTaskQuota:
    """A sliding window per key and model. A refused submission does not count."""

    def __init__(self, per_second: int | None) -> None:
        self._per_second = per_second
        self._accepted: dict[tuple[str, str], deque[float]] = {}

    def take(self, api_key: str, model: str) -> None:
        """Count one submission, or raise `throttled`."""
        if self._per_second is None:
            return
        now = time.monotonic()
        for key in [key for key, times in self._accepted.items() if now - times[-1] >= _WINDOW_SECONDS]:
            del self._accepted[key]
        times = self._accepted.setdefault((api_key, model), deque())
        while times and now - times[0] >= _WINDOW_SECONDS:
            times.popleft()
        if len(times) >= self._per_second:
            raise throttled()
        times.append(now)
