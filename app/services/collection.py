"""Looking after tasks at the provider until their transcripts and bills are ours, even if nobody ever asks.

Every process runs a collector. A check is claimed in the database, so that one process at a time asks about a task;
the claim of a process that died runs out. A task ends together with its record, in one conditional update.
"""

import asyncio
import json
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog
from anyio import CancelScope
from sqlalchemy import ColumnElement, or_, select, update

from app.completion import run_to_end
from app.dashscope import AudioInfo, Credential, TaskReport, TranscriptionClient, TranscriptionResult, explain
from app.database import Database
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
from app.models import Record, Transcription
from app.ratelimit import RateLimiter
from app.services.accounts import AccountService
from app.services.inflight import InFlight
from app.services.records import OpenRecord, Price, RecordService, Status
from app.transcripts import Transcript, Transcripts, join_text

log = structlog.get_logger(__name__)

FIRST_CHECK_SECONDS = 2.0
LONGEST_INTERVAL_SECONDS = 60.0
AGE_SHARE = 0.2  # of its age until now, a task is given until the next check
FAILED_CHECK_SECONDS = 10.0
NO_KEY_SECONDS = 60.0
# The provider allows 20 per second and account (PROTOCOL §5.3), which may have other callers than us.
QUERY_RATE = "10/second"
CHECKS_AT_ONCE = 16
ROUND_SECONDS = 5.0
CLAIM = timedelta(seconds=45)
CHECK_SECONDS = 40.0
# Checks in a row that find no such task, or no fit result, until that is believed.
UNKNOWN_BELIEVED = 3
UNFIT_BELIEVED = 6
# A task runs 3 hours at most and is kept for 24 more (PROTOCOL §5.3).
KEPT = timedelta(hours=27)
GONE = "百炼平台已没有该任务（不存在或已超过 24 小时），结果无法取回，实际费用以百炼账单为准"


