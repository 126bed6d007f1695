"""The durable job engine: what has to be done at some time, by one process, whichever lives.

A job is a row that says when somebody has to work on it next: a `Watched` one, beside the record that it belongs to, so
that a job, its record and the bill change in one transaction. Every process goes its rounds over the rows that are due.
A claim makes one process at a time work on a row. It is kept up while that process lives, and runs out soon after its
death, so that another takes over. What a process writes without its claim, because it slept meanwhile, changes nothing.
"""

import asyncio
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import structlog
from anyio import CancelScope
from sqlalchemy import ColumnElement, func, or_, select, update

from app.completion import end_by_cancelling, run_to_end
from app.database import UNAVAILABLE, Database, once_more
from app.errors import AppError, InvalidApiKey, NoApiKey, SealBroken
from app.inflight import InFlight
from app.models import Record, Watched
from app.probes import job

log = structlog.get_logger(__name__)

CLAIM = timedelta(seconds=20)
CLAIM_RENEWAL_SECONDS = 4.0
TRUST_AFTER = timedelta(seconds=8)
ROUND_SECONDS = 5.0
FAILED_CHECK_SECONDS = 10.0
NO_KEY_SECONDS = 60.0

# What the jobs of each table are called by those who watch over them.
KINDS = {
    "LongText": "long_text",
    "Transcription": "transcription",
    "SubmittedFile": "submission",
    "Enrollment": "enrollment",
}

Row = TypeVar("Row", bound=Watched)


class DueRow(NamedTuple):
    """What somebody has to ask about at a moment."""

    record_id: int
    user_id: uuid.UUID
    due_at: datetime


@dataclass(frozen=True, slots=True)
class Claimed(Generic[Row]):
    """A row that nobody else asks about now, with its record."""

    row: Row
    record: Record
    token: uuid.UUID = field(default_factory=uuid.uuid4)

    @property
    def age(self) -> timedelta:
        """How long ago its record was opened, by our own clock."""
        return datetime.now(UTC) - self.record.created_at

    @property
    def is_mine(self) -> ColumnElement[bool]:
        """That the claim still holds, and the row is still to be asked about."""
        table = type(self.row)
        return (table.record_id == self.record.id) & (table.claimed_by == self.token) & table.next_check_at.is_not(None)


class Claims(Generic[Row]):
    """The rows of one table that are looked after."""

    def __init__(self, database: Database, table: type[Row]) -> None:
        self._database = database
        self._table = table
        self.kind = KINDS[table.__name__]
        self._trusted_from = datetime.now(UTC)

    def doubt_expiry(self) -> None:
        """Let others who could not reach the database either renew their claims, before one that ran out is taken."""
        self._trusted_from = datetime.now(UTC) + TRUST_AFTER

    def tell_others(self) -> None:
        """Let every process that shares the database know of a new row."""
        self._database.announcements.announce(self._table.__name__)

    def hear(self, listener: Callable[[], object]) -> None:
        """Call `listener` when any process has a new row."""
        self._database.announcements.hear(self._table.__name__, lambda _: listener())

    async def due(self, limit: int, without: Collection[uuid.UUID] = ()) -> list[DueRow]:
        """The next rows that nobody asks about, soonest first, but for those of some users."""
        table = self._table
        rows = (
            select(table.record_id, table.user_id, table.next_check_at)
            .where(table.next_check_at.is_not(None), table.user_id.not_in(without), self._is_free(datetime.now(UTC)))
            .order_by(table.next_check_at)
            .limit(limit)
        )
        async with self._database.snapshot() as session:
            found = await session.execute(rows)
        return [DueRow(record_id, user_id, due_at) for record_id, user_id, due_at in found if due_at is not None]

    async def next_expiry(self) -> datetime | None:
        """When the first of the claims that are held now runs out, if its holder dies; None when none is held."""
        table = self._table
        claims = select(func.min(table.claimed_until)).where(
            table.next_check_at.is_not(None), table.claimed_until >= datetime.now(UTC)
        )
        async with self._database.snapshot() as session:
            return await session.scalar(claims)

    @once_more
    async def claim(self, record_id: int) -> Claimed[Row] | None:
        """Take the right to ask about a row; None when all is known, or somebody else has the right."""
        table, now = self._table, datetime.now(UTC)
        token = uuid.uuid4()
        claiming = (
            update(table)
            .where(table.record_id == record_id, table.next_check_at.is_not(None), self._is_free(now))
            .values(claimed_by=token, claimed_until=now + CLAIM)
            .returning(table)
        )
        async with self._database.transaction() as session:
            row = await session.scalar(claiming)
            record = await session.get(Record, record_id)
        return Claimed(row, record, token) if row and record else None

    @asynccontextmanager
    async def kept(self, claimed: Claimed[Row], on_loss: Callable[[], object] = bool) -> AsyncIterator[None]:
        """Keep a claim up for as long as the block lasts; `on_loss` is called should somebody else have taken it."""
        keeping = asyncio.create_task(self._keep(claimed, on_loss))
        try:
            yield
        finally:
            await end_by_cancelling(keeping)

    @once_more
    async def put_back(self, claimed: Claimed[Row], changes: dict[str, Any]) -> None:
        """Give the right back, and note what is to be known by whoever asks next."""
        putting = update(self._table).where(claimed.is_mine)
        async with self._database.transaction() as session:
            await session.execute(putting.values(claimed_by=None, claimed_until=None, **changes))

    async def _keep(self, claimed: Claimed[Row], on_loss: Callable[[], object]) -> None:
        """Renew the claim until it is ours no more."""
        while True:
            await asyncio.sleep(CLAIM_RENEWAL_SECONDS)
            renewal = update(self._table).where(claimed.is_mine).values(claimed_until=datetime.now(UTC) + CLAIM)
            try:
                async with self._database.pulse() as session:
                    renewed = await session.scalar(renewal.returning(self._table.record_id))
                    holder = select(self._table.claimed_by).where(self._table.record_id == claimed.record.id)
                    if renewed is None and await session.scalar(holder) is not None:
                        on_loss()
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

    def _is_free(self, now: datetime) -> ColumnElement[bool]:
        is_let_go = self._table.claimed_until.is_(None)
        return or_(is_let_go, self._table.claimed_until < now) if now >= self._trusted_from else is_let_go


