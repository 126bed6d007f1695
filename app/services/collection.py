"""Looking after tasks at the provider until their transcripts and bills are ours, even if nobody ever asks.

Every process runs a collector; claims keep them apart. A task ends together with its record, in one conditional update.
"""

import asyncio
import json
import math
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import structlog
from anyio import CancelScope, CapacityLimiter, to_thread

from app.completion import run_to_end
from app.computation import compute
from app.dashscope import Credential, TaskReport, TranscriptionClient, digest_result, explain
from app.errors import (
    AppError,
    ConnectionLost,
    InvalidApiKey,
    NoApiKey,
    SealBroken,
    UpstreamError,
    UpstreamNotFound,
    UpstreamTimeout,
)
from app.ratelimit import RateLimiter
from app.services.accounts import AccountService
from app.services.inflight import InFlight
from app.services.records import RecordService
from app.services.spool import Spool
from app.services.tasks import ClaimedTask, OpenTasks
from app.transcripts import AudioInfo, Digest, Transcript, digest

log = structlog.get_logger(__name__)

FIRST_CHECK_SECONDS = 2.0
LONGEST_INTERVAL_SECONDS = 60.0
AGE_SHARE = 0.2  # of its age until now, a task is given until the next check
FAILED_CHECK_SECONDS = 10.0
NO_KEY_SECONDS = 60.0
# The provider allows 20 per second and account (PROTOCOL §5.3), which may have other callers than us.
QUERY_RATE = "8/second"
CHECKS_AT_ONCE = 64
CHECKS_PER_USER = 8  # one user's slow results leave room for everybody else's
RESULTS_READ_AT_ONCE = 2  # each can be as large as 64 MB
ROUND_SECONDS = 5.0
INSPECTION_SECONDS = 40.0
FETCH_SECONDS = 600.0
# Checks in a row that find no such task, or a result that is none, until that is believed.
UNKNOWN_BELIEVED = 4
UNFIT_BELIEVED = 6
# A task runs 3 hours at most and is kept for 24 more (PROTOCOL §5.3).
KEPT = timedelta(hours=27)
GONE = "百炼平台已没有该任务（不存在或已超过 24 小时），结果无法取回，实际费用以百炼账单为准"


