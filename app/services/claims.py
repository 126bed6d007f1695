"""Who looks after what at the provider: rows that are due, and the right to ask about one of them.

A claim makes one process at a time ask about a row. It is kept up while that process lives, and runs out soon after
its death. What a process writes without its claim, because it slept meanwhile, changes nothing.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, NamedTuple, TypeVar

import structlog
from sqlalchemy import ColumnElement, or_, select, update

from app.completion import end_by_cancelling
from app.database import Database
from app.models import Record, Watched
from app.services.records import UNAVAILABLE, OpenRecord, Price

log = structlog.get_logger(__name__)

CLAIM = timedelta(seconds=30)
CLAIM_RENEWAL_SECONDS = 10.0

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
    def opened(self) -> OpenRecord:
        """The record, to be ended; what is known of its cost is billed."""
        record = self.record
        price = Price(record.unit, record.unit_price, record.currency)
        quantity = record.expected_quantity
        return OpenRecord(record.id, price, quantity=quantity, provider_request_id=self.row.provider_name)

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
    async def kept(self, claimed: Claimed[Row]) -> AsyncIterator[None]:
        """Keep a claim up for as long as the block lasts."""
        keeping = asyncio.create_task(self._keep(claimed))
        try:
            yield
        finally:
            await end_by_cancelling(keeping)

    async def put_back(self, claimed: Claimed[Row], changes: dict[str, Any]) -> None:
        """Give the right back, and note what is to be known by whoever asks next."""
        putting = update(self._table).where(claimed.is_mine)
        async with self._database.transaction() as session:
            await session.execute(putting.values(claimed_by=None, claimed_until=None, **changes))

    async def _keep(self, claimed: Claimed[Row]) -> None:
        """Renew the claim until it is ours no more."""
        while True:
            await asyncio.sleep(CLAIM_RENEWAL_SECONDS)
            renewal = update(self._table).where(claimed.is_mine).values(claimed_until=datetime.now(UTC) + CLAIM)
            try:
                async with self._database.transaction() as session:
                    renewed = await session.scalar(renewal.returning(self._table.record_id))
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
        return or_(self._table.claimed_until.is_(None), self._table.claimed_until < now)
