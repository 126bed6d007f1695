"""What a user allows himself to spend in a month, which begins in the zone that clients are shown times in."""

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from decimal import Decimal

from sqlalchemy import Connection, and_, case, func, insert, literal_column, select, type_coerce, update

from app.columns import Money
from app.database import Database, once_more
from app.errors import BudgetExceeded
from app.models import Bill, LongText, Record, Subtotal, User

# Longer than anybody takes to write a bill down once he has dated it.
SETTLED_AFTER = timedelta(minutes=30)
# So many bills are added up for each call. When there are more, the sum of those that are settled is kept.
ADDED_UP_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Budget:
    """A user's month: what he allows himself, what was billed, and what is held back for calls under way."""

    month: str
    monthly: Decimal | None
    spent: Decimal
    reserved: Decimal

    @property
    def remaining(self) -> Decimal | None:
        """What is left for new calls, never less than nothing; None without a budget."""
        return None if self.monthly is None else max(Decimal(0), self.monthly - self.spent - self.reserved)


class BudgetService:
    """Shows and sets budgets."""

    def __init__(self, database: Database, zone: tzinfo) -> None:
        self._database = database
        self._zone = zone

    async def show(self, user_id: uuid.UUID) -> Budget:
        """How the user's month stands."""
        now = datetime.now(self._zone)
        async with self._database.snapshot() as session:
            connection = await session.connection()
            month = await connection.run_sync(_look_up, user_id, now)
            tally = await connection.run_sync(_tally, month)
        if tally.settled_bills >= ADDED_UP_AT_ONCE:
            month, tally = await self._add_up(user_id, now)
        return Budget(f"{now:%Y-%m}", month.budget, tally.spent, tally.reserved)

    @once_more
    async def set(self, user_id: uuid.UUID, monthly: Decimal | None) -> Budget:
        """Allow that much a month from now on; None removes the budget. Gives how the month stands."""
        async with self._database.transaction() as session:
            await session.execute(update(User).where(User.id == user_id).values(monthly_budget=monthly))
        return await self.show(user_id)

    @once_more
    async def hold_back(self, user_id: uuid.UUID, record_id: int, cost: Decimal) -> bool:
        """Hold back what a paid call under way will cost, now that this is more than before. Raises BudgetExceeded.

        False for a user without a budget, of whom nothing is held back.
        """
        call = Record.id == record_id

        def write(connection: Connection) -> bool:
            before = connection.scalar(select(Record.reserved).where(call)) or Decimal(0)
            has_budget = require_budget(connection, user_id, cost - before, self._zone)
            if has_budget:
                connection.execute(update(Record).where(call).values(reserved=cost))
            return has_budget

        return await self._database.write(write)

    @once_more
    async def _add_up(self, user_id: uuid.UUID, now: datetime) -> "tuple[_Month, _Tally]":
        def write(connection: Connection) -> tuple[_Month, _Tally]:
            month = _look_up(connection, user_id, now, lock=True)
            tally = _tally(connection, month)
            _keep(connection, month, tally)
            return month, tally

        return await self._database.write(write)


def require_budget(connection: Connection, user_id: uuid.UUID, cost: Decimal, zone: tzinfo) -> bool:
    """Refuse a call that would exceed its user's budget, inside the transaction that opens its record.

    `cost` is what it will cost as far as that is known. Two calls at once cannot both take what is left for one: they
    queue on the user's row, where who settles a call does not wait. False without a budget. Raises BudgetExceeded.
    """
    month = _look_up(connection, user_id, datetime.now(zone), lock=True, has_budget=True)
    if month.budget is None:
        return False
    tally = _tally(connection, month)
    _keep(connection, month, tally)
    left = month.budget - tally.spent - tally.reserved
    if cost > left or left <= 0:
        raise BudgetExceeded(
            f"超出本月预算：预算 {_plain(month.budget)} 元，已用 {_plain(tally.spent)} 元，"
            f"进行中 {_plain(tally.reserved)} 元，本次预计 {_plain(cost)} 元。可在 PUT /api/user/budget 调整预算"
        )
    return True


