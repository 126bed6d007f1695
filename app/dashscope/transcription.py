"""Long audio to text by asynchronous tasks (PROTOCOL §5)."""

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from urllib.parse import quote

import structlog

from app.dashscope.answers import count, read_moment, read_object, read_text
from app.dashscope.credential import Credential
from app.dashscope.hosts import require_provider_url
from app.dashscope.http import HttpClient, pieces
from app.dashscope.uploads import RESOLVE_UPLOADS
from app.errors import ConnectionLost, UpstreamError, UpstreamNotFound

log = structlog.get_logger(__name__)

PATH = "/services/audio/asr/transcription"
# Twelve hours of Chinese with word times come to about 16 MB a track.
MAX_RESULT_BYTES = 64 * 1024 * 1024
# A task that failed for these reasons has heard everything, and there was nothing to hear (§5.2).
SILENCE = {"SUCCESS_WITH_NO_VALID_FRAGMENT", "ASR_RESPONSE_HAVE_NO_WORDS"}

TaskStatus = Literal["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "UNKNOWN"]
_STATUSES: dict[str, TaskStatus] = {
    "PENDING": "PENDING",
    "RUNNING": "RUNNING",
    "SUSPENDED": "RUNNING",
    "SUCCEEDED": "SUCCEEDED",
    "FAILED": "FAILED",
    "CANCELED": "FAILED",
    "UNKNOWN": "UNKNOWN",
}


@dataclass(frozen=True, slots=True)
class TranscriptionOrder:
    """What is to be transcribed, and how. Each channel is billed (§5.1)."""

    model: str
    language: str | None = None
    enable_itn: bool = False
    context: str | None = None
    channel_ids: tuple[int, ...] = (0,)
    enable_words: bool = False


@dataclass(frozen=True, slots=True)
class Submission:
    """A task that the provider has taken on."""

    task_id: str
    status: TaskStatus
    request_id: str | None


@dataclass(frozen=True, slots=True)
class TaskReport:
    """What the provider says of a task. `seconds` is what it bills, once it has counted."""

    status: TaskStatus
    submitted_at: datetime | None = None
    scheduled_at: datetime | None = None
    ended_at: datetime | None = None
    result_url: str | None = None
    seconds: int | None = None
    code: str = ""
    message: str = ""
    request_id: str | None = None

    @property
    def is_silent(self) -> bool:
        """Whether the audio was read to its end without any speech in it."""
        return self.status == "FAILED" and self.code in SILENCE


class TranscriptionClient:
    """Submits tasks, looks after them and fetches their results."""

    def __init__(self, http: HttpClient) -> None:
        self._http = http

    async def submit(self, credential: Credential, order: TranscriptionOrder, file_url: str) -> Submission:
        """Hand a file over. Raises the AppError that a refusal means."""
        headers = {"X-DashScope-Async": "enable"}
        if file_url.startswith("oss://"):
            headers |= RESOLVE_UPLOADS
        answer = await self._http.post(credential, PATH, compose(order, file_url), headers)
        output = read_object(answer.get("output"))
        task_id = output.get("task_id")
        if not isinstance(task_id, str) or not 0 < len(task_id) <= 128 or not task_id.strip("."):
            raise UpstreamError("百炼平台没有返回任务ID，请稍后重试")
        return Submission(task_id, _status(output), read_text(answer.get("request_id")))

    async def inspect(self, credential: Credential, task_id: str) -> TaskReport:
        """Ask how a task is doing, once. Raises the AppError that a refusal means; a failed task is no refusal."""
        try:
            return read_report(await self._http.get(credential, f"/tasks/{quote(task_id, safe='')}", attempts=1))
        except UpstreamNotFound:  # how it says so is not documented (§14)
            return TaskReport("UNKNOWN")

    async def fetch(self, credential: Credential, url: str, take: Callable[[bytes], Awaitable[None]]) -> None:
        """Fetch a result file in pieces, from a host of the provider's only and without the key (§5.1).

        Raises UpstreamError when that will never do: another host, too large, a redirect; and ConnectionLost or
        UpstreamTimeout when it may do later.
        """
        request = self._http.build_request("GET", require_provider_url(url, credential))
        async with self._http.stream(request) as answer:
            if answer.status_code >= 400:
                raise ConnectionLost(f"转写结果暂时无法下载（HTTP {answer.status_code}）")
            if answer.status_code != 200:
                raise UpstreamError(f"转写结果无法下载（HTTP {answer.status_code}）")
            async with aclosing(pieces(answer, MAX_RESULT_BYTES)) as body:
                async for piece in body:
                    await take(piece)


def compose(order: TranscriptionOrder, file_url: str) -> dict[str, Any]:
    """The body of a submission: the two models differ in nearly every name (§5.1, §5.2)."""
    parameters: dict[str, Any] = {"channel_id": list(order.channel_ids)}
    if order.model == "paraformer-v2":
        parameters["timestamp_alignment_enabled"] = True
        if order.language:
            parameters["language_hints"] = [order.language]
        return {"model": order.model, "input": {"file_urls": [file_url]}, "parameters": parameters}
    parameters |= {"enable_itn": order.enable_itn, "enable_words": order.enable_words}
    if order.language:
        parameters["language"] = order.language
    if order.context:
        parameters["corpus"] = {"text": order.context}
    return {"model": order.model, "input": {"file_url": file_url}, "parameters": parameters}


def read_report(answer: dict[str, Any]) -> TaskReport:
    """Read the answer of the task API, with `result` of one model or `results` of the other (§5.3)."""
    output, usage = read_object(answer.get("output")), read_object(answer.get("usage"))
    results = output.get("results")
    parts = [each for each in results if isinstance(each, dict)] if isinstance(results, list) else []
    done = next((each for each in parts if each.get("subtask_status", "SUCCEEDED") == "SUCCEEDED"), {})
    failed = next((each for each in parts if each.get("subtask_status") == "FAILED"), {})
    status, result = _status(output), read_object(output.get("result"))
    if status == "SUCCEEDED" and failed and not done:
        status = "FAILED"
    source = output if output.get("code") else failed
    seconds = count(usage.get("seconds"))
    return TaskReport(
        status=status,
        submitted_at=read_moment(output.get("submit_time")),
        scheduled_at=read_moment(output.get("scheduled_time")),
        ended_at=read_moment(output.get("end_time")),
        result_url=read_text(result.get("transcription_url")) or read_text(done.get("transcription_url")),
        seconds=count(usage.get("duration")) if seconds is None else seconds,
        code=str(source.get("code") or ("CANCELED" if output.get("task_status") == "CANCELED" else "")),
        message=str(source.get("message") or ""),
        request_id=read_text(answer.get("request_id")),
    )


def _status(output: dict[str, Any]) -> TaskStatus:
    told = output.get("task_status")
    status = _STATUSES.get(told) if isinstance(told, str) else None
    if status is None:
        log.warning("provider_task_status_unknown", task_status=str(told)[:32])
        return "RUNNING"
    return status
