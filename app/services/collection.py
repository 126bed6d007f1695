"""Looking after tasks at the provider until their transcripts and bills are ours, even if nobody ever asks.

A task ends together with its record, in one conditional update.
"""

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import structlog
from anyio import CapacityLimiter, to_thread

from app.computation import compute
from app.dashscope import Credential, TaskReport, TranscriptionClient, digest_result, explain
from app.errors import (
    AppError,
    ConnectionLost,
    UpstreamError,
    UpstreamNotFound,
    UpstreamTimeout,
)
from app.inflight import InFlight
from app.jobs import Rounds, again_in
from app.models import Transcription
from app.ratelimit import RateLimiter
from app.services.accounts import AccountService
from app.services.calls import reopened
from app.services.records import RecordService
from app.services.spool import Spool
from app.services.tasks import ClaimedTask, OpenTasks
from app.transcripts import AudioInfo, Digest, Transcript, digest

log = structlog.get_logger(__name__)

FIRST_CHECK_SECONDS = 2.0
LONGEST_INTERVAL_SECONDS = 60.0
AGE_SHARE = 0.2  # of its age until now, a task is given until the next check
# The provider allows 20 per second and account (PROTOCOL §5.3), which may have other callers than us.
QUERY_RATE = "8/second"
RESULTS_READ_AT_ONCE = 2  # each can be as large as 64 MB
INSPECTION_SECONDS = 40.0
FETCH_SECONDS = 600.0
# Checks in a row that find no such task, or a result that is none, until that is believed.
UNKNOWN_BELIEVED = 4
UNFIT_BELIEVED = 6
# A task runs 3 hours at most and is kept for 24 more (PROTOCOL §5.3).
KEPT = timedelta(hours=27)
GONE = "百炼平台已没有该任务（不存在或已超过 24 小时），结果无法取回，实际费用以百炼账单为准"

Read = TypeVar("Read")