class Rounds(ABC, Generic[Row]):
    """Works on the rows of one table when they are due: asks the provider about them, for the most part."""

    at_once: ClassVar[int] = 64
    per_user: ClassVar[int] = 8  # one user's slow checks leave room for everybody else's

    def __init__(self, rows: Claims[Row], in_flight: InFlight) -> None:
        self._rows = rows
        self._in_flight = in_flight
        self._checking: dict[int, asyncio.Task[AppError | None]] = {}
        self._busy: Counter[uuid.UUID] = Counter()
        self._awake = asyncio.Event()
        rows.hear(self._awake.set)

    async def run(self) -> None:
        """Until cancelled: check every row when it is due."""
        while True:
            self._awake.clear()
            try:
                pause_seconds = await self._start_due_checks()
            except Exception as error:
                # Whatever it was, the next round must come.
                self._rows.doubt_expiry()
                log.warning("round_failed", rounds=type(self).__name__, error=type(error).__name__, exc_info=True)
                pause_seconds = ROUND_SECONDS
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_seconds):
                    await self._awake.wait()

    def wake(self) -> None:
        """Have the next round begin now, here or in another process: there is a new row."""
        self._awake.set()
        self._rows.tell_others()

    def check(self, record_id: int) -> asyncio.Task[AppError | None]:
        """Ask the provider about a row, once for everybody who asks now. Gives what kept us from an answer."""
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
        room = self.at_once - len(self._checking)
        if room <= 0 or self._in_flight.hurried or self._in_flight.stopping:
            return ROUND_SECONDS
        now = datetime.now(UTC)
        limit = room + 1 + len(self._checking)  # some of these are perhaps not claimed yet, and seem free
        due = await self._rows.due(limit, without=self._users_at_their_limit())
        for number, row in enumerate(each for each in due if each.record_id not in self._checking):
            if row.due_at > now:
                return min(ROUND_SECONDS, (row.due_at - now).total_seconds())
            if number < room and row.user_id not in self._users_at_their_limit():
                self._busy[row.user_id] += 1
                self.check(row.record_id).add_done_callback(partial(self._leave, row.user_id))
        expiry = await self._rows.next_expiry()
        return min(ROUND_SECONDS, (expiry - now).total_seconds()) if expiry else ROUND_SECONDS

    def _users_at_their_limit(self) -> set[uuid.UUID]:
        return {user_id for user_id, checks in self._busy.items() if checks >= self.per_user}

    def _leave(self, user_id: uuid.UUID, _: object) -> None:
        self._busy[user_id] -= 1
        if not self._busy[user_id]:
            del self._busy[user_id]

    async def _check(self, record_id: int) -> AppError | None:
        claimed = await self._rows.claim(record_id)
        if claimed is None:
            return None
        failure: AppError | None = None
        changes = again_in(FAILED_CHECK_SECONDS)
        try:
            with CancelScope() as scope:
                stop = partial(self._stop, claimed, scope)
                with self._in_flight.stoppable(stop):
                    async with self._rows.kept(claimed, stop):
                        with job(self._rows.kind, record_id):
                            changes = await self._ask(claimed)
            if scope.cancelled_caught:
                changes = {}
        except AppError as error:
            failure = error
            if isinstance(error, NoApiKey | SealBroken | InvalidApiKey):
                changes = again_in(NO_KEY_SECONDS)
        except Exception:
            log.exception("check_broke", rounds=type(self).__name__, record_id=record_id)
            failure = AppError()
        finally:
            if failure is not None and self._is_hopeless(claimed):
                await run_to_end(self._give_up(claimed, failure))
            await run_to_end(self._rows.put_back(claimed, changes))
            if self._in_flight.hurried:
                self._rows.tell_others()
        if failure is not None:
            log.warning("check_failed", rounds=type(self).__name__, record_id=record_id, error=type(failure).__name__)
        return failure

    def _stop(self, claimed: Claimed[Row], scope: CancelScope) -> None:
        """Break off what is under way: somebody else goes on, because this process is about to end, or did already."""
        scope.cancel()

    @abstractmethod
    async def _ask(self, claimed: Claimed[Row]) -> dict[str, Any]:
        """Do what is due, such as asking the provider once. Gives what is to be noted if the row is to be due again.

        Raises the AppError that kept it from that.
        """

    @abstractmethod
    def _is_hopeless(self, claimed: Claimed[Row]) -> bool:
        """Whether a row that can't be asked about has been waited for long enough."""

    @abstractmethod
    async def _give_up(self, claimed: Claimed[Row], failure: AppError) -> None:
        """End a hopeless row."""


def again_in(seconds: float) -> dict[str, Any]:
    """What to note for a row that is to be asked about after a while."""
    now = datetime.now(UTC)
    return {"checked_at": now, "next_check_at": now + timedelta(seconds=seconds)}
