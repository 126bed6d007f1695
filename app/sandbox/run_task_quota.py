"""The limit on task submissions (PROTOCOL.md §1.10): so many run-tasks per API key and model in any second."""

from __future__ import annotations

from app.sandbox.failures import TaskFailed
from app.sandbox.rate_window import RateWindow


def throttled() -> TaskFailed:
    """The failure of a submission over the limit (§1.10, §11)."""
    return TaskFailed("Requests rate limit exceeded, please try again later.", "Throttling.RateQuota")


class RunTaskQuota:
    """A window of one second per key and model."""

    def __init__(self, per_second: int | None) -> None:
        self._window = RateWindow(per_second, 1.0)

    def take(self, api_key: str, model: str) -> None:
        """Count one submission, or raise `throttled`."""
        if not self._window.take((api_key, model)):
            raise throttled()