class TaskCollector:
    """Checks tasks: in the background with growing intervals, and at once when somebody asks."""

    def __init__(
        self,
        database: Database,
        accounts: AccountService,
        records: RecordService,
        client: TranscriptionClient,
        limiter: RateLimiter,
        in_flight: InFlight,
    ) -> None:
        self._database = database
        self._accounts = accounts
        self._records = records
        self._client = client
        self._limiter = limiter
        self._in_flight = in_flight
        self._checking: dict[int, asyncio.Task[AppError | None]] = {}
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
            try:
                async with asyncio.timeout(pause_seconds):
                    await self._awake.wait()
            except TimeoutError:
                pass

    def wake(self) -> None:
        """Have the next round begin now: a task was submitted."""
        self._awake.set()

    async def check(self, record_id: int) -> AppError | None:
        """Ask the provider about a task, together with everybody who asks now. Gives what kept us from an answer."""
        checking = self._checking.get(record_id)
        if checking is None:
            checking = self._in_flight.start(self._check(record_id))
            self._checking[record_id] = checking
            checking.add_done_callback(lambda _: self._finish(record_id))
        return await asyncio.shield(checking)

    def _finish(self, record_id: int) -> None:
        del self._checking[record_id]
        self._awake.set()

    async def _start_due_checks(self) -> float:
        """Start as many checks as there is room for; gives the seconds until the next is due."""
        now = datetime.now(UTC)
        room = CHECKS_AT_ONCE - len(self._checking)
        if room <= 0 or self._in_flight.stopping:
            return ROUND_SECONDS
        open_tasks = select(Transcription.record_id, Transcription.next_check_at).where(
            Transcription.next_check_at.is_not(None), _unclaimed(now)
        )
        async with self._database.snapshot() as session:
            rows = (await session.execute(open_tasks.order_by(Transcription.next_check_at).limit(room + 1))).all()
        for record_id, due_at in rows:
            if due_at is not None and due_at > now:
                return min(ROUND_SECONDS, (due_at - now).total_seconds())
            if record_id not in self._checking:
                self._in_flight.start(self.check(record_id))
        return ROUND_SECONDS if len(rows) <= room else 0.1

    async def _check(self, record_id: int) -> AppError | None:
        claimed = await self._claim(record_id)
        if claimed is None:
            return None
        task, record = claimed
        failure: AppError | None = None
        changes = _again_in(FAILED_CHECK_SECONDS)
        try:
            with CancelScope() as scope, self._in_flight.stoppable(scope.cancel):
                async with asyncio.timeout(CHECK_SECONDS):
                    changes = await self._ask(task, record)
            if scope.cancelled_caught:
                changes = {}
        except TimeoutError:
            failure = UpstreamTimeout()
        except AppError as error:
            failure = error
            if isinstance(error, NoApiKey | SealBroken | InvalidApiKey):
                changes = _again_in(NO_KEY_SECONDS)
        except Exception:
            log.exception("task_check_broke", record_id=record_id)
            failure = AppError()
        finally:
            await run_to_end(self._put_back(record_id, changes))
        if failure is not None:
            log.warning("task_check_failed", record_id=record_id, error=type(failure).__name__)
            if datetime.now(UTC) - task.submitted_at > KEPT:
                await self._end(task, record, TaskReport("UNKNOWN"), None, UpstreamNotFound(GONE))
        return failure

    async def _ask(self, task: Transcription, record: Record) -> dict[str, Any]:
        """Ask the provider once, and act on what it says. Gives what is to be noted if the task goes on."""
        credential = await self._accounts.credential(task.user_id)
        await self._limiter.wait(QUERY_RATE, credential.fingerprint, "tasks")
        report = await self._client.inspect(credential, task.task_id)
        age = datetime.now(UTC) - task.submitted_at
        match report.status:
            case "PENDING" | "RUNNING":
                interval_seconds = min(
                    max(FIRST_CHECK_SECONDS, AGE_SHARE * age.total_seconds()), LONGEST_INTERVAL_SECONDS
                )
                return _again_in(interval_seconds) | _told(report)
            case "UNKNOWN":
                # Another key may belong to another account, which sees none of this one's tasks.
                misses = task.misses + (credential.fingerprint == task.key_fingerprint)
                if misses < UNKNOWN_BELIEVED and age < KEPT:
                    return _again_after_miss(misses)
                await self._end(task, record, report, None, UpstreamNotFound(GONE))
            case "FAILED" if not report.is_silent:
                await self._end(task, record, report, None, explain(report.code, report.message))
            case _:
                return await self._collect(task, record, credential, report)
        return {}

    async def _collect(
        self, task: Transcription, record: Record, credential: Credential, report: TaskReport
    ) -> dict[str, Any]:
        """Fetch the result of a task that is done, and end it."""
        try:
            if report.is_silent:
                result = TranscriptionResult(_silence(record), AudioInfo())
            elif report.result_url:
                result = await self._client.fetch(credential, report.result_url)
            else:
                raise UpstreamError("百炼平台没有给出转写结果的地址")
        except AppError as error:
            # Should the result never come, this much is known to have been billed.
            await self._records.foresee(_opened(record), report.seconds or 0)
            unfit = isinstance(error, UpstreamError) and not isinstance(error, ConnectionLost)
            misses = task.misses + unfit
            log.warning("transcript_not_fetched", record_id=record.id, misses=misses, error=type(error).__name__)
            if misses < UNFIT_BELIEVED:
                return _again_after_miss(misses)
            await self._end(task, record, report, None, error)
        else:
            await self._end(task, record, report, result, None)
        return {}

    async def _end(
        self,
        task: Transcription,
        record: Record,
        report: TaskReport,
        result: TranscriptionResult | None,
        failure: AppError | None,
    ) -> None:
        """Write down how the task ended, together with the end of its record and the bill."""
        ended = _opened(record)
        ended.provider_request_id = task.task_id
        ended.quantity = report.seconds if report.seconds is not None else record.expected_quantity
        values: dict[str, Any] = {"status": "UNKNOWN" if report.status == "UNKNOWN" else "FAILED"}
        if result is not None:
            values = {
                "status": "SUCCEEDED",
                "transcripts": Transcripts.dump_json(result.transcripts, exclude_none=True).decode(),
                "audio_info": result.audio.model_dump_json(exclude_none=True),
            }
            heard_ms = _length_ms(result)
            if report.seconds is None and not report.is_silent:
                ended.quantity = len(result.transcripts) * math.ceil(heard_ms / 1000)
                ended.estimated = True
            ended.output_text = join_text(result.transcripts)
            ended.duration_ms = heard_ms if report.seconds is None else report.seconds * 1000
        values |= {
            "submitted_at": report.submitted_at or task.submitted_at,
            "scheduled_at": report.scheduled_at or task.scheduled_at,
            "ended_at": report.ended_at or datetime.now(UTC),
            "result_url": report.result_url,
            "checked_at": datetime.now(UTC),
            "next_check_at": None,
            "claimed_until": None,
        }
        status: Status = "failed" if failure else "succeeded"
        noting = update(Transcription).where(Transcription.record_id == record.id).values(**values)
        if not await self._records.end(ended, status, failure, along=[noting]):
            async with self._database.transaction() as session:  # else it would be asked about for ever
                await session.execute(noting)

    async def _claim(self, record_id: int) -> tuple[Transcription, Record] | None:
        """Take the right to ask about a task; None when it has ended, or somebody else has the right."""
        now = datetime.now(UTC)
        claim = (
            update(Transcription)
            .where(
                Transcription.record_id == record_id,
                Transcription.next_check_at.is_not(None),
                _unclaimed(now),
            )
            .values(claimed_until=now + CLAIM)
            .returning(Transcription)
        )
        async with self._database.transaction() as session:
            task = await session.scalar(claim)
            record = await session.get(Record, record_id)
        return (task, record) if task and record else None

    async def _put_back(self, record_id: int, changes: dict[str, Any]) -> None:
        """Give the right back, and note what was told."""
        open_task = update(Transcription).where(
            Transcription.record_id == record_id, Transcription.next_check_at.is_not(None)
        )
        async with self._database.transaction() as session:
            await session.execute(open_task.values(claimed_until=None, **changes))


