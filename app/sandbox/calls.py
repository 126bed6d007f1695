"""What was asked of the sandbox, for tests to look at: `GET /_sandbox/calls`."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from app.sandbox.failures import TaskFailed

_log = logging.getLogger("app.sandbox")

Outcome = Literal["finished", "failed", "cancelled", "disconnected", "replaced"]


@dataclass(slots=True)
class Call:
    """One task, from its run-task message on. `outcome` is None while it runs."""

    connection: int
    api_key: str
    task_id: str
    model: str
    parameters: Mapping[str, Any]
    text: str = ""
    characters: int = 0
    outcome: Outcome | None = None
    error_code: str | None = None
    error_message: str | None = None
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    finished_at: datetime | None = None
    audio_bytes: int = 0
    audio_frames: int = 0

    def note(self, failure: TaskFailed) -> None:
        self.error_code, self.error_message = failure.code, failure.message

    def fail(self, failure: TaskFailed) -> None:
        self.note(failure)
        self.end("failed")

    def end(self, outcome: Outcome) -> None:
        """Settle the outcome and log it: never the text, the key or the audio."""
        self.outcome = outcome
        self.finished_at = datetime.now(UTC)
        _log.info(
            "sandbox task connection=%d model=%.40r outcome=%s error=%s characters=%d frames=%d bytes=%d seconds=%.3f",
            self.connection,
            self.model,
            outcome,
            self.error_code,
            self.characters,
            self.audio_frames,
            self.audio_bytes,
            (self.finished_at - self.started_at).total_seconds(),
        )

    def as_json(self) -> dict[str, object]:
        return {
            "connection": self.connection,
            "api_key": self.api_key,
            "task_id": self.task_id,
            "model": self.model,
            "parameters": dict(self.parameters),
            "text": self.text,
            "characters": self.characters,
            "outcome": self.outcome,
            "error_code": self.error_code,
            "error_message": self.error_message,
            "started_at": self.started_at.isoformat(),
            "finished_at": self.finished_at.isoformat() if self.finished_at else None,
            "audio_bytes": self.audio_bytes,
            "audio_frames": self.audio_frames,
        }


class CallLog:
    """The latest calls, and how many sockets were opened since the last clearing."""

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

    def clear(self) -> None:
        self._calls.clear()
        self._connections_before_clearing = self._connections

    def as_json(self) -> list[dict[str, object]]:
        return [call.as_json() for call in self._calls]