@dataclass(frozen=True, slots=True)
class _Month:
    """A user's month: its budget, and what was billed before a moment, if that was added up already.

    Without a subtotal, that moment is before all bills of the month: no clock is so late that one could be older.
    """

    user_id: uuid.UUID
    began: datetime
    settled_before: datetime
    budget: Decimal | None
    billed_before: datetime
    subtotal: Decimal


@dataclass(frozen=True, slots=True)
class _Tally:
    """What was billed for the calls of a month, and what is held back for those under way.

    `settled` is what was billed before the month's `settled_before`, in so many bills that were not added up yet.
    """

    spent: Decimal
    reserved: Decimal
    settled: Decimal
    settled_bills: int


def _look_up(
    connection: Connection, user_id: uuid.UUID, now: datetime, *, lock: bool = False, has_budget: bool = False
) -> _Month:
    """The month of a user as it is known, in one statement. A lock is held to the end of the transaction.

    Of users without a budget, nothing is looked up or locked where only a month that `has_budget` is of interest.
    """
    began = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0).astimezone(UTC)
    of_month = and_(Subtotal.user_id == User.id, Subtotal.month_began == began)
    wanted = select(User.monthly_budget, Subtotal.billed_before, Subtotal.amount).outerjoin(Subtotal, of_month)
    wanted = wanted.where(User.id == user_id)
    if has_budget:
        wanted = wanted.where(User.monthly_budget.is_not(None))
    if lock:
        wanted = wanted.with_for_update(key_share=True, of=User)
    found = connection.execute(wanted).one_or_none()
    budget, billed_before, subtotal = found or (None, None, None)
    billed_before = billed_before or began - SETTLED_AFTER
    settled_before = max(billed_before, now.astimezone(UTC) - SETTLED_AFTER)
    return _Month(user_id, began, settled_before, budget, billed_before, subtotal or Decimal(0))


def _tally(connection: Connection, month: _Month) -> _Tally:
    """Add up a month.

    It is one statement: a call that ended between two of them could be in neither. Bills are found by when they were
    written, which is after their call began; of the calls under way an index holds no others.
    """
    so_far = type_coerce(LongText.characters * Record.unit_price, Money())
    held_back = case((so_far > Record.reserved, so_far), else_=Record.reserved)
    under_way = (
        select(func.sum(held_back))
        .outerjoin(LongText, LongText.record_id == Record.id)
        .where(Record.user_id == month.user_id, Record.created_at >= month.began)
        .where(Record.status == literal_column("'running'"))  # as the index has it
    )
    is_settled = Bill.created_at < month.settled_before
    billed = (
        select(
            func.sum(Bill.amount),
            func.sum(case((is_settled, Bill.amount))),
            func.count(case((is_settled, Bill.id))),
            under_way.scalar_subquery(),
        )
        .join(Record, Record.id == Bill.record_id)
        .where(Bill.user_id == month.user_id, Bill.created_at >= month.billed_before, Record.created_at >= month.began)
    )
    spent, settled, settled_bills, reserved = connection.execute(billed).one()
    nothing = Decimal(0)
    return _Tally(
        month.subtotal + (spent or nothing), reserved or nothing, month.subtotal + (settled or nothing), settled_bills
    )


def _keep(connection: Connection, month: _Month, tally: _Tally) -> None:
    """Keep what is settled, if it was much to add up. The user's row is locked."""
    if tally.settled_bills >= ADDED_UP_AT_ONCE:
        kept = {"month_began": month.began, "billed_before": month.settled_before, "amount": tally.settled}
        mine = update(Subtotal).where(Subtotal.user_id == month.user_id)
        if not connection.execute(mine.values(kept)).rowcount:
            connection.execute(insert(Subtotal).values(user_id=month.user_id, **kept))


def _plain(amount: Decimal) -> str:
    return f"{amount.normalize():f}"