class TaskCollector(Rounds[Transcription]):
    """Checks tasks: in the background with growing intervals, and at once when somebody asks."""

    def __init__(
        self,
        tasks: OpenTasks,
        accounts: AccountService,
        records: RecordService,
        client: TranscriptionClient,
        limiter: RateLimiter,
        in_flight: InFlight,
    ) -> None:
        super().__init__(tasks, in_flight)
        self._tasks = tasks
        self._accounts = accounts
        self._records = records
        self._client = client
        self._limiter = limiter
        self._reading = CapacityLimiter(RESULTS_READ_AT_ONCE)

    async def inspect(self, credential: Credential, task_id: str) -> TaskReport:
        """Ask the provider how a task is doing, in turn. Raises the AppError that kept it from an answer."""
        try:
            async with asyncio.timeout(INSPECTION_SECONDS):
                await self.wait_for_turn(credential)
                return await self._client.inspect(credential, task_id)
        except TimeoutError:
            raise UpstreamTimeout from None

    async def wait_for_turn(self, credential: Credential) -> None:
        """Wait until the task API may be asked: all that is asked of it shares one rate limit."""
        await self._limiter.wait(QUERY_RATE, credential.fingerprint, "tasks", party=credential.user)

    async def read(self, credential: Credential, url: str, understand: Callable[[bytes], Read]) -> Read:
        """Fetch a result file and make something of it. Raises the AppError that kept it from that."""
        async with Spool() as spool:
            try:
                async with asyncio.timeout(FETCH_SECONDS):
                    await self._client.fetch(credential, url, spool.write)
            except TimeoutError:
                raise UpstreamTimeout from None
            async with self._reading:
                content = await to_thread.run_sync(spool.read)
                return await compute(len(content), understand, content)

    async def _ask(self, claimed: ClaimedTask) -> dict[str, Any]:
        """Ask the provider once, and act on what it says. Gives what is to be noted if the task goes on."""
        task = claimed.row
        credential = await self._accounts.credential(task.user_id)
        report = await self.inspect(credential, task.task_id)
        match report.status:
            case "PENDING" | "RUNNING":
                if claimed.age > KEPT:
                    raise UpstreamTimeout("任务一直没有结束")
                return again_in(_interval_seconds(claimed)) | _told(report)
            case "UNKNOWN":
                # Another key may belong to another account, which sees none of this one's tasks.
                unknowns = task.unknowns + (credential.fingerprint == task.key_fingerprint)
                if unknowns < UNKNOWN_BELIEVED and claimed.age < KEPT:
                    return _again_after_miss(claimed, unknowns) | {"unknowns": unknowns}
                await self._tasks.fail(claimed, report, reopened(claimed), UpstreamNotFound(GONE))
            case "FAILED" if not report.is_silent:
                record = reopened(claimed)
                record.quantity = report.seconds or 0
                await self._tasks.fail(claimed, report, record, explain(report.code, report.message))
            case _:
                return await self._collect(claimed, credential, report)
        return {}

    async def _collect(self, claimed: ClaimedTask, credential: Credential, report: TaskReport) -> dict[str, Any]:
        """Fetch the result of a task that is done, and end it."""
        record = reopened(claimed)
        if report.seconds is not None:
            record.quantity = report.seconds
            # Should the result never come, this much is known to have been billed.
            await self._records.note(record, report.seconds)
            claimed.record.expected_quantity = report.seconds
        try:
            kept = await self._fetch(claimed, credential, report)
        except AppError as error:
            misses = claimed.row.misses + 1
            log.warning("transcript_not_fetched", record_id=record.id, misses=misses, error=type(error).__name__)
            if claimed.age > KEPT:
                raise
            is_unfit = isinstance(error, UpstreamError) and not isinstance(error, ConnectionLost)
            unfits = claimed.row.unfits + is_unfit
            if unfits < UNFIT_BELIEVED:
                told = _told(replace(report, status="RUNNING"))
                return told | _again_after_miss(claimed, misses) | {"unfits": unfits}
            await self._tasks.fail(claimed, report, record, error)
            return {}
        length_ms = kept.audio.duration_ms or kept.last_word_ms
        if report.seconds is None and not report.is_silent:
            record.quantity, record.estimated = kept.tracks * math.ceil(length_ms / 1000), True
        counted_ms = record.quantity * 1000 // max(1, kept.tracks)
        record.duration_ms = kept.audio.duration_ms or counted_ms
        record.output_text = kept.text
        await self._tasks.succeed(claimed, report, kept, record)
        return {}

    async def _fetch(self, claimed: ClaimedTask, credential: Credential, report: TaskReport) -> Digest:
        if report.is_silent:
            channels = json.loads(claimed.record.input_data)["channel_id"]
            return digest(tuple(Transcript(channel_id=channel) for channel in channels), AudioInfo())
        if not report.result_url:
            raise UpstreamError("百炼平台没有给出转写结果的地址")
        return await self.read(credential, report.result_url, digest_result)

    def _is_hopeless(self, claimed: ClaimedTask) -> bool:
        return claimed.age > KEPT

    async def _give_up(self, claimed: ClaimedTask, failure: AppError) -> None:
        reason = UpstreamNotFound(f"未能取回转写结果：{failure.message}；实际费用以百炼账单为准")
        await self._tasks.fail(claimed, TaskReport("UNKNOWN"), reopened(claimed), reason)


def _interval_seconds(claimed: ClaimedTask) -> float:
    return min(max(FIRST_CHECK_SECONDS, AGE_SHARE * claimed.age.total_seconds()), LONGEST_INTERVAL_SECONDS)


def _again_after_miss(claimed: ClaimedTask, misses: int) -> dict[str, Any]:
    patience_seconds = min(FIRST_CHECK_SECONDS * 2.0 ** min(misses, 10), LONGEST_INTERVAL_SECONDS)
    return again_in(max(patience_seconds, _interval_seconds(claimed))) | {"misses": misses}


def _told(report: TaskReport) -> dict[str, Any]:
    """What the provider said of a task that goes on."""
    times = {"submitted_at": report.submitted_at, "scheduled_at": report.scheduled_at}
    known = {name: moment for name, moment in times.items() if moment is not None}
    return {"status": report.status, "misses": 0, "unknowns": 0, **known}
