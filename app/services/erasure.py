"""A user who leaves takes everything with him: his records and bills, what was said, and its audio.

    asked ──► shut out      one transaction: no token, no key, his name is free; what is done for him is stopped
          ──► waited for    calls under way end by themselves; those of dead processes run out
          ──► erased        records in batches, their objects by removals, and the user at last

The row of the erasure is there from the first step to the last: any process goes on with it.
"""

import asyncio
import json
import random
import uuid
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import structlog
from sqlalchemy import ColumnElement, Select, and_, delete, exists, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.database import UNAVAILABLE, Database, once_more
from app.inflight import InFlight
from app.models import (
    Bill,
    Enrollment,
    Erasure,
    LongText,
    Record,
    Segment,
    SubmittedFile,
    Transcription,
    User,
    Voice,
    VoiceListing,
    VoiceSample,
)
from app.services.accounts import AccountService
from app.services.removals import Remover, keys_of, remove_later

log = structlog.get_logger(__name__)

PATIENCE_SECONDS = 10.0
RECORDS_AT_ONCE = 100
# How long who goes on with an erasure may be silent before somebody else does.
CLAIM = timedelta(seconds=30)
LOOK_SECONDS = 0.2
ROUND_SECONDS = 5.0
WAIT = timedelta(seconds=2)
_OF_RECORDS = (Bill, Segment, LongText, Transcription, SubmittedFile, Enrollment, VoiceSample)


class ErasureLost(Exception):
    """Somebody else goes on with the erasure, or did to its end."""


