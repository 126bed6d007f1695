"""Objects that are to disappear from the store.

Each is written down in the transaction that forgets it elsewhere, so that neither a crash nor a store that is away
leaves it behind. Any process removes what is due; to do so twice is harmless.
"""

import asyncio
import random
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog
from sqlalchemy import ColumnElement, delete, exists, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.database import UNAVAILABLE, Database, once_more
from app.errors import StorageError
from app.models import LongText, Record, Removal, Segment
from app.storage import Storage, work_key

log = structlog.get_logger(__name__)

REMOVED_AT_ONCE = 64
CALLS_AT_ONCE = 8
# How long who took some on may be silent before somebody else does: longer than a slow store takes for all of them.
CLAIM = timedelta(minutes=2)
# An upload under way, or audio that another machine holds for the store, may bring an object back after its removal.
AGAIN_AFTER = timedelta(days=1)
ROUND_SECONDS = 10.0
SHORTEST_PAUSE_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Removed:
    """What became of some objects: how many are gone, and whether the store refused one."""

    gone: int = 0
    is_refused: bool = False


def remove_later(
    session: AsyncSession, keys: Iterable[str], erasure_id: uuid.UUID | None = None, after: timedelta = timedelta(0)
) -> None:
    """Have objects removed some time after the transaction is committed; at once unless told otherwise."""
    remove_at = datetime.now(UTC) + after
    session.add_all(Removal(key=key, remove_at=remove_at, erasure_id=erasure_id) for key in keys)


def remove_again(session: AsyncSession, keys: Iterable[str]) -> None:
    """Have objects that were removed just now removed once more a day later."""
    now = datetime.now(UTC)
    session.add_all(Removal(key=key, remove_at=now + AGAIN_AFTER, removed_at=now) for key in keys)


async def keys_of(session: AsyncSession, record_ids: Sequence[int]) -> set[str]:
    """Wherever something of these records may lie in the store, but for the samples of voices."""
    places = (
        select(
            Record.output_key,
            Record.planned_key,
            LongText.output_key,
            LongText.subtitle_key,
        )
        .outerjoin(LongText, LongText.record_id == Record.id)
        .where(Record.id.in_(record_ids))
    )
    is_cut = exists().where(Segment.record_id == LongText.record_id)
    in_work = select(LongText.record_id, LongText.segments_total).where(LongText.record_id.in_(record_ids), is_cut)
    keys = {key for row in await session.execute(places) for key in row if key}
    for record_id, segments_total in await session.execute(in_work):
        keys.update(work_key(record_id, number) for number in range(segments_total))
    return keys


class Remover:
    """Removes what is due, a little at a time."""

    def __init__(self, database: Database, storage: Storage) -> None:
        self._database = database
        self._storage = storage
        self._awake = asyncio.Event()
        database.announcements.hear(Removal.__name__, lambda _: self._awake.set())

    def wake(self) -> None:
        """Have the next round begin now, here or in another process."""
        self._awake.set()
        self._database.announcements.announce(Removal.__name__)

    async def run(self) -> None:
        """Until cancelled: remove what is due. A store that is away is waited for a little longer each time."""
        failures = 0
        while True:
            self._awake.clear()
            removed = Removed()
            try:
                removed = await self.remove_some()
                failures = failures + 1 if removed.is_refused and not removed.gone else 0
            except Exception as error:
                # Whatever it was, the next round must come.
                failures += 1
                log.warning("objects_not_removed", error=type(error).__name__, exc_info=_is_unexpected(error))
            if failures:
                await asyncio.sleep(_pause_seconds(failures))
            elif not removed.gone:
                with suppress(TimeoutError):
                    async with asyncio.timeout(random.uniform(ROUND_SECONDS / 2, ROUND_SECONDS)):  # noqa: S311
                        await self._awake.wait()

    async def remove_all(self, erasure_id: uuid.UUID) -> bool:
        """Remove what is due of an erasure; False if some of it is not gone yet."""
        while (removed := await self.remove_some(erasure_id)).gone and not removed.is_refused:
            pass
        left = exists().where(Removal.erasure_id == erasure_id, Removal.removed_at.is_(None))
        async with self._database.snapshot() as session:
            return not await session.scalar(select(left))

    async def remove_some(self, erasure_id: uuid.UUID | None = None) -> Removed:
        """Remove some of what is due, of an erasure or of all, that nobody else works on."""
        token = uuid.uuid4()
        claimed = await self._claim(token, erasure_id)
        if not claimed:
            return Removed()
        gone: list[Removal] = []
        refused: list[Removal] = []
        calls = asyncio.Semaphore(CALLS_AT_ONCE)

        async def remove(removal: Removal) -> None:
            async with calls:
                if refused:
                    return  # a store that is away would refuse the rest as well
                try:
                    await self._storage.delete(removal.key)
                except (StorageError, ValueError) as error:
                    log.warning("object_not_removed", key=removal.key, error=type(error).__name__)
                    refused.append(removal)
                else:
                    gone.append(removal)

        async with asyncio.TaskGroup() as removing:
            for removal in sorted(claimed, key=lambda each: each.misses):  # what was refused before, last
                removing.create_task(remove(removal))
        await self._note(token, gone, refused)
        return Removed(len(gone), bool(refused))

    @once_more
    async def _claim(self, token: uuid.UUID, erasure_id: uuid.UUID | None) -> list[Removal]:
        """Take some of what is due on, the longest due first; after a while it is due again."""
        now = datetime.now(UTC)
        is_due: list[ColumnElement[bool]] = [Removal.remove_at <= now]
        if erasure_id is not None:
            is_due.append(Removal.erasure_id == erasure_id)
        some = select(Removal.id).where(*is_due).order_by(Removal.remove_at).limit(REMOVED_AT_ONCE)
        claiming = update(Removal).where(Removal.id.in_(some.with_for_update(skip_locked=True)), *is_due)
        taken = claiming.values(remove_at=now + CLAIM, claimed_by=token).returning(Removal)
        async with self._database.transaction() as session:
            return list(await session.scalars(taken))

    @once_more
    async def _note(self, token: uuid.UUID, gone: list[Removal], refused: list[Removal]) -> None:
        """Write down what became of what was taken on; what was not come to is due at once."""
        now = datetime.now(UTC)
        mine = Removal.claimed_by == token
        first = [each.id for each in gone if each.removed_at is None]
        second = [each.id for each in gone if each.removed_at is not None]
        again = update(Removal).where(mine, Removal.id.in_(first))
        async with self._database.transaction() as session:
            await session.execute(delete(Removal).where(mine, Removal.id.in_(second)))
            values = {"removed_at": now, "remove_at": now + AGAIN_AFTER, "misses": 0, "claimed_by": None}
            await session.execute(again.values(**values))
            for each in refused:
                later = now + timedelta(seconds=_pause_seconds(each.misses + 1))
                put_off = update(Removal).where(mine, Removal.id == each.id)
                await session.execute(put_off.values(remove_at=later, misses=each.misses + 1, claimed_by=None))
            if refused:
                await session.execute(update(Removal).where(mine).values(remove_at=now, claimed_by=None))


def _pause_seconds(failures: int) -> float:
    longest = min(SHORTEST_PAUSE_SECONDS * 2.0 ** min(failures, 10), LONGEST_PAUSE_SECONDS)
    return random.uniform(longest / 2, longest)  # noqa: S311 - spreads load, hides nothing


def _is_unexpected(error: Exception) -> bool:
    return not isinstance(error, UNAVAILABLE)