class TaskCollector:
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
        self._tasks = tasks
        self._accounts = accounts
        self._records = records
        self._client = client
        self._limiter = limiter
        self._in_flight = in_flight
        self._checking: dict[int, asyncio.Task[AppError | None]] = {}
        self._reading = CapacityLimiter(RESULTS_READ_AT_ONCE)
        self._busy: Counter[uuid.UUID] = Counter()
        self._awake = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled: check every task when it is due."""
        while True:
            self._awake.clear()
            try:
                pause_seconds = await self._start_due_checks()
            except Exception as error:
                # Whatever it was, the next round must come.
                log.warning("collection_round_failed", error=type(error).__name__, exc_info=True)
                pause_seconds = ROUND_SECONDS
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_seconds):
                    await self._awake.wait()

    def wake(self) -> None:
        """Have the next round begin now: a task was submitted."""
        self._awake.set()

    def check(self, record_id: int) -> asyncio.Task[AppError | None]:
        """Ask the provider about a task, once for everybody who asks now. Gives what kept us from an answer."""
        if record_id not in self._checking:
            checking = self._in_flight.start(self._check(record_id))
            self._checking[record_id] = checking
            checking.add_done_callback(lambda done: self._finish(record_id, done))
        return self._checking[record_id]

    def _finish(self, record_id: int, done: asyncio.Task[AppError | None]) -> None:
        del self._checking[record_id]
        if not done.cancelled() and done.exception() is None:
            self._awake.set()

    async def _start_due_checks(self) -> float:
        """Start as many checks as there is room for; gives the seconds until the next is due."""
        room = CHECKS_AT_ONCE - len(self._checking)
        if room <= 0 or self._in_flight.stopping:
            return ROUND_SECONDS
        now = datetime.now(UTC)
        for task in await self._tasks.due(room + 1, without=self._users_at_their_limit()):
            if task.due_at > now:
                return min(ROUND_SECONDS, (task.due_at - now).total_seconds())
            if task.user_id not in self._users_at_their_limit():
                self._busy[task.user_id] += 1
                self.check(task.record_id).add_done_callback(partial(self._leave, task.user_id))
        return ROUND_SECONDS

    def _users_at_their_limit(self) -> set[uuid.UUID]:
        return {user_id for user_id, checks in self._busy.items() if checks >= CHECKS_PER_USER}

    def _leave(self, user_id: uuid.UUID, _: object) -> None:
        self._busy[user_id] -= 1
        if not self._busy[user_id]:
            del self._busy[user_id]

    async def _check(self, record_id: int) -> AppError | None:
        claimed = await self._tasks.claim(record_id)
        if claimed is None:
            return None
        failure: AppError | None = None
        changes = _again_in(FAILED_CHECK_SECONDS)
        try:
            with CancelScope() as scope, self._in_flight.stoppable(scope.cancel):
                async with self._tasks.kept(claimed):
                    changes = await self._ask(claimed)
            if scope.cancelled_caught:
                changes = {}
        except AppError as error:
            failure = error
            if isinstance(error, NoApiKey | SealBroken | InvalidApiKey):
                changes = _again_in(NO_KEY_SECONDS)
        except Exception:
            log.exception("task_check_broke", record_id=record_id)
            failure = AppError()
        finally:
            if failure is not None and claimed.age > KEPT:
                await run_to_end(self._give_up(claimed, failure))
            await run_to_end(self._tasks.put_back(claimed, changes))
        if failure is not None:
            log.warning("task_check_failed", record_id=record_id, error=type(failure).__name__)
        return failure

    async def _ask(self, claimed: ClaimedTask) -> dict[str, Any]:
        """Ask the provider once, and act on what it says. Gives what is to be noted if the task goes on."""
        task = claimed.task
        credential = await self._accounts.credential(task.user_id)
        report = await self._inspect(credential, task.task_id)
        match report.status:
            case "PENDING" | "RUNNING":
                if claimed.age > KEPT:
                    raise UpstreamTimeout("任务一直没有结束")
                return _again_in(_interval_seconds(claimed)) | _told(report)
            case "UNKNOWN":
                # Another key may belong to another account, which sees none of this one's tasks.
                unknowns = task.unknowns + (credential.fingerprint == task.key_fingerprint)
                if unknowns < UNKNOWN_BELIEVED and claimed.age < KEPT:
                    return _again_after_miss(claimed, unknowns) | {"unknowns": unknowns}
                await self._tasks.fail(claimed, report, claimed.opened, UpstreamNotFound(GONE))
            case "FAILED" if not report.is_silent:
                record = claimed.opened
                record.quantity = report.seconds or 0
                await self._tasks.fail(claimed, report, record, explain(report.code, report.message))
            case _:
                return await self._collect(claimed, credential, report)
        return {}

    async def _inspect(self, credential: Credential, task_id: str) -> TaskReport:
        try:
            async with asyncio.timeout(INSPECTION_SECONDS):
                await self._limiter.wait(QUERY_RATE, credential.fingerprint, "tasks")
                return await self._client.inspect(credential, task_id)
        except TimeoutError:
            raise UpstreamTimeout from None

    async def _collect(self, claimed: ClaimedTask, credential: Credential, report: TaskReport) -> dict[str, Any]:
        """Fetch the result of a task that is done, and end it."""
        record = claimed.opened
        if report.seconds is not None:
            record.quantity = report.seconds
            # Should the result never come, this much is known to have been billed.
            await self._records.foresee(record, report.seconds)
            claimed.record.expected_quantity = report.seconds
        try:
            kept = await self._fetch(claimed, credential, report)
        except AppError as error:
            misses = claimed.task.misses + 1
            log.warning("transcript_not_fetched", record_id=record.id, misses=misses, error=type(error).__name__)
            if claimed.age > KEPT:
                raise
            is_unfit = isinstance(error, UpstreamError) and not isinstance(error, ConnectionLost)
            unfits = claimed.task.unfits + is_unfit
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
        async with Spool() as spool:
            try:
                async with asyncio.timeout(FETCH_SECONDS):
                    await self._client.fetch(credential, report.result_url, spool.write)
            except TimeoutError:
                raise UpstreamTimeout from None
            async with self._reading:
                content = await to_thread.run_sync(spool.read)
                return await compute(len(content), digest_result, content)

    async def _give_up(self, claimed: ClaimedTask, failure: AppError) -> None:
        reason = UpstreamNotFound(f"未能取回转写结果：{failure.message}；实际费用以百炼账单为准")
        await self._tasks.fail(claimed, TaskReport("UNKNOWN"), claimed.opened, reason)


def _interval_seconds(claimed: ClaimedTask) -> float:
    return min(max(FIRST_CHECK_SECONDS, AGE_SHARE * claimed.age.total_seconds()), LONGEST_INTERVAL_SECONDS)


def _again_in(seconds: float) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {"checked_at": now, "next_check_at": now + timedelta(seconds=seconds)}


def _again_after_miss(claimed: ClaimedTask, misses: int) -> dict[str, Any]:
    patience_seconds = min(FIRST_CHECK_SECONDS * 2.0 ** min(misses, 10), LONGEST_INTERVAL_SECONDS)
    return _again_in(max(patience_seconds, _interval_seconds(claimed))) | {"misses": misses}


def _told(report: TaskReport) -> dict[str, Any]:
    """What the provider said of a task that goes on."""
    times = {"submitted_at": report.submitted_at, "scheduled_at": report.scheduled_at}
    known = {name: moment for name, moment in times.items() if moment is not None}
    return {"status": report.status, "misses": 0, "unknowns": 0, **known}
