"""What the provider has counted, to compare bills with: `GET /_sandbox/ledger`, `?api_key=` for one account.

One entry for each piece of work that was accepted, in the order of acceptance:

    {"kind": "speech", "id": "...", "model": "cosyvoice-v3-flash", "api_key": "...", "counted": 15,
     "accepted_at": "2026-01-01T00:00:00+00:00", "ended": "finished"}

kind            id           counted                                         ended
speech          task_id      characters (§1.8)                               finished, failed, cancelled, replaced,
                                                                             disconnected, null while it goes on
recognition     request_id   seconds of audio; 0 for qwen-audio-asr,         finished
                             which was never sold (§4.2)
transcription   task_id      what the task's usage says: seconds per track   finished, failed, cancelled,
                             (§5.1), or seconds of speech (§5.2)             null while it goes on
enrollment      request_id   voices made, or made again: 1                   finished

Speech counts what was synthesized until the task's end, whichever it was. For a client that vanishes the protocol says
that the task is dropped and no usage is told (§1.7); every sentence's usage is cumulative (§1.5), so the sandbox takes
it that what was synthesized by then stays billed and nothing after it: the sentences that were spoken to their end, and
the share of the one being sent. A task-failed or a dropped socket ends a task the same way. A truncated or malformed
stream is counted in full, as its task-finished says.

Over HTTP the work is done and counted once the whole request has come, even if its client has hung up by then or the
answer is lost on its way (`close_after`, `delay`, `late`). A request that a fault answers, drops or cuts without the
work counts nothing, and neither does a refusal. A `task_queries` fault changes what is told, not what is counted.

Clearing the calls or the requests clears their part of the ledger.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import Final, Literal

from app.sandbox.calls import CallLog
from app.sandbox.request_log import RequestLog
from app.sandbox.tasks import Task, TaskBook

_ENDED: Final = {"SUCCEEDED": "finished", "FAILED": "failed", "CANCELED": "cancelled"}


@dataclass(frozen=True, slots=True)
class Work:
    """One entry."""

    kind: Literal["speech", "recognition", "transcription", "enrollment"]
    id: str
    model: str
    api_key: str
    counted: int
    accepted_at: datetime
    ended: str | None


def read_ledger(calls: CallLog, requests: RequestLog, tasks: TaskBook, api_key: str | None = None) -> list[Work]:
    """All accepted work, of one account if `api_key` is given; the oldest first."""
    work = chain(_speech(calls), _requests(requests), map(_transcription, tasks))
    wanted = (entry for entry in work if api_key in (None, entry.api_key))
    return sorted(wanted, key=lambda entry: entry.accepted_at)


def _speech(calls: CallLog) -> Iterator[Work]:
    for call in calls:
        if call.accepted:
            at = datetime.fromtimestamp(call.submitted_at, UTC)
            yield Work("speech", call.task_id, call.model, call.api_key, call.characters, at, call.outcome)


def _requests(requests: RequestLog) -> Iterator[Work]:
    for seen in requests:
        if seen.counted is not None:
            yield Work(
                kind="recognition" if seen.action is None else "enrollment",
                id=seen.request_id,
                model=seen.model or "",
                api_key=seen.api_key,
                counted=seen.counted,
                accepted_at=datetime.fromisoformat(seen.time),
                ended="finished",
            )


def _transcription(task: Task) -> Work:
    ended = _ENDED.get(task.status)
    counted = task.billed if ended == "finished" else 0
    return Work("transcription", task.task_id, task.order.model, task.api_key, counted, task.submitted_at, ended)
