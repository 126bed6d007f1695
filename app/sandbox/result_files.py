"""Result files of tasks: at a signed URL that anybody may read until it expires (PROTOCOL.md §5.1)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from app.sandbox.faults import Faults
from app.sandbox.http_faults import ResultFault
from app.sandbox.oss_errors import OssError
from app.sandbox.request_log import SeenRequest
from app.sandbox.service_door import Answer
from app.sandbox.signed_links import SignedLinks
from app.sandbox.tasks import BEIJING, KEPT, Task, TaskBook

RESULT_BUCKET: Final = "dashscope-result-sandbox"
_ENDLESS_PIECE: Final = b'{"transcripts":[' + b" " * 65_536


class ResultFiles:
    """Names result files and serves them."""

    def __init__(self, tasks: TaskBook, faults: Faults) -> None:
        self._tasks = tasks
        self._faults = faults
        self._links = SignedLinks()

    def path(self, task: Task, number: int) -> str:
        """Where the result of a task's file is, with the query that opens it."""
        submitted = task.submitted_at.astimezone(BEIJING)
        path = f"/{RESULT_BUCKET}/prod/{task.order.model}/{submitted:%Y%m%d/%H:%M}/{task.task_id}-{number + 1}.json"
        ended = task.ended_at or task.submitted_at
        return self._links.sign(path, ended + KEPT)

    async def read(self, request: Request, seen: SeenRequest) -> Answer:
        """`GET` of a result file, without a key."""
        if fault := self._faults.take_result():
            seen.fault = fault.how
            return _struck(fault)
        path = self._links.check(request)
        task_id, _, number = path.rpartition("/")[2].removesuffix(".json").rpartition("-")
        task = self._tasks.find(task_id)
        if task is None or not task.subtasks:
            raise OssError(404, "NoSuchKey", "The specified key does not exist.")
        seen.task_id, seen.model = task_id, task.order.model
        return Response(task.subtasks[int(number) - 1].document, media_type="application/json")


def _struck(fault: ResultFault) -> Response:
    if fault.how == "status":
        raise OssError(fault.status, "AccessDenied" if fault.status == 403 else "InternalError", "Told to by a fault.")
    if fault.how == "garbage":
        return Response(b"\x00<html>no JSON</html>", media_type="application/json")
    if fault.how == "redirect":
        return RedirectResponse(fault.url, 302)
    return StreamingResponse(_endless(), media_type="application/json")


async def _endless() -> AsyncIterator[bytes]:
    while True:
        yield _ENDLESS_PIECE
        await asyncio.sleep(0.001)
