"""Counting requests against a rate: a sliding window per key. A refused request does not count."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable


class RateWindow:
    """So many per key in any stretch of `seconds`; a limit of None is no limit."""

    def __init__(self, limit: int | None, seconds: float) -> None:
        self._limit = limit
        self._seconds = seconds
        self._accepted: dict[Hashable, deque[float]] = {}

    def take(self, key: Hashable) -> bool:
        """Count one request; False when that is one too many."""
        if self._limit is None:
            return True
        now = time.monotonic()
        for old in [old for old, times in self._accepted.items() if now - times[-1] >= self._seconds]:
            del self._accepted[old]
        times = self._accepted.setdefault(key, deque())
        while times and now - times[0] >= self._seconds:
            times.popleft()
        if len(times) >= self._limit:
            return False
        times.append(now)
        return True
