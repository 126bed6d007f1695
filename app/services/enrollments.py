"""Voices that are being made at the provider, as the database knows them, and how their making ends."""

import uuid
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Executable, exists, select, update

from app.database import Database
from app.errors import AppError, NotReady
from app.models import Enrollment, VoiceSample
from app.services.claims import Claimed, Claims
from app.services.records import OpenRecord, RecordService, Status
from app.services.voicebook import FOLLOW_AFTER

ClaimedEnrollment = Claimed[Enrollment]


class OpenEnrollments(Claims[Enrollment]):
    """The voices that are not ready or rejected yet, and those of which it is not known whether they exist."""

    def __init__(self, database: Database, records: RecordService) -> None:
        super().__init__(database, Enrollment)
        self._records = records

    async def announce(self, record: OpenRecord, enrollment: Enrollment) -> ClaimedEnrollment:
        """Write down that the provider is about to be asked for a voice; from now on this ends the record.

        Raises NotReady when another process was quicker than this one, which must have slept.
        """
        await self._records.hand_over(record, enrollment)
        claimed = await self.claim(record.id)
        if claimed is None:
            raise NotReady
        return claimed

    async def find_lost(self, user_id: uuid.UUID, account: str, digest: str) -> int | None:
        """The record of the same order by the same user, whose answer was lost and whose voice did not turn up yet."""
        wanted = select(Enrollment.record_id).where(
            Enrollment.user_id == user_id,
            Enrollment.account == account,
            Enrollment.digest == digest,
            Enrollment.voice_id.is_(None),
            Enrollment.lost_at.is_not(None),
            Enrollment.next_check_at.is_not(None),
        )
        async with self._database.snapshot() as session:
            return await session.scalar(wanted.order_by(Enrollment.record_id).limit(1))

    async def find(self, record_id: int) -> Enrollment | None:
        """The making of a voice, by its record."""
        async with self._database.snapshot() as session:
            return await session.get(Enrollment, record_id)

    async def attributed(self, claimed: ClaimedEnrollment, voice_ids: list[str]) -> set[str]:
        """Which of these voices of the account are known to be of other orders."""
        taken = select(Enrollment.voice_id).where(
            Enrollment.account == claimed.row.account, Enrollment.voice_id.in_(voice_ids)
        )
        async with self._database.snapshot() as session:
            return {voice_id for voice_id in await session.scalars(taken) if voice_id}

    async def is_alone(self, claimed: ClaimedEnrollment) -> bool:
        """Whether no other order for this model and prefix is waiting for its answer, whose voice could be mistaken."""
        row = claimed.row
        other = select(Enrollment.record_id).where(
            Enrollment.account == row.account,
            Enrollment.target_model == row.target_model,
            Enrollment.prefix == row.prefix,
            Enrollment.record_id != row.record_id,
            Enrollment.voice_id.is_(None),
            Enrollment.lost_at.is_(None),
            Enrollment.claimed_until > datetime.now(UTC),
        )
        async with self._database.snapshot() as session:
            return await session.scalar(other.limit(1)) is None

    async def lose(self, claimed: ClaimedEnrollment) -> None:
        """Write down that the provider's answer is lost: the voice may exist, or come to exist."""
        now = datetime.now(UTC)
        losing = update(Enrollment).where(claimed.is_mine, Enrollment.lost_at.is_(None))
        async with self._database.transaction() as session:
            await session.execute(losing.values(lost_at=now))
        claimed.row.lost_at = claimed.row.lost_at or now

    async def succeed(self, claimed: ClaimedEnrollment, voice_id: str) -> bool:
        """End the record with its voice, which is followed from now on. False when somebody else ended it.

        Raises IntegrityError for a voice that another record has.
        """
        now = datetime.now(UTC)
        changes = {
            "voice_id": voice_id,
            "status": "DEPLOYING",
            "followed_since": now,
            "misses": 0,
            "next_check_at": now + FOLLOW_AFTER,
        }
        sample = update(VoiceSample).where(VoiceSample.record_id == claimed.record.id)
        return await self._end(claimed, "succeeded", None, changes, sample.values(voice_id=voice_id, remove_at=None))

    async def fail(self, claimed: ClaimedEnrollment, status: Status, failure: BaseException) -> bool:
        """End the record without a voice; the sample is removed. False when somebody else ended it."""
        sample = update(VoiceSample).where(VoiceSample.record_id == claimed.record.id)
        return await self._end(
            claimed, status, failure, {"next_check_at": None}, sample.values(remove_at=datetime.now(UTC))
        )

    async def _end(
        self,
        claimed: ClaimedEnrollment,
        status: Status,
        failure: BaseException | None,
        changes: dict[str, Any],
        sample: Executable,
    ) -> bool:
        ending = update(Enrollment).where(claimed.is_mine).values(claimed_by=None, claimed_until=None, **changes)
        mine = exists().where(claimed.is_mine)
        known = failure if isinstance(failure, AppError) else None
        return await self._records.end(claimed.opened, status, known or failure, provided=mine, along=[sample, ending])
