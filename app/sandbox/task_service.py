"""Submitting transcriptions and the task API (PROTOCOL.md §5)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from starlette.requests import Request

from app.sandbox.audio_sources import Asker
from app.sandbox.envelope import ServiceError, rate_exceeded, refused_parameter, refused_url
from app.sandbox.faults import Faults
from app.sandbox.options import SandboxOptions
from app.sandbox.rate_window import RateWindow
from app.sandbox.recognition_models import FILETRANS
from app.sandbox.recognition_service import is_enabled
from app.sandbox.request_log import SeenRequest
from app.sandbox.result_files import ResultFiles
from app.sandbox.service_door import Answer, read_document
from app.sandbox.tasks import BEIJING, Subtask, Task, TaskBook, beijing
from app.sandbox.transcription_order import read_transcription
from app.sandbox.transcription_work import TranscriptionWork

_LIST_WINDOW: Final = timedelta(hours=24)
_LARGEST_PAGE: Final = 100


class TaskService:
    """Takes submissions, does them in the background and tells how they are."""

    def __init__(
        self, options: SandboxOptions, faults: Faults, work: TranscriptionWork, tasks: TaskBook, results: ResultFiles
    ) -> None:
        self._options = options
        self._faults = faults
        self._work = work
        self._tasks = tasks
        self._results = results
        self._submissions = RateWindow(options.recognitions_per_minute, 60.0)
        self._queries = RateWindow(options.task_requests_per_second, 1.0)
        self._working: set[asyncio.Task[None]] = set()

    async def submit(self, request: Request, seen: SeenRequest) -> Answer:
        """`POST /api/v1/services/audio/asr/transcription`."""
        if not is_enabled(request, "x-dashscope-async"):
            raise ServiceError(403, "AccessDenied", "current user api does not support synchronous calls.")
        order = read_transcription(await read_document(request, seen))
        resolves_oss = is_enabled(request, "x-dashscope-ossresourceresolve")
        if order.model == FILETRANS:
            if order.urls[0].startswith("oss://") and not resolves_oss:
                raise refused_url()
            if not self._submissions.take(seen.api_key):
                raise rate_exceeded()
        task = Task(seen.api_key, seen.request_id, order, self._options.task_seconds)
        seen.task_id = task.task_id
        self._tasks.add(task)
        asker = Asker(seen.api_key, order.model, request.headers.get("host", ""), resolves_oss)
        working = asyncio.create_task(self._do(task, asker, seen))
        self._working.add(working)
        working.add_done_callback(self._working.discard)
        return {"output": {"task_id": task.task_id, "task_status": "PENDING"}}

    async def query(self, request: Request, seen: SeenRequest) -> Answer:
        """`GET /api/v1/tasks/{task_id}`: always a 200; an unknown task is UNKNOWN (§5.3)."""
        task = self._asked_for(request, seen)
        if task is None:
            return {"output": {"task_id": seen.task_id, "task_status": "UNKNOWN"}}
        fault = self._faults.take_task_query()
        if fault is None:
            return self._told(task, request)
        if fault.state is not None:
            seen.fault = fault.state
            return _forced(task, fault.state, fault.code, fault.message)
        seen.fault = "without_usage"
        return {name: part for name, part in self._told(task, request).items() if name != "usage"}

    async def cancel(self, request: Request, seen: SeenRequest) -> Answer:
        """`POST /api/v1/tasks/{task_id}/cancel`: only what is PENDING."""
        task = self._asked_for(request, seen)
        if task is None or not task.cancel():
            message = "Failed to cancel the task, please confirm if the task is in PENDING status."
            raise ServiceError(400, "UnsupportedOperation", message)
        return {}

    async def list(self, request: Request, seen: SeenRequest) -> Answer:
        """`GET /api/v1/tasks/`: the account's tasks by time, model and status, page by page."""
        self._count(seen)
        asked = request.query_params
        page, size = _number(asked, "page_no", 1, None), _number(asked, "page_size", 10, _LARGEST_PAGE)
        now = datetime.now(UTC)
        end = _moment(asked, "end_time") or now
        start = _moment(asked, "start_time") or end - _LIST_WINDOW
        if not timedelta(0) <= end - start <= _LIST_WINDOW:
            raise refused_parameter("start_time")
        found = [
            task
            for task in self._tasks.of_account(seen.api_key)
            if start <= task.submitted_at <= end
            and asked.get("task_id") in (None, "", task.task_id)
            and asked.get("model_name") in (None, "", task.order.model)
            and asked.get("status") in (None, "", task.status)
        ]
        return {
            "total": len(found),
            "data": [_listed(task) for task in found[(page - 1) * size : page * size]],
            "total_page": math.ceil(len(found) / size),
            "page_no": page,
            "page_size": size,
        }

    def _count(self, seen: SeenRequest) -> None:
        if not self._queries.take(seen.api_key):
            raise rate_exceeded()

    def _asked_for(self, request: Request, seen: SeenRequest) -> Task | None:
        self._count(seen)
        seen.task_id = task_id = request.path_params["task_id"]
        task = self._tasks.find(task_id, seen.api_key)
        seen.model = task.order.model if task else None
        return task

    async def _do(self, task: Task, asker: Asker, seen: SeenRequest) -> None:
        """Read the files once the task is RUNNING: until then they may still be taken away."""
        await asyncio.sleep((task.scheduled_at - datetime.now(UTC)).total_seconds())
        if task.status != "CANCELED":
            task.finish(await self._work.do(task.order, asker, seen))

    def _told(self, task: Task, request: Request) -> dict[str, Any]:
        """A task as a query tells it (§5.1, §5.2): `result` of filetrans, `results` of paraformer."""
        status = task.status
        output: dict[str, Any] = {
            "task_id": task.task_id,
            "task_status": status,
            "submit_time": beijing(task.submitted_at),
        }
        if status != "PENDING" and not task.canceled:
            output["scheduled_time"] = beijing(task.scheduled_at)
        if task.ended_at is not None and status not in ("PENDING", "RUNNING"):
            output["end_time"] = beijing(task.ended_at)
        subtasks = task.subtasks if status in ("SUCCEEDED", "FAILED") and task.subtasks is not None else ()
        succeeded = sum(subtask.code is None for subtask in subtasks)
        metrics = {"TOTAL": len(task.order.urls), "SUCCEEDED": succeeded, "FAILED": len(subtasks) - succeeded}
        if status == "FAILED":
            output["code"], output["message"] = subtasks[0].code, subtasks[0].message
        urls = [self._result_url(task, number, request) for number in range(len(subtasks))]
        if task.order.model != FILETRANS:
            results = [_result(subtask, url) for subtask, url in zip(subtasks, urls, strict=True)]
            output |= {"results": results} if subtasks else {}
            output["task_metrics"] = metrics
        elif not subtasks:
            output["task_metrics"] = metrics
        elif succeeded:
            output["result"] = {"transcription_url": urls[0]}
        if status != "SUCCEEDED":
            return {"output": output}
        unit = "seconds" if task.order.model == FILETRANS else "duration"
        return {"output": output, "usage": {unit: task.billed}}

    def _result_url(self, task: Task, number: int, request: Request) -> str:
        origin = f"http://{request.headers.get('host', '')}"
        return self._faults.take_result_url() or f"{origin}{self._results.path(task, number)}"


