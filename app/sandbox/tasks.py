"""Asynchronous tasks (PROTOCOL.md §5.3): PENDING for a third of their time, then RUNNING, then over; kept 24 hours."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, Literal
from zoneinfo import ZoneInfo

from app.sandbox.transcription_order import TranscriptionOrder

Status = Literal["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "CANCELED"]

KEPT: Final = timedelta(hours=24)
BEIJING: Final = ZoneInfo("Asia/Shanghai")
_PENDING_SHARE: Final = 1 / 3


@dataclass(frozen=True, slots=True)
class Subtask:
    """What became of one file: a result document and the seconds to pay for, or an error code."""

    url: str
    document: bytes = b""
    billed: int = 0
    code: str | None = None
    message: str = ""


@dataclass(slots=True)
class Task:
    """One submission. `subtasks` is None until the work is done."""

    api_key: str
    request_id: str
    order: TranscriptionOrder
    seconds: float
    task_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    submitted_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    subtasks: Sequence[Subtask] | None = None
    ended_at: datetime | None = None
    canceled: bool = False

    @property
    def scheduled_at(self) -> datetime:
        return self.submitted_at + timedelta(seconds=self.seconds * _PENDING_SHARE)

    @property
    def status(self) -> Status:
        if self.canceled:
            return "CANCELED"
        now = datetime.now(UTC)
        if now < self.scheduled_at:
            return "PENDING"
        if self.subtasks is None or self.ended_at is None or now < self.ended_at:
            return "RUNNING"
        return "SUCCEEDED" if any(subtask.code is None for subtask in self.subtasks) else "FAILED"

    @property
    def billed(self) -> int:
        """The seconds to pay for once the task has succeeded."""
        return sum(subtask.billed for subtask in self.subtasks or ())

    @property
    def is_forgotten(self) -> bool:
        return self.ended_at is not None and datetime.now(UTC) > self.ended_at + KEPT

    def cancel(self) -> bool:
        """Stop the task if it is still PENDING."""
        if self.status != "PENDING":
            return False
        self.canceled = True
        self.ended_at = datetime.now(UTC)
        return True

    def finish(self, subtasks: Sequence[Subtask]) -> None:
        """The work is done; the task ends when its time is over."""
        self.subtasks = subtasks
        self.ended_at = max(datetime.now(UTC), self.submitted_at + timedelta(seconds=self.seconds))


class TaskBook:
    """Every task that is not forgotten yet."""

    def __init__(self) -> None:
        self._tasks: dict[str, Task] = {}

    def add(self, task: Task) -> None:
        for task_id in [task_id for task_id, known in self._tasks.items() if known.is_forgotten]:
            del self._tasks[task_id]
        self._tasks[task.task_id] = task

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks.values())

    def find(self, task_id: str, api_key: str | None = None) -> Task | None:
        """A task by its id, of this account only if `api_key` is given."""
        task = self._tasks.get(task_id)
        if task is None or task.is_forgotten or api_key not in (None, task.api_key):
            return None
        return task

    def of_account(self, api_key: str) -> list[Task]:
        """The account's tasks, the latest first."""
        found = [task for task in self._tasks.values() if task.api_key == api_key and not task.is_forgotten]
        return sorted(found, key=lambda task: task.submitted_at, reverse=True)


def beijing(moment: datetime) -> str:
    """A time as the task API writes it: Beijing's clock, milliseconds, no zone (§5.1)."""
    return moment.astimezone(BEIJING).isoformat(" ", "milliseconds")[:23]
