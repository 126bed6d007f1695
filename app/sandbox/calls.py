"""What was asked of the sandbox, for tests to look at: `GET /_sandbox/calls`, `?api_key=` for one account."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from app.sandbox.failures import TaskFailed

_log = logging.getLogger("app.sandbox")

Outcome = Literal["finished", "failed", "cancelled", "disconnected", "replaced"]


@dataclass(slots=True)
class Call:
    """One task, from its run-task message on. `outcome` is None while it runs.

    `texts` are the accepted texts as they came, `messages` all its continue-tasks and `flushes` those that asked for
    one. `format` and `sample_rate` are what it was told or got by default, None if it was refused. Times are seconds
    since the epoch.
    """

    connection: int
    api_key: str
    task_id: str
    model: str
    parameters: Mapping[str, Any]
    format: str | None = None
    sample_rate: int | None = None
    texts: list[str] = field(default_factory=list)
    messages: int = 0
    flushes: int = 0
    characters: int = 0
    outcome: Outcome | None = None
    error_code: str | None = None
    error_message: str | None = None
    submitted_at: float = field(default_factory=time.time)
    ended_at: float | None = None
    audio_bytes: int = 0
    audio_frames: int = 0

    @property
    def accepted(self) -> bool:
        """Whether the task was let in: neither throttled nor refused."""
        return self.format is not None

    def note(self, failure: TaskFailed) -> None:
        self.error_code, self.error_message = failure.code, failure.message

    def fail(self, failure: TaskFailed) -> None:
        self.note(failure)
        self.end("failed")

    def end(self, outcome: Outcome) -> None:
        """Settle the outcome and log it: never the text, the key or the audio."""
        self.outcome = outcome
        self.ended_at = time.time()
        _log.info(
            "sandbox task connection=%d model=%.40r outcome=%s error=%s characters=%d frames=%d bytes=%d seconds=%.3f",
            self.connection,
            self.model,
            outcome,
            self.error_code,
            self.characters,
            self.audio_frames,
            self.audio_bytes,
            self.ended_at - self.submitted_at,
        )

    def as_json(self) -> dict[str, object]:
        return {
            "connection": self.connection,
            "api_key": self.api_key,
            "task_id": self.task_id,
            "model": self.model,
            "parameters": dict(self.parameters),
            "format": self.format,
            "sample_rate": self.sample_rate,
            "text": "".join(self.texts),
            "messages": self.messages,
            "flushes": self.flushes,
            "characters": self.characters,
            "outcome": self.outcome,
            "error_code": self.error_code,
            "error_message": self.error_message,
            "submitted_at": self.submitted_at,
            "ended_at": self.ended_at,
            "audio_bytes": self.audio_bytes,
            "audio_frames": self.audio_frames,
        }


class CallLog:
    """The latest calls in order of submission, and how many sockets were opened since the last clearing."""

    def __init__(self, kept: int) -> None:
        self._calls: deque[Call] = deque(maxlen=kept)
        self._connections = 0
        self._connections_before_clearing = 0

    @property
    def connections_opened(self) -> int:
        return self._connections - self._connections_before_clearing

    def open_connection(self) -> int:
        """The number of a new socket: 1, 2, 3 in the order of handshakes, also across clearings."""
        self._connections += 1
        return self._connections

    def add(self, call: Call) -> None:
        self._calls.append(call)

    def __iter__(self) -> Iterator[Call]:
        return iter(self._calls)

    def clear(self) -> None:
        self._calls.clear()
        self._connections_before_clearing = self._connections

    def as_json(self, api_key: str | None = None) -> list[dict[str, object]]:
        """All calls, or those of one account."""
        return [call.as_json() for call in self._calls if api_key in (None, call.api_key)]