def _result(subtask: Subtask, url: str) -> dict[str, str]:
    if subtask.code is not None:
        failure = {"code": subtask.code, "message": subtask.message}
        return {"file_url": subtask.url, **failure, "subtask_status": "FAILED"}
    return {"file_url": subtask.url, "transcription_url": url, "subtask_status": "SUCCEEDED"}


def _forced(task: Task, state: str, code: str, message: str) -> dict[str, Any]:
    """An answer that says what a fault wants it to."""
    output: dict[str, Any] = {"task_id": task.task_id, "task_status": state}
    if state == "UNKNOWN":
        return {"output": output}
    output["submit_time"] = beijing(task.submitted_at)
    if state == "FAILED":
        output |= {"scheduled_time": beijing(task.scheduled_at), "end_time": beijing(datetime.now(UTC))}
        output |= {"code": code, "message": message}
    return {"output": output}


def _listed(task: Task) -> dict[str, Any]:
    model, status = task.order.model, task.status
    entry: dict[str, Any] = {
        "task_id": task.task_id,
        "status": status,
        "model_name": model,
        "region": "cn-beijing",
        "request_id": task.request_id,
        "api_key_id": "sandbox",
        "caller_uid": "sandbox",
        "caller_parent_id": "sandbox",
        "gmt_create": _milliseconds(task.submitted_at),
        "user_api_unique_key": f"apikey:v1:audio:asr:transcription:{model}",
    }
    if status != "PENDING" and not task.canceled:
        entry["start_time"] = _milliseconds(task.scheduled_at)
    if task.ended_at is not None and status not in ("PENDING", "RUNNING"):
        entry["end_time"] = _milliseconds(task.ended_at)
    return entry


def _milliseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)


def _number(asked: Mapping[str, str], name: str, default: int, highest: int | None) -> int:
    value = asked.get(name) or str(default)
    if not value.isascii() or not value.isdigit() or not 1 <= int(value) <= (highest or int(value)):
        raise refused_parameter(name)
    return int(value)


def _moment(asked: Mapping[str, str], name: str) -> datetime | None:
    """A time of the query, in Beijing's clock."""
    value = asked.get(name)
    if not value:
        return None
    try:
        return datetime.strptime(value, "%Y%m%d%H%M%S").replace(tzinfo=BEIJING)
    except ValueError:
        raise refused_parameter(name) from None
