"""Finding tasks whose submission was never answered, by the provider's list and the file that each task is about.

The list shows the tasks of everybody who uses the account, and nothing of their files. So a task is taken for ours only
once it has told that it is about the file that we named, which those do that have succeeded.
"""

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog

from app.completion import run_to_end
from app.dashscope import Credential, ListedTask, TranscriptionClient, is_same_file, may_pass, read_file_url
from app.errors import AppError, InvalidApiKey, NoApiKey, NotReady, SealBroken, UpstreamTimeout
from app.inflight import InFlight
from app.jobs import Rounds, again_in
from app.models import SubmittedFile, Transcription
from app.services.accounts import AccountService
from app.services.calls import Status
from app.services.collection import KEPT, TaskCollector
from app.services.submissions import ClaimedFile, OpenSubmissions

log = structlog.get_logger(__name__)

CLOCKS_DIFFER = timedelta(minutes=1)  # ours and the provider's, at most
# How long after its submission a task may take to be made, or to be listed.
LOST_FOR = timedelta(minutes=5)
SHORTEST_INTERVAL_SECONDS = 2.0
LONGEST_INTERVAL_SECONDS = 300.0
AGE_SHARE = 0.2  # of the time since the submission, one waits until the next look
# How long one looks, and how long before a record that has no end yet gets one.
LOOK_SECONDS = 300.0
FIRST_LOOK_SECONDS = 10.0
READ_AT_ONCE = 20  # tasks of which one look finds out what they are about
REMEMBERED = 2000
LOST_SO_FAR = "服务中断，任务可能已被百炼接受并计费；后台会继续查找，找到后更新本记录"
LOST_FOR_GOOD = "百炼平台没有返回结果，之后也没有找到对应的任务；没有转写结果，是否计费以百炼账单为准"


@dataclass(frozen=True, slots=True)
class Sought:
    """What a look brought: a task, or nothing; `is_open` if there are some of which it can't be told yet."""

    task_id: str | None
    is_open: bool = False


