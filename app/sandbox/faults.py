"""Faults that a test can switch on: `PUT /_sandbox/faults`. Without one, the sandbox behaves."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Literal, get_args

import orjson
from pydantic import TypeAdapter

from app.sandbox.http_faults import ALWAYS, RequestFault, ResultFault, TaskQueryFault, UploadFault
from app.sandbox.storage_faults import StorageFault

Breakage = Literal["fail", "close", "silent", "truncate", "garbage", "foreign", "headless", "misshapen"]


@dataclass
class Faults:
    """What goes wrong next. Counts run down to 0; `ALWAYS` stays.

    throttle_tasks       run-tasks refused with Throttling.RateQuota
    refuse_handshakes    handshakes refused with HTTP `refuse_status`, and with a Retry-After header if
                         `refuse_retry_after` is a number of seconds
    break_tasks          tasks that break after `break_after_frames` audio frames, if they have more than that;
                         `break_how` is
        fail             task-failed with InternalError
        close            the socket drops without task-failed
        silent           nothing more
        truncate         no more audio, but all events, and task-finished with the full count
        garbage          a text frame that is no JSON; this and those below come once, then all goes on as if nothing
        foreign          an event of an unknown name
        headless         an event without a header
        misshapen        a result-generated with values of other types than documented
    hold_tasks           tasks that start but get no audio until the faults are replaced; they go on then
    oss_unavailable      object requests answered with 503

    The others are described in `http_faults`, `oss` in `storage_faults`.
    """

    throttle_tasks: int = 0
    refuse_handshakes: int = 0
    refuse_status: int = 503
    refuse_retry_after: int | None = None
    break_tasks: int = 0
    break_after_frames: int = 0
    break_how: Breakage = "fail"
    hold_tasks: int = 0
    oss_unavailable: int = 0
    oss: list[StorageFault] = field(default_factory=list)
    requests: list[RequestFault] = field(default_factory=list)
    task_queries: TaskQueryFault | None = None
    results: ResultFault | None = None
    uploads: UploadFault | None = None

    def __post_init__(self) -> None:
        self._replaced = asyncio.Event()

    def replace(self, wanted: Faults) -> None:
        """Become `wanted`, and let go of the tasks that were held."""
        for each in fields(self):
            setattr(self, each.name, getattr(wanted, each.name))
        self._replaced.set()
        self._replaced = asyncio.Event()

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    def take_hold(self) -> asyncio.Event | None:
        """What a held task waits for, None for a task that isn't held."""
        return self._replaced if self.take("hold_tasks") else None

    def take(
        self, name: Literal["throttle_tasks", "refuse_handshakes", "break_tasks", "hold_tasks", "oss_unavailable"]
    ) -> bool:
        """Use one of a fault up; False when there is none."""
        left: int = getattr(self, name)
        if left > 0:
            setattr(self, name, left - 1)
        return left != 0

    def take_request(self, method: str, path: str, action: str | None) -> RequestFault | None:
        """The fault that strikes this request, used up by one."""
        return next((fault for fault in self.requests if fault.meets(method, path, action) and fault.take()), None)

    def take_storage(self, method: str) -> StorageFault | None:
        """The fault that strikes this request for an object, used up by one."""
        return next((fault for fault in self.oss if fault.method in (None, method) and fault.take()), None)

    def take_task_query(self) -> TaskQueryFault | None:
        return self.task_queries if self.task_queries and self.task_queries.take() else None

    def take_upload(self) -> UploadFault | None:
        return self.uploads if self.uploads and self.uploads.take() else None

    def take_result(self) -> ResultFault | None:
        """The fault that strikes a result file."""
        fault = self.results
        return fault if fault and fault.how != "elsewhere" and fault.take() else None

    def take_result_url(self) -> str | None:
        """The URL to tell instead of a result file's own."""
        fault = self.results
        return fault.url if fault and fault.how == "elsewhere" and fault.take() else None


_PARTS: Final[Mapping[str, TypeAdapter[Any]]] = {
    "oss": TypeAdapter(list[StorageFault]),
    "requests": TypeAdapter(list[RequestFault]),
    "task_queries": TypeAdapter(TaskQueryFault | None),
    "results": TypeAdapter(ResultFault | None),
    "uploads": TypeAdapter(UploadFault | None),
}


def read_faults(document: Mapping[str, Any]) -> Faults:
    """Faults from their JSON form. Names that are absent are off; `ValueError` names what is not understood."""
    faults = Faults()
    names = {field.name for field in fields(faults)}
    for name, value in document.items():
        if name in _PARTS:
            whole = [value] if name == "oss" and isinstance(value, dict) else value
            setattr(faults, name, _PARTS[name].validate_json(orjson.dumps(whole)))
            continue
        if name == "break_how":
            understood = value in get_args(Breakage)
        elif name == "refuse_retry_after":
            understood = value is None or (type(value) is int and value >= 0)
        elif name == "refuse_status":
            understood = type(value) is int and 400 <= value <= 599
        else:
            understood = name in names and type(value) is int and value >= ALWAYS
        if not understood:
            raise ValueError(name)
        setattr(faults, name, value)
    return faults
