"""Voices that are being made at the provider, as the database knows them, and how their making ends."""

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Executable, exists, func, select, update

from app.completion import run_to_end
from app.database import Database, once_more
from app.errors import AppError, NotReady
from app.jobs import Claimed, Claims
from app.models import Enrollment, Voice, VoiceSample
from app.services.calls import OpenRecord, Status, reopened
from app.services.records import RecordService
from app.services.voicebook import FOLLOW_AFTER

# For how long the voice of a lost order is given to who repeats the order.
REMEMBERED = timedelta(hours=1)
REMEMBERED_WHEN_TOLD = timedelta(seconds=30)

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
        await run_to_end(self._records.hand_over(record, enrollment))
        claimed = await self.claim(record.id)
        if claimed is None:
            raise NotReady
        return claimed

    async def find_lost(self, user_id: uuid.UUID, account: str, digest: str) -> Enrollment | None:
        """The same order by the same user, if its answer was lost and its voice is looked for, or was found lately.

        Not one whose client still waits.
        """
        now = datetime.now(UTC)
        was_answered = Enrollment.lost_at.is_not(None) & Enrollment.checked_at.is_not(None)  # left to the follower
        is_lost = was_answered | (Enrollment.claimed_until < now)
        is_sought = Enrollment.voice_id.is_(None) & Enrollment.next_check_at.is_not(None)
        was_found = Enrollment.voice_id.is_not(None) & (Enrollment.lost_at > now - REMEMBERED)
        is_deleted = exists().where(
            Voice.account == account, Voice.voice_id == Enrollment.voice_id, Voice.deleted_at.is_not(None)
        )
        wanted = select(Enrollment).where(
            Enrollment.user_id == user_id,
            Enrollment.account == account,
            Enrollment.digest == digest,
            is_lost,
            is_sought | (was_found & ~is_deleted),
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

    async def lost_rivals(self, claimed: ClaimedEnrollment) -> list[int] | None:
        """The records of all lost orders for this model and prefix, this one among them, in the order of asking.

        None while one is waiting for its answer, whose voice could be mistaken.
        """
        row = claimed.row
        others = select(Enrollment.record_id, Enrollment.lost_at, Enrollment.claimed_until).where(
            Enrollment.account == row.account,
            Enrollment.target_model == row.target_model,
            func.lower(Enrollment.prefix) == row.prefix.lower(),
            Enrollment.voice_id.is_(None),
            Enrollment.next_check_at.is_not(None),
            Enrollment.record_id != row.record_id,
        )
        now = datetime.now(UTC)
        async with self._database.snapshot() as session:
            found = list(await session.execute(others))
        if any(lost_at is None and claimed_until and claimed_until > now for _, lost_at, claimed_until in found):
            return None
        return sorted([row.record_id, *(record_id for record_id, _, _ in found)])

    @once_more
    async def lose(self, claimed: ClaimedEnrollment) -> None:
        """Write down that the provider's answer is lost: the voice may exist, or come to exist."""
        now = datetime.now(UTC)
        losing = update(Enrollment).where(claimed.is_mine, Enrollment.lost_at.is_(None))
        async with self._database.transaction() as session:
            await session.execute(losing.values(lost_at=now))
        claimed.row.lost_at = claimed.row.lost_at or now

    async def despair(self, claimed: ClaimedEnrollment, failure: AppError) -> None:
        """End the record as failed, although the search for its voice goes on."""
        await self._records.end(reopened(claimed), "failed", failure, provided=exists().where(claimed.is_mine))

    async def succeed(self, claimed: ClaimedEnrollment, voice_id: str, *, is_told: bool = False) -> bool:
        """End the record with its voice, which is followed from now on. False when somebody else ended it.

        `is_told` says that the client who ordered it hears of it now. Raises IntegrityError for a voice that another
        record has.
        """
        now = datetime.now(UTC)
        changes: dict[str, Any] = {
            "voice_id": voice_id,
            "status": "DEPLOYING",
            "followed_since": now,
            "misses": 0,
            "next_check_at": now + FOLLOW_AFTER,
        }
        if is_told:
            changes["lost_at"] = None
        kept = update(VoiceSample).where(VoiceSample.record_id == claimed.record.id)
        sample = kept.values(voice_id=voice_id, remove_at=None)
        return await self._records.end(
            reopened(claimed), "succeeded", None, first=_closing(claimed, changes), along=[sample], corrects=True
        )

    async def fail(self, claimed: ClaimedEnrollment, status: Status, failure: BaseException) -> None:
        """End the record, unless it has its end, and the search for its voice; the sample is removed."""
        sample = update(VoiceSample).where(VoiceSample.record_id == claimed.record.id)
        discarded = sample.values(remove_at=datetime.now(UTC))
        closing = _closing(claimed, {"next_check_at": None})
        await self._records.end(reopened(claimed), status, failure, first=closing, along=[discarded])

    @once_more
    async def tell(self, record_id: int) -> None:
        """Write down that who ordered a lost voice has heard of it: the same order is a new one before long."""
        told = update(Enrollment).where(Enrollment.record_id == record_id, Enrollment.lost_at.is_not(None))
        async with self._database.transaction() as session:
            await session.execute(told.values(lost_at=datetime.now(UTC) - REMEMBERED + REMEMBERED_WHEN_TOLD))


def _closing(claimed: ClaimedEnrollment, changes: dict[str, Any]) -> Executable:
    closing = update(Enrollment).where(claimed.is_mine).values(claimed_by=None, claimed_until=None, **changes)
    return closing.returning(Enrollment.record_id)
