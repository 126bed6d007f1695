"""How many records a user has, and which of them are on a page, without walking past all the others each time."""

import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import ScalarSelect, Select, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from app.models import Record
from app.services.selection import NEWEST_FIRST, OLDEST_FIRST, HistoryFilter, Place, PlaceColumns

STRIDE = 2000
# Longer than anybody takes to write a record down once he has dated it: nothing older than that is still to come.
SETTLED_AFTER = timedelta(minutes=30)
# Walked again then, whatever clocks did meanwhile.
FORGOTTEN_AFTER_SECONDS = 3600.0
REMEMBERED_PLACES = 50_000  # some ten megabytes


@dataclass(frozen=True, slots=True)
class Way:
    """The wanted records of a user, from the oldest to the newest, with a milestone at each so many of them."""

    user_id: uuid.UUID
    wanted: HistoryFilter
    milestones: Sequence[Place]
    total: int

    def ids(self, begin: int, end: int) -> Select[int]:
        """Those of the records from `begin` up to `end`, counted from the newest; found from the nearest milestone."""
        first, last = self.total - end, self.total - begin  # counted from the oldest
        behind, ahead = min(first // STRIDE, len(self.milestones)), last // STRIDE + 1
        back = ahead * STRIDE - 1 - last if ahead <= len(self.milestones) else begin
        found = select(Record.id).limit(end - begin)
        if first - behind * STRIDE <= back:
            place = self.milestones[behind - 1] if behind else None
            found = found.where(*self.wanted.conditions(self.user_id, after=place))
            return found.order_by(*OLDEST_FIRST).offset(first - behind * STRIDE)
        place = self.milestones[ahead - 1] if ahead <= len(self.milestones) else None
        found = found.where(*self.wanted.conditions(self.user_id, before=place))
        return found.order_by(*NEWEST_FIRST).offset(back)


class Surveyor:
    """Counts records, and remembers milestones where they can no longer move.

    No record is ever added in the past, becomes another, or goes: only an erased user loses his, who asks no more.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[uuid.UUID, HistoryFilter], tuple[list[Place], float]] = OrderedDict()
        self._places = 0

    async def survey(self, session: AsyncSession, user_id: uuid.UUID, wanted: HistoryFilter) -> Way:
        """Where the wanted records of a user are: one statement, and some more for many that are not known yet."""
        milestones, forgotten_at = self._recall(user_id, wanted)
        last = milestones[-1] if milestones else None
        rest = await _count(session, user_id, wanted, last, at_most=2 * STRIDE)
        if rest == 2 * STRIDE:
            milestones = [*milestones, *await _set_milestones(session, user_id, wanted, last)]
            self._remember(user_id, wanted, milestones, forgotten_at)
            rest = await _count(session, user_id, wanted, milestones[-1] if milestones else None)
        return Way(user_id, wanted, milestones, len(milestones) * STRIDE + rest)

    def _recall(self, user_id: uuid.UUID, wanted: HistoryFilter) -> tuple[list[Place], float]:
        now = time.monotonic()
        milestones, forgotten_at = self._known.get((user_id, wanted), ([], now))
        if now >= forgotten_at:
            return [], now + FORGOTTEN_AFTER_SECONDS
        self._known.move_to_end((user_id, wanted))
        return milestones, forgotten_at

    def _remember(
        self, user_id: uuid.UUID, wanted: HistoryFilter, milestones: list[Place], forgotten_at: float
    ) -> None:
        former, _ = self._known.pop((user_id, wanted), ([], 0.0))
        self._known[user_id, wanted] = milestones, forgotten_at
        self._places += len(milestones) - len(former)
        while self._places > REMEMBERED_PLACES and len(self._known) > 1:
            _, (forgotten, _) = self._known.popitem(last=False)
            self._places -= len(forgotten)


async def _count(
    session: AsyncSession, user_id: uuid.UUID, wanted: HistoryFilter, last: Place | None, at_most: int | None = None
) -> int:
    """How many of the wanted records come after a milestone."""
    rest = select(Record.id).where(*wanted.conditions(user_id, after=last)).limit(at_most)
    return await session.scalar(select(func.count()).select_from(rest.subquery())) or 0


async def _set_milestones(
    session: AsyncSession, user_id: uuid.UUID, wanted: HistoryFilter, last: Place | None
) -> list[Place]:
    """The milestones after the last one that is known, as far as all is settled; found by walking the index once."""
    made = aliased(Record)

    def step(last: Place | PlaceColumns | None) -> ScalarSelect[int]:
        ids = select(Record.id).where(*wanted.conditions(user_id, after=last)).order_by(*OLDEST_FIRST)
        return ids.offset(STRIDE - 1).limit(1).scalar_subquery()

    walk = select(made.created_at, made.id).where(made.id == step(last)).cte("walk", recursive=True)
    walk = walk.union_all(select(made.created_at, made.id).join(walk, made.id == step((walk.c.created_at, walk.c.id))))
    settled_before = datetime.now(UTC) - SETTLED_AFTER
    found = await session.execute(select(walk.c.created_at, walk.c.id).order_by(walk.c.created_at, walk.c.id))
    return [(made_at, record_id) for made_at, record_id in found if made_at < settled_before]
