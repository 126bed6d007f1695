"""Faults of the HTTP services, as parts of `PUT /_sandbox/faults` (see `faults`).

`requests` is a list; the first entry whose `path` begins the path asked for, and whose `method` fits, is used:

    {"path": "/api/v1/tasks", "method": "GET", "action": null, "how": "answer", "count": 2,
     "status": 429, "code": "Throttling.RateQuota", "message": "...", "body": null, "retry_after": null, "seconds": 0}

    answer        this status, code and message instead of the work; `body` replaces the envelope by any text, and
                  `retry_after` adds a Retry-After header of so many seconds, which DashScope does not document (§11)
    delay         the work is done, the answer comes `seconds` later
    late          the work is done only after `seconds`, then the answer comes; hanging up stops neither this nor delay
    silent        never an answer
    close         the connection is closed without the work
    close_after   the connection is closed after the work

`seconds` holds every kind back before it strikes. `path` may also be that of uploads and of result files. An `action`,
such as `create_voice`, strikes only the requests of the enrollment service that ask for it.

`task_queries` changes what a query of a known task tells, not the task: {"state": "FAILED", "code": "DECODE_ERROR",
"message": "..."}, {"state": "RUNNING"}, {"state": "UNKNOWN"}, or {"without_usage": true}.

`results` strikes result files: {"how": "status", "status": 403} (404, 500, ...), {"how": "garbage"},
{"how": "redirect", "url": "..."}, {"how": "endless"}, or {"how": "elsewhere", "url": "..."}, which is not about the
file but about the `transcription_url` that queries tell.

`uploads` strikes the form upload: {"how": "refused"} or {"how": "expired"}.

Each has a `count` that runs down to 0; -1, its default, stays.
"""

from __future__ import annotations

from typing import Final, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

ALWAYS: Final = -1
"""A count that never runs out."""

STRICT: Final = ConfigDict(extra="forbid", strict=True)
"""Nothing unknown, nothing converted."""


@dataclass(slots=True, config=STRICT)
class Counted:
    """A fault that strikes `count` times."""

    count: int = Field(default=ALWAYS, ge=ALWAYS)

    def take(self) -> bool:
        """Use one up; False when none is left."""
        if self.count > 0:
            self.count -= 1
            return True
        return self.count == ALWAYS


@dataclass(slots=True, config=STRICT)
class RequestFault(Counted):
    path: str = "/"
    method: str | None = None
    action: str | None = None
    how: Literal["answer", "delay", "late", "silent", "close", "close_after"] = "answer"
    seconds: float = Field(default=0.0, ge=0)
    status: int = Field(default=500, ge=200, le=599)
    code: str = "InternalError"
    message: str = "An internal error has occured, please try again later."
    body: str | None = None
    retry_after: int | None = Field(default=None, ge=0)

    def meets(self, method: str, path: str, action: str | None) -> bool:
        return path.startswith(self.path) and self.method in (None, method) and self.action in (None, action)


@dataclass(slots=True, config=STRICT)
class TaskQueryFault(Counted):
    state: Literal["PENDING", "RUNNING", "FAILED", "CANCELED", "SUSPENDED", "UNKNOWN"] | None = None
    code: str = "InternalError"
    message: str = "An internal error has occured, please try again later."
    without_usage: bool = False


@dataclass(slots=True, config=STRICT)
class ResultFault(Counted):
    how: Literal["status", "garbage", "redirect", "endless", "elsewhere"] = "status"
    status: int = Field(default=500, ge=400, le=599)
    url: str = "http://127.0.0.1:9/elsewhere.json"


@dataclass(slots=True, config=STRICT)
class UploadFault(Counted):
    how: Literal["refused", "expired"] = "refused"
