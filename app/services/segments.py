"""Long texts that are being spoken, as the database knows them: what is under way, what is done, what it cost.

Money is written down before it is spent, and only by who holds the claim: a segment's try names what is at stake right
before its text goes out. Whoever takes over from a dead process counts such a try as a guess, once.
"""

import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import delete, exists, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.database import Database, once_more
from app.errors import AppError
from app.jobs import Claimed, Claims
from app.models import LongText, Segment
from app.services.calls import OpenRecord, Status
from app.services.records import RecordService
from app.services.removals import remove_again

ClaimedText = Claimed[LongText]
PROGRESS = "progress"


class ClaimLost(Exception):
    """Somebody else works on the text now: nothing more may be bought or written."""


class SpeechStopped(Exception):
    """The user has stopped the speech: nothing more may be bought."""


@dataclass(frozen=True, slots=True)
class SpokenSegment:
    """Where the samples of a segment are, and JSON of its subtitles, if any are wanted."""

    key: str
    samples: int
    cues: str | None = None


class OpenTexts(Claims[LongText]):
    """The texts that are not spoken to their end yet."""

    def __init__(self, database: Database, records: RecordService) -> None:
        super().__init__(database, LongText)
        self._records = records

    def tell_progress(self, record_id: int) -> None:
        """Let other processes, where somebody may wait for a text, know that there is news of it."""
        self._database.announcements.announce(PROGRESS, str(record_id))

    def hear_progress(self, listener: Callable[[int], object]) -> None:
        """Call `listener` with the record's id when any process has news of a text."""
        self._database.announcements.hear(PROGRESS, lambda word: listener(int(word)) if word else None)

    @once_more
    async def resume(self, claimed: ClaimedText) -> list[Segment]:
        """Take stock before going on: all segments in order. What a dead process had at stake is counted as a guess.

        Raises ClaimLost.
        """
        claim = select(LongText.record_id).where(claimed.is_mine).with_for_update()
        mine = select(Segment).where(Segment.record_id == claimed.record.id).order_by(Segment.number)
        async with self._database.transaction() as session:
            segments = list(await session.scalars(mine.with_for_update()))  # first, as whoever settles one does
            if await session.scalar(claim) is None:
                raise ClaimLost
            lost = [segment for segment in segments if segment.attempt]
            if lost:
                guess = sum(segment.at_stake for segment in lost)
                await _count(session, claimed.record.id, guess, guessed=guess, misses=1)
            for segment in lost:
                segment.attempt, segment.at_stake = None, 0
        return segments

    async def text(self, record_id: int, number: int) -> str:
        """What a segment says. Raises ClaimLost when it is gone."""
        wanted = select(Segment.text).where(Segment.record_id == record_id, Segment.number == number)
        async with self._database.snapshot() as session:
            text = await session.scalar(wanted)
        if text is None:
            raise ClaimLost
        return text

    @once_more
    async def stake(self, claimed: ClaimedText, number: int, attempt: uuid.UUID, characters: int) -> None:
        """Note what a try will count in all, right before its text goes out.

        Raises ClaimLost or SpeechStopped if it must not.
        """
        may_buy = exists().where(claimed.is_mine, LongText.cancelled_at.is_(None))
        noting = (
            update(Segment)
            .where(Segment.record_id == claimed.record.id, Segment.number == number, Segment.key.is_(None), may_buy)
            .values(attempt=attempt, at_stake=characters)
            .returning(Segment.number)
        )
        async with self._database.transaction() as session:
            if await session.scalar(noting) is None:
                is_mine = await session.scalar(select(LongText.record_id).where(claimed.is_mine))
                raise SpeechStopped if is_mine else ClaimLost

    @once_more
    async def settle(
        self, record_id: int, number: int, attempt: uuid.UUID, characters: int, spoken: SpokenSegment | None
    ) -> bool:
        """Write down what a try was counted, and what it brought, if it did. False if it was counted as a guess."""
        ending = update(Segment).where(
            Segment.record_id == record_id, Segment.number == number, Segment.attempt == attempt
        )
        values: dict[str, Any] = {"attempt": None, "at_stake": 0}
        if spoken is not None:
            values |= {"key": spoken.key, "samples": spoken.samples, "cues": spoken.cues}
        async with self._database.transaction() as session:
            if await session.scalar(ending.values(**values).returning(Segment.number)) is None:
                return False
            await _count(session, record_id, characters, done=spoken is not None)
        return True

    async def is_cancelled(self, record_id: int) -> bool:
        """Whether the user has stopped it."""
        async with self._database.snapshot() as session:
            found = await session.scalar(select(LongText.cancelled_at).where(LongText.record_id == record_id))
        return found is not None

    @once_more
    async def cancel(self, record_id: int) -> None:
        """Have the speech stopped, by whoever works on it."""
        cancelling = update(LongText).where(LongText.record_id == record_id, LongText.cancelled_at.is_(None))
        async with self._database.transaction() as session:
            await session.execute(cancelling.values(cancelled_at=datetime.now(UTC)))

    async def end(
        self,
        claimed: ClaimedText,
        status: Status,
        failure: AppError | None,
        record: OpenRecord,
    ) -> bool:
        """End the record with the bill of all tries. The text stays claimed until its work is cleared away."""
        counted = select(LongText.characters, LongText.guessed).where(LongText.record_id == record.id)
        async with self._database.snapshot() as session:
            found = (await session.execute(counted)).one_or_none()
        if found is None:
            return False
        record.quantity, guessed = found
        record.estimated = guessed > 0
        return await self._records.end(record, status, failure, provided=exists().where(claimed.is_mine))

    async def cues(self, record_id: int, number: int) -> str | None:
        """JSON of the subtitles of a segment."""
        wanted = select(Segment.cues).where(Segment.record_id == record_id, Segment.number == number)
        async with self._database.snapshot() as session:
            return await session.scalar(wanted)

    @once_more
    async def clear(self, claimed: ClaimedText, removed_keys: Collection[str] = ()) -> None:
        """Forget the segments of a text whose record has its end; what was removed of them is removed once more."""
        clearing = update(LongText).where(claimed.is_mine).returning(LongText.record_id)
        async with self._database.transaction() as session:
            its_segments = Segment.record_id == claimed.record.id
            await session.execute(delete(Segment).where(its_segments, exists().where(claimed.is_mine)))
            cleared = clearing.values(next_check_at=None, claimed_by=None, claimed_until=None)
            if await session.scalar(cleared) is not None:
                remove_again(session, removed_keys)


async def _count(
    session: AsyncSession, record_id: int, characters: int, *, guessed: int = 0, done: bool = False, misses: int = 0
) -> None:
    counting = update(LongText).where(LongText.record_id == record_id)
    await session.execute(
        counting.values(
            characters=LongText.characters + characters,
            guessed=LongText.guessed + guessed,
            segments_done=LongText.segments_done + int(done),
            misses=0 if done else LongText.misses + misses,
        )
    )