def _unclaimed(now: datetime) -> ColumnElement[bool]:
    return or_(Transcription.claimed_until.is_(None), Transcription.claimed_until < now)


def _again_in(seconds: float) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {"checked_at": now, "next_check_at": now + timedelta(seconds=seconds)}


def _again_after_miss(misses: int) -> dict[str, Any]:
    seconds = min(FIRST_CHECK_SECONDS * 2.0**misses, LONGEST_INTERVAL_SECONDS)
    return _again_in(seconds) | {"misses": misses}


def _told(report: TaskReport) -> dict[str, Any]:
    """What the provider said of a task that goes on."""
    times = {"submitted_at": report.submitted_at, "scheduled_at": report.scheduled_at}
    known = {name: moment for name, moment in times.items() if moment is not None}
    return {"status": report.status, "misses": 0, **known}


def _opened(record: Record) -> OpenRecord:
    return OpenRecord(record.id, Price(record.unit, record.unit_price, record.currency))


def _silence(record: Record) -> tuple[Transcript, ...]:
    """The transcripts of audio without speech: one for each track that was asked for."""
    return tuple(Transcript(channel_id=channel) for channel in json.loads(record.input_data)["channel_id"])


def _length_ms(result: TranscriptionResult) -> int:
    """How long the audio is, as far as the result tells."""
    ends = (sentence.end_time for transcript in result.transcripts for sentence in transcript.sentences)
    return result.audio.duration_ms or max(ends, default=0)