class ErasureService:
    """Erases users who ask for it, and goes on with what other processes have begun."""

    def __init__(self, database: Database, accounts: AccountService, remover: Remover, in_flight: InFlight) -> None:
        self._database = database
        self._accounts = accounts
        self._remover = remover
        self._in_flight = in_flight

    async def erase(self, user_id: uuid.UUID) -> bool:
        """Erase a user. False if that goes on in the background because it takes long.

        He can come in no more once this returns or raises anything but Unauthorized, which is for who has left already.
        """
        token = uuid.uuid4()
        erasure_id = await self._shut_out(user_id, token)
        log.info("user_leaves", user_id=str(user_id), erasure_id=str(erasure_id))
        return await asyncio.shield(self._in_flight.start(self._finish(erasure_id, token)))

    async def run(self) -> None:
        """Until cancelled: go on with erasures that nobody works on."""
        while True:
            try:
                await self.go_on()
            except Exception as error:
                # Whatever it was, the next round must come.
                unexpected = not isinstance(error, UNAVAILABLE)
                log.warning("erasure_round_failed", error=type(error).__name__, exc_info=unexpected)
            await asyncio.sleep(random.uniform(ROUND_SECONDS / 2, ROUND_SECONDS))  # noqa: S311 - parts several processes

    async def go_on(self) -> None:
        """Go on with every erasure that is due, for as long as there is something to do now."""
        due = select(Erasure.id).where(Erasure.next_at <= datetime.now(UTC)).order_by(Erasure.next_at)
        async with self._database.snapshot() as session:
            erasure_ids = list(await session.scalars(due))
        for erasure_id in erasure_ids:
            token = uuid.uuid4()
            with suppress(ErasureLost):
                await self._claim(erasure_id, token)
                if not await self._advance(erasure_id, token):
                    await self._put_back(erasure_id, token)

    async def _finish(self, erasure_id: uuid.UUID, token: uuid.UUID) -> bool:
        """Erase as much as there is time for. False if others have to go on."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not await self._advance(erasure_id, token):
                    if self._in_flight.hurried:
                        break
                    await asyncio.sleep(LOOK_SECONDS)
                else:
                    return await self._remover.remove_all(erasure_id)
        except (TimeoutError, ErasureLost):
            pass
        except UNAVAILABLE as error:
            log.warning("erasure_delayed", erasure_id=str(erasure_id), error=type(error).__name__)
        with suppress(*UNAVAILABLE):  # else the claim runs out
            await self._put_back(erasure_id, token)
        return False

    @once_more
    async def _shut_out(self, user_id: uuid.UUID, token: uuid.UUID) -> uuid.UUID:
        """Let the user come in no more, and stop what is done for him. Gives the erasure. Raises Unauthorized."""
        now = datetime.now(UTC)
        async with self._database.transaction() as session:
            key = await self._accounts.shut_out(session, user_id)
            accounts = {self._accounts.account_of(key)} if key else set()
            for used in (Enrollment, VoiceSample):  # he may have had other keys before
                accounts.update(await session.scalars(select(used.account).where(used.user_id == user_id).distinct()))
            known = json.dumps(sorted(account for account in accounts if account))
            erasure = Erasure(user_id=user_id, accounts=known, next_at=now + CLAIM, claimed_by=token)
            session.add(erasure)
            for job in (Transcription, SubmittedFile, Enrollment):
                followed = update(job).where(job.user_id == user_id, job.next_check_at.is_not(None))
                await session.execute(followed.values(next_check_at=None, claimed_by=None, claimed_until=None))
            spoken = update(LongText).where(LongText.user_id == user_id, LongText.next_check_at.is_not(None))
            await session.execute(spoken.values(cancelled_at=func.coalesce(LongText.cancelled_at, now)))
        if key:
            self._accounts.disconnect(key)
        return erasure.id

    async def _advance(self, erasure_id: uuid.UUID, token: uuid.UUID) -> bool:
        """Erase what can be erased now. True once nothing is left. Raises ErasureLost."""
        while await self._erase_records(erasure_id, token):
            pass
        return await self._erase_user(erasure_id, token)

    @once_more
    async def _erase_records(self, erasure_id: uuid.UUID, token: uuid.UUID) -> int:
        """Erase some records that have ended, or that nobody works on. Gives their number. Raises ErasureLost."""
        now = datetime.now(UTC)
        async with self._database.transaction() as session:
            user_id = await _renew(session, erasure_id, token)
            found = {record_id: status for record_id, status in await session.execute(at_rest(user_id, now))}  # noqa: C416 - rows
            texts = select(LongText.record_id, LongText.claimed_until).where(LongText.record_id.in_(found))
            for record_id, claimed_until in await session.execute(texts.with_for_update()):
                if found[record_id] == "running" and claimed_until and claimed_until >= now:
                    del found[record_id]  # somebody took it on just now
            if not found:
                return 0
            samples = select(VoiceSample.key).where(VoiceSample.record_id.in_(found))
            keys = {*await keys_of(session, list(found)), *await session.scalars(samples)}
            remove_later(session, keys, erasure_id)
            for table in _OF_RECORDS:
                await session.execute(delete(table).where(table.record_id.in_(found)))
            await session.execute(delete(Record).where(Record.id.in_(found)))
        self._remover.wake()
        return len(found)

    async def _erase_user(self, erasure_id: uuid.UUID, token: uuid.UUID) -> bool:
        """Erase what is left once there is no record any more. False while there is one. Raises ErasureLost."""
        has_records = exists().where(Record.user_id == Erasure.user_id)
        mine = select(Erasure.accounts, has_records).where(Erasure.id == erasure_id)
        async with self._database.snapshot() as session:
            found = (await session.execute(mine)).one_or_none()
        if found is None:
            raise ErasureLost
        accounts, is_waiting = set(json.loads(found[0])), found[1]
        if is_waiting:
            return False
        await self._erase_rest(erasure_id, token, accounts - await self._accounts.are_reached(accounts))
        self._remover.wake()
        log.info("user_erased", erasure_id=str(erasure_id))
        return True

    @once_more
    async def _erase_rest(self, erasure_id: uuid.UUID, token: uuid.UUID, accounts: set[str]) -> None:
        """Erase the user, and what is known of accounts at the provider that nobody else reaches."""
        async with self._database.transaction() as session:
            user_id = await _renew(session, erasure_id, token)
            samples = delete(VoiceSample).where(VoiceSample.user_id == user_id).returning(VoiceSample.key)
            remove_later(session, await session.scalars(samples), erasure_id)
            for table in (Voice, VoiceListing):
                await session.execute(delete(table).where(table.account.in_(accounts)))
            await session.execute(delete(Erasure).where(Erasure.id == erasure_id))
            await session.execute(delete(User).where(User.id == user_id))

    @once_more
    async def _claim(self, erasure_id: uuid.UUID, token: uuid.UUID) -> None:
        """Take an erasure on. Raises ErasureLost when somebody else has."""
        now = datetime.now(UTC)
        due = update(Erasure).where(Erasure.id == erasure_id, Erasure.next_at <= now)
        taken = due.values(next_at=now + CLAIM, claimed_by=token).returning(Erasure.id)
        async with self._database.transaction() as session:
            if await session.scalar(taken) is None:
                raise ErasureLost

    @once_more
    async def _put_back(self, erasure_id: uuid.UUID, token: uuid.UUID) -> None:
        """Leave an erasure to whoever looks next."""
        mine = update(Erasure).where(Erasure.id == erasure_id, Erasure.claimed_by == token)
        async with self._database.transaction() as session:
            await session.execute(mine.values(next_at=datetime.now(UTC) + WAIT, claimed_by=None))


def at_rest(user_id: uuid.UUID, now: datetime) -> Select[int, str]:
    """The records of a user to erase next, with their status: the oldest that have ended, or that nobody works on."""
    return (
        select(Record.id, Record.status)
        .outerjoin(LongText, LongText.record_id == Record.id)
        .where(Record.user_id == user_id, _is_at_rest(now))
        .order_by(Record.created_at, Record.id)
        .limit(RECORDS_AT_ONCE)
        .with_for_update(of=Record)
    )


def _is_at_rest(now: datetime) -> ColumnElement[bool]:
    """Whether a record has its end, or nobody works on it: none but long texts are gone on with for who has left."""
    is_free = or_(LongText.record_id.is_(None), LongText.claimed_until.is_(None), LongText.claimed_until < now)
    is_left = and_(Record.lease_expires_at.is_(None), is_free)
    return or_(Record.status != "running", Record.lease_expires_at < now, is_left)


async def _renew(session: AsyncSession, erasure_id: uuid.UUID, token: uuid.UUID) -> uuid.UUID:
    """Keep an erasure for a while longer; gives its user. Raises ErasureLost."""
    mine = update(Erasure).where(Erasure.id == erasure_id, Erasure.claimed_by == token)
    kept = mine.values(next_at=datetime.now(UTC) + CLAIM).returning(Erasure.user_id)
    user_id = await session.scalar(kept)
    if user_id is None:
        raise ErasureLost
    return user_id
