"""Long audio to text by asynchronous tasks (PROTOCOL §5)."""

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import quote

import httpx
import structlog

from app.dashscope.answers import BEIJING, count, read_instant, read_moment, read_object, read_text
from app.dashscope.credential import Credential
from app.dashscope.hosts import require_provider_url
from app.dashscope.http import HttpClient, pieces
from app.dashscope.uploads import RESOLVE_UPLOADS
from app.errors import ConnectionLost, UnclearAnswer, UpstreamError, UpstreamNotFound
from app.probes import provider_call, provider_try

log = structlog.get_logger(__name__)

PATH = "/services/audio/asr/transcription"
# Twelve hours of Chinese with word times come to about 16 MB a track.
MAX_RESULT_BYTES = 64 * 1024 * 1024
# A task that failed for these reasons has heard everything, and there was nothing to hear (§5.2).
SILENCE = {"SUCCESS_WITH_NO_VALID_FRAGMENT", "ASR_RESPONSE_HAVE_NO_WORDS"}
LISTED_AT_ONCE = 100  # the largest page that is allowed is not documented
MAX_PAGES = 200
MAX_TASK_ID_CHARS = 128

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
class ListedTask:
    """What the provider's list says of a task: nothing of its file."""

    task_id: str
    status: TaskStatus
    model: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class TaskReport:
    """What the provider says of a task. `seconds` is what it bills, once it has counted.

    `file_urls` are the files that it is about, where the answer tells them: that of one of the models does.
    """

    status: TaskStatus
    submitted_at: datetime | None = None
    scheduled_at: datetime | None = None
    ended_at: datetime | None = None
    result_url: str | None = None
    seconds: int | None = None
    code: str = ""
    message: str = ""
    request_id: str | None = None
    file_urls: tuple[str, ...] = ()

    @property
    def is_silent(self) -> bool:
        """Whether the audio was read to its end without any speech in it."""
        return self.status == "FAILED" and self.code in SILENCE


class TranscriptionClient:
    """Submits tasks, looks after them and fetches their results."""

    def __init__(self, http: HttpClient) -> None:
        self._http = http

    async def submit(self, credential: Credential, order: TranscriptionOrder, file_url: str) -> Submission:
        """Hand a file over. Raises the AppError that a refusal means, and UnclearAnswer for one that names no task.

        See `may_have_worked` for those after which there may be a task all the same.
        """
        headers = {"X-DashScope-Async": "enable"}
        if file_url.startswith("oss://"):
            headers |= RESOLVE_UPLOADS
        with provider_call("transcription", order.model):
            answer = await self._http.post(credential, PATH, compose(order, file_url), headers)
            output = read_object(answer.get("output"))
            task_id = _task_id(output)
            if task_id is None:
                raise UnclearAnswer("百炼平台没有返回任务ID，请稍后重试")
        return Submission(task_id, _status(output), read_text(answer.get("request_id")))

    async def inspect(self, credential: Credential, task_id: str) -> TaskReport:
        """Ask how a task is doing, once. Raises the AppError that a refusal means; a failed task is no refusal."""
        try:
            with provider_call("transcription"):
                return read_report(await self._http.get(credential, f"/tasks/{quote(task_id, safe='')}", attempts=1))
        except UpstreamNotFound:  # how it says so is not documented (§14)
            return TaskReport("UNKNOWN")

    async def find(
        self,
        credential: Credential,
        model: str,
        since: datetime,
        until: datetime,
        wait_for_turn: Callable[[], Awaitable[None]],
    ) -> list[ListedTask]:
        """The tasks of a model that the account has, whoever submitted them, of this window at least (§5.3).

        It must be shorter than 16 hours. What is refused without a better reason is asked for without a window: the
        last 24 hours in pages of the default size. Raises the AppError that a refusal means.
        """
        # In which zone the window is read is not documented: this one holds ours in UTC as well as in Beijing's time.
        window = {"start_time": _clock(since.astimezone(UTC)), "end_time": _clock(until.astimezone(BEIJING))}
        try:
            found = await self._find(
                credential, {"model_name": model, **window, "page_size": str(LISTED_AT_ONCE)}, wait_for_turn
            )
        except UpstreamError as error:
            if type(error) is not UpstreamError:
                raise
            log.warning("provider_task_window_refused")
            found = await self._find(credential, {"model_name": model}, wait_for_turn)
        return [task for task in found if task.model == model and since <= task.created_at <= until]

    async def _find(
        self, credential: Credential, asked: dict[str, str], wait_for_turn: Callable[[], Awaitable[None]]
    ) -> list[ListedTask]:
        found: dict[str, ListedTask] = {}
        for page_no in range(1, MAX_PAGES + 1):
            await wait_for_turn()
            with provider_call("transcription", asked["model_name"]):
                answer = await self._http.get(credential, "/tasks/", {**asked, "page_no": str(page_no)}, attempts=1)
                listed = answer.get("data")
                if not isinstance(listed, list):
                    raise UnclearAnswer
            known, pages = len(found), count(answer.get("total_page"))
            found |= {task.task_id: task for entry in listed if (task := _read_listed(read_object(entry)))}
            if len(found) == known or (pages is not None and page_no >= pages):
                return list(found.values())
        log.warning("provider_task_list_endless", pages=MAX_PAGES)
        raise UnclearAnswer

    async def fetch(self, credential: Credential, url: str, take: Callable[[bytes], Awaitable[None]]) -> None:
        """Fetch a result file in pieces, from a host of the provider's only and without the key (§5.1).

        Raises UpstreamError when that will never do: another host, too large, a redirect; and ConnectionLost or
        UpstreamTimeout when it may do later.
        """
        request = self._http.build_request("GET", require_provider_url(url, credential))
        with provider_call("transcription"), provider_try():
            await self._fetch(request, take)

    async def _fetch(self, request: httpx.Request, take: Callable[[bytes], Awaitable[None]]) -> None:
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
        file_urls=tuple(read_text(each.get("file_url")) or "" for each in parts),
    )


def is_same_file(named: str, told: str) -> bool:
    """Whether a task is about the file that we named in an order of ours, by what the provider tells of the task.

    An upload gets another address when it is read, but no other name, and that was made for this one order (§6).
    """
    if told == named or not named.startswith("oss://"):
        return told == named
    return told.partition("?")[0].rpartition("/")[2] == named.rpartition("/")[2]


def _read_listed(entry: dict[str, Any]) -> ListedTask | None:
    task_id, created_at = _task_id(entry), read_instant(entry.get("gmt_create"))
    if task_id is None or created_at is None:
        log.warning("provider_task_unreadable", task_id=task_id)
        return None
    status = _status({"task_status": entry.get("status")})
    return ListedTask(task_id, status, read_text(entry.get("model_name")) or "", created_at)


def _task_id(source: dict[str, Any]) -> str | None:
    task_id = source.get("task_id")
    if not isinstance(task_id, str) or not 0 < len(task_id) <= MAX_TASK_ID_CHARS or not task_id.strip("."):
        return None
    return task_id


def _clock(moment: datetime) -> str:
    return f"{moment:%Y%m%d%H%M%S}"


def _status(output: dict[str, Any]) -> TaskStatus:
    told = output.get("task_status")
    status = _STATUSES.get(told) if isinstance(told, str) else None
    if status is None:
        log.warning("provider_task_status_unknown", task_status=str(told)[:32])
        return "RUNNING"
    return status
