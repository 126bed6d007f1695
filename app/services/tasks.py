"""Transcription tasks that the provider works on, as the database knows them, and how they end."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import exists, update

from app.dashscope import TaskReport
from app.database import Database
from app.errors import AppError
from app.jobs import Claimed, Claims
from app.models import Transcription
from app.services.calls import OpenRecord, Status
from app.services.records import RecordService
from app.transcripts import Digest

ClaimedTask = Claimed[Transcription]


class OpenTasks(Claims[Transcription]):
    """The tasks whose end is not known yet."""

    def __init__(self, database: Database, records: RecordService) -> None:
        super().__init__(database, Transcription)
        self._records = records

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
        task, now = claimed.row, datetime.now(UTC)
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
