"""How often and how long a call that surely was not accepted is made again (DESIGN §5)."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from app.dashscope.failures import ToldSeconds, backoff_seconds
from app.errors import AppError

MAX_ATTEMPTS = 4


class Patience:
    """What is left of the time and the attempts for one call, the first of which begins now.

    The time spent in a queue for a turn is not counted: who waits his turn does not fail for it.
    """

    def __init__(self, seconds: float, attempts: int = MAX_ATTEMPTS) -> None:
        self._ends_at = time.monotonic() + seconds
        self._attempts = attempts

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The time inside the block is not counted."""
        began_at = time.monotonic()
        try:
            yield
        finally:
            self._ends_at += time.monotonic() - began_at

    def pause_seconds(self, attempt: int, error: AppError) -> float | None:
        """How long to wait after a failed attempt, counted from 1, before the next; None when none shall follow.

        It is never shorter than the provider asked for.
        """
        if attempt >= self._attempts:
            return None
        told = error.retry_after_seconds if isinstance(error.retry_after_seconds, ToldSeconds) else 0
        pause = told + backoff_seconds(attempt)
        return pause if time.monotonic() + pause <= self._ends_at else None