class TaskSeeker(Rounds[SubmittedFile]):
    """Looks for lost tasks: those of dead processes, and those whose answer did not come."""

    at_once = 16
    per_user = 4

    def __init__(
        self,
        submissions: OpenSubmissions,
        accounts: AccountService,
        client: TranscriptionClient,
        collector: TaskCollector,
        in_flight: InFlight,
    ) -> None:
        super().__init__(submissions, in_flight)
        self._submissions = submissions
        self._accounts = accounts
        self._client = client
        self._collector = collector
        self._files: dict[str, str] = {}

    async def seek(self, claimed: ClaimedFile, credential: Credential, patience_seconds: float) -> Sought:
        """Look for the task of a submission, and leave it to the collector once it is found.

        Raises the AppError that kept it from an answer.
        """
        try:
            async with asyncio.timeout(patience_seconds):
                return await self._seek(claimed, credential)
        except TimeoutError:
            raise UpstreamTimeout from None

    async def _seek(self, claimed: ClaimedFile, credential: Credential) -> Sought:
        sent_at, model = _sent_at(claimed), claimed.record.model_name
        since, until = sent_at - CLOCKS_DIFFER, sent_at + LOST_FOR + CLOCKS_DIFFER

        async def wait_for_turn() -> None:
            await self._collector.wait_for_turn(credential)

        listed = await self._client.find(credential, model, since, until, wait_for_turn)
        if await self._submissions.has_rival(claimed):
            return Sought(None, is_open=True)
        taken = await self._submissions.attributed([task.task_id for task in listed])
        strangers = sorted((task for task in listed if task.task_id not in taken), key=lambda task: task.created_at)
        done = [task for task in strangers if task.status in {"SUCCEEDED", "FAILED"}]
        unread = [task for task in done if task.task_id not in self._files][:READ_AT_ONCE]
        is_open = False
        for task in done:
            if task in unread:
                await self._read(credential, task)
            file_url = self._files.get(task.task_id)
            is_open = is_open or file_url is None
            if file_url and is_same_file(claimed.row.file_url, file_url) and await self._adopt(claimed, task):
                return Sought(task.task_id)
        return Sought(None, is_open or any(task.status in {"PENDING", "RUNNING"} for task in strangers))

    async def _read(self, credential: Credential, task: ListedTask) -> None:
        """Remember which file a task is about; an empty one if that will never be known, none if it may be later."""
        try:
            file_url = await self._tell_file(credential, task.task_id)
        except (NoApiKey, SealBroken, InvalidApiKey):
            raise
        except AppError as error:
            log.warning("listed_task_unread", task_id=task.task_id, error=type(error).__name__)
            file_url = None if may_pass(error) else ""
        if file_url is None:
            return
        while len(self._files) >= REMEMBERED:
            del self._files[next(iter(self._files))]
        self._files[task.task_id] = file_url

    async def _tell_file(self, credential: Credential, task_id: str) -> str | None:
        report = await self._collector.inspect(credential, task_id)
        if report.status not in {"SUCCEEDED", "FAILED"}:
            return None
        if report.file_urls:
            return report.file_urls[0] if len(report.file_urls) == 1 else ""  # ours are about one file each
        if not report.result_url:
            return ""
        return await self._collector.read(credential, report.result_url, read_file_url) or ""

    async def _adopt(self, claimed: ClaimedFile, task: ListedTask) -> bool:
        now = datetime.now(UTC)
        found = Transcription(
            record_id=claimed.record.id,
            user_id=claimed.row.user_id,
            task_id=task.task_id,
            key_fingerprint=claimed.row.key_fingerprint,
            status="RUNNING",
            submitted_at=task.created_at,
            checked_at=now,
            next_check_at=now,
        )
        if not await run_to_end(self._submissions.adopt(claimed, found)):
            return False
        log.info("lost_task_found", record_id=claimed.record.id, task_id=task.task_id)
        self._collector.wake()
        return True

    async def _ask(self, claimed: ClaimedFile) -> dict[str, Any]:
        row, failure = claimed.row, None
        is_ended = claimed.record.status != "running"
        sought = Sought(None, is_open=True)
        try:
            credential = await self._accounts.credential(row.user_id)
            sought = await self.seek(claimed, credential, LOOK_SECONDS if is_ended else FIRST_LOOK_SECONDS)
            # Another key may belong to another account, which sees none of this one's tasks.
            sought = Sought(sought.task_id, sought.is_open or credential.fingerprint != row.key_fingerprint)
        except AppError as error:
            failure = error
        if sought.task_id is None and not is_ended:
            await self._submissions.despair(claimed, "interrupted", NotReady(LOST_SO_FAR))
        if failure is not None:
            raise failure
        waited = datetime.now(UTC) - _sent_at(claimed)
        if waited > KEPT or (waited > LOST_FOR and sought == Sought(None)):
            await self._conclude(claimed)
        share_seconds = AGE_SHARE * waited.total_seconds()
        return again_in(min(max(SHORTEST_INTERVAL_SECONDS, share_seconds), LONGEST_INTERVAL_SECONDS))

    async def _conclude(self, claimed: ClaimedFile) -> None:
        status: Status = "failed" if claimed.record.status == "failed" else "interrupted"
        log.warning("lost_task_not_found", record_id=claimed.record.id)
        await self._submissions.fail(claimed, status, UpstreamTimeout(LOST_FOR_GOOD))

    def _is_hopeless(self, claimed: ClaimedFile) -> bool:
        return datetime.now(UTC) - _sent_at(claimed) > KEPT

    async def _give_up(self, claimed: ClaimedFile, failure: AppError) -> None:
        await self._conclude(claimed)


def _sent_at(claimed: ClaimedFile) -> datetime:
    return claimed.record.sent_at or claimed.record.created_at
