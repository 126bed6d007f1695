"""Tasks that the provider works on, as the database knows them: which are due, who asks, how they end.

A claim makes one process at a time ask about a task. It is kept up while that process lives, and runs out soon after
its death. What a process writes without its claim, because it slept meanwhile, changes nothing.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import structlog
from sqlalchemy import ColumnElement, exists, or_, select, update

from app.completion import end_by_cancelling
from app.dashscope import TaskReport
from app.database import Database
from app.errors import AppError
from app.models import Record, Transcription
from app.services.records import UNAVAILABLE, OpenRecord, Price, RecordService, Status
from app.transcripts import Digest

log = structlog.get_logger(__name__)

CLAIM = timedelta(seconds=30)
CLAIM_RENEWAL_SECONDS = 10.0


class DueTask(NamedTuple):
    """A task that somebody has to ask about at a moment."""

    record_id: int
    user_id: uuid.UUID
    due_at: datetime


@dataclass(frozen=True, slots=True)
class ClaimedTask:
    """A task that nobody else asks about now, with its record."""

    task: Transcription
    record: Record
    token: uuid.UUID = field(default_factory=uuid.uuid4)

    @property
    def age(self) -> timedelta:
        """How long ago it was submitted, by our own clock."""
        return datetime.now(UTC) - self.record.created_at

    @property
    def opened(self) -> OpenRecord:
        """The record, to be ended; what is known of its cost is billed."""
        record = self.record
        price = Price(record.unit, record.unit_price, record.currency)
        return OpenRecord(record.id, price, quantity=record.expected_quantity, provider_request_id=self.task.task_id)

    @property
    def is_mine(self) -> ColumnElement[bool]:
        """That the claim still holds, and the task is open."""
        return (
            (Transcription.record_id == self.record.id)
            & (Transcription.claimed_by == self.token)
            & Transcription.next_check_at.is_not(None)
        )


class OpenTasks:
    """The tasks whose end is not known yet."""

    def __init__(self, database: Database, records: RecordService) -> None:
        self._database = database
        self._records = records

    async def due(self, limit: int, without: Collection[uuid.UUID] = ()) -> list[DueTask]:
        """The next tasks that nobody asks about, soonest first, but for those of some users."""
        rows = (
            select(Transcription.record_id, Transcription.user_id, Transcription.next_check_at)
            .where(
                Transcription.next_check_at.is_not(None),
                Transcription.user_id.not_in(without),
                _is_free(datetime.now(UTC)),
            )
            .order_by(Transcription.next_check_at)
            .limit(limit)
        )
        async with self._database.snapshot() as session:
            found = await session.execute(rows)
        return [DueTask(record_id, user_id, due_at) for record_id, user_id, due_at in found if due_at is not None]

    async def claim(self, record_id: int) -> ClaimedTask | None:
        """Take the right to ask about a task; None when it has ended, or somebody else has the right."""
        now = datetime.now(UTC)
        token = uuid.uuid4()
        claiming = (
            update(Transcription)
            .where(Transcription.record_id == record_id, Transcription.next_check_at.is_not(None), _is_free(now))
            .values(claimed_by=token, claimed_until=now + CLAIM)
            .returning(Transcription)
        )
        async with self._database.transaction() as session:
            task = await session.scalar(claiming)
            record = await session.get(Record, record_id)
        return ClaimedTask(task, record, token) if task and record else None

    @asynccontextmanager
    async def kept(self, claimed: ClaimedTask) -> AsyncIterator[None]:
        """Keep a claim up for as long as the block lasts."""
        keeping = asyncio.create_task(self._keep(claimed))
        try:
            yield
        finally:
            await end_by_cancelling(keeping)

    async def put_back(self, claimed: ClaimedTask, changes: dict[str, Any]) -> None:
        """Give the right back, and note what is to be known by whoever asks next."""
        putting = update(Transcription).where(claimed.is_mine)
        async with self._database.transaction() as session:
            await session.execute(putting.values(claimed_by=None, claimed_until=None, **changes))

    async def succeed(self, claimed: ClaimedTask, report: TaskReport, kept: Digest, record: OpenRecord) -> None:
        """End a task with its transcripts, and its record with the bill."""
        values: dict[str, Any] = {
            "status": "SUCCEEDED",
            "transcripts": kept.transcripts,
            "transcripts_with_words": kept.transcripts_with_words,
            "audio_info": kept.audio.model_dump_json(exclude_none=True),
        }
        await self._end(claimed, report, record, None, values)

    async def fail(self, claimed: ClaimedTask, report: TaskReport, record: OpenRecord, failure: AppError) -> None:
        """End a task without transcripts, and its record with what is known to have been billed."""
        status = "UNKNOWN" if report.status == "UNKNOWN" else "FAILED"
        await self._end(claimed, report, record, failure, {"status": status})

    async def _end(
        self,
        claimed: ClaimedTask,
        report: TaskReport,
        record: OpenRecord,
        failure: AppError | None,
        values: dict[str, Any],
    ) -> None:
        task, now = claimed.task, datetime.now(UTC)
        ending = (
            update(Transcription)
            .where(claimed.is_mine)
            .values(
                submitted_at=report.submitted_at or task.submitted_at,
                scheduled_at=report.scheduled_at or task.scheduled_at,
                ended_at=report.ended_at or now,
                result_url=report.result_url,
                checked_at=now,
                next_check_at=None,
                claimed_by=None,
                claimed_until=None,
                **values,
            )
        )
        status: Status = "failed" if failure else "succeeded"
        mine = exists().where(claimed.is_mine)
        if not await self._records.end(record, status, failure, provided=mine, along=[ending]):
            async with self._database.transaction() as session:  # else it would be asked about for ever
                await session.execute(ending)

    async def _keep(self, claimed: ClaimedTask) -> None:
        """Renew the claim until it is ours no more."""
        while True:
            await asyncio.sleep(CLAIM_RENEWAL_SECONDS)
            renewal = update(Transcription).where(claimed.is_mine).values(claimed_until=datetime.now(UTC) + CLAIM)
            try:
                async with self._database.transaction() as session:
                    renewed = await session.scalar(renewal.returning(Transcription.record_id))
                if renewed is None:
                    return
            except Exception as error:
                unexpected = not isinstance(error, UNAVAILABLE)
                log.warning(
                    "claim_not_renewed",
                    record_id=claimed.record.id,
                    error=type(error).__name__,
                    exc_info=unexpected,
                )


def _is_free(now: datetime) -> ColumnElement[bool]:
    return or_(Transcription.claimed_until.is_(None), Transcription.claimed_until < now)
