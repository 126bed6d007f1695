"""Column types that both databases keep exactly: money, and moments in UTC."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import BigInteger, DateTime, Dialect, Numeric, TypeDecorator
from sqlalchemy.types import TypeEngine

MONEY_DECIMALS = 12
BUDGET_DECIMALS = 8


class Money(TypeDecorator[Decimal]):
    """An exact amount of money: NUMERIC on PostgreSQL, an integer of 10⁻¹² on SQLite, which has no decimals.

    With fewer `decimals`, that integer has room for larger amounts: with 12, up to nine million.
    """

    impl = Numeric
    cache_ok = True

    def __init__(self, decimals: int = MONEY_DECIMALS) -> None:
        super().__init__()
        self.decimals = decimals

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Choose the column type of the database at hand."""
        return dialect.type_descriptor(BigInteger() if dialect.name == "sqlite" else Numeric(28, MONEY_DECIMALS))

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> Any:
        """Refuse to lose digits on the way in. Raises ValueError for more decimals."""
        if value is None:
            return None
        scaled = value.scaleb(self.decimals)
        if scaled != scaled.to_integral_value():
            raise ValueError(f"{value} has more than {self.decimals} decimals")
        return int(scaled) if dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: Dialect) -> Decimal | None:
        """Give back the amount that was stored, digit for digit."""
        if value is None:
            return None
        return Decimal(value).scaleb(-self.decimals) if dialect.name == "sqlite" else Decimal(value)


class UtcDateTime(TypeDecorator[datetime]):
    """An aware instant in UTC, also on SQLite, which forgets the zone."""

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Ask for a column with zone wherever there is one."""
        return dialect.type_descriptor(DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Store UTC. Raises ValueError for a naive datetime."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a datetime without zone cannot be stored")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Give back an aware datetime in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
