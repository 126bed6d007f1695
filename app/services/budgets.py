"""What a user allows himself to spend in a month, which begins in the zone that clients are shown times in."""

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from decimal import Decimal

from sqlalchemy import Connection, Select, case, func, select, type_coerce, update

from app.columns import Money
from app.database import Database, once_more
from app.errors import BudgetExceeded
from app.models import Bill, LongText, Record, User


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
            monthly = await session.scalar(select(User.monthly_budget).where(User.id == user_id))
            spent, reserved = (await session.execute(_tally(user_id, now))).one()
        return Budget(f"{now:%Y-%m}", monthly, spent or Decimal(0), reserved or Decimal(0))

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


def require_budget(connection: Connection, user_id: uuid.UUID, cost: Decimal, zone: tzinfo) -> bool:
    """Refuse a call that would exceed its user's budget, inside the transaction that opens its record.

    `cost` is what it will cost as far as that is known. Two calls at once cannot both take what is left for one: they
    queue on the user's row, where who settles a call does not wait. False without a budget. Raises BudgetExceeded.
    """
    mine = select(User.monthly_budget).where(User.id == user_id)
    if connection.scalar(mine) is None:
        return False
    monthly = connection.scalar(mine.with_for_update(key_share=True))
    if monthly is None:
        return False
    found = connection.execute(_tally(user_id, datetime.now(zone))).one()
    spent, reserved = (amount or Decimal(0) for amount in found)
    left = monthly - spent - reserved
    if cost > left or left <= 0:
        raise BudgetExceeded(
            f"超出本月预算：预算 {_plain(monthly)} 元，已用 {_plain(spent)} 元，进行中 {_plain(reserved)} 元，"
            f"本次预计 {_plain(cost)} 元。可在 PUT /api/user/budget 调整预算"
        )
    return True


def _tally(user_id: uuid.UUID, now: datetime) -> Select[Decimal | None, Decimal | None]:
    """What was billed for the calls of this month, and what is held back for those under way.

    It is one statement: a call that ended between two of them could be in neither.
    """
    month_began = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0).astimezone(UTC)
    this_month = Record.user_id == user_id, Record.created_at >= month_began
    billed = select(func.sum(Bill.amount)).join(Record, Record.id == Bill.record_id).where(*this_month)
    so_far = type_coerce(LongText.characters * Record.unit_price, Money())
    held_back = case((so_far > Record.reserved, so_far), else_=Record.reserved)
    held = select(func.sum(held_back)).outerjoin(LongText, LongText.record_id == Record.id)
    under_way = held.where(*this_month, Record.status == "running")
    return select(billed.scalar_subquery(), under_way.scalar_subquery())


def _plain(amount: Decimal) -> str:
    return f"{amount.normalize():f}"
