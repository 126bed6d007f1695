"""What a user's calls counted and cost, by day, model or type. Summed by the database, to the last digit."""

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any, Literal

from sqlalchemy import ColumnElement, Select, case, func, literal, select, type_coerce

from app.columns import Money
from app.database import Database
from app.models import Bill, LongText, Record
from app.services.period import Period

Grouping = Literal["day", "model", "type"]


@dataclass(frozen=True, slots=True)
class Consumption:
    """Some calls: how many, what the provider counted for them, what they cost, and how much of that is estimated."""

    calls: int = 0
    characters: int = 0
    seconds: int = 0
    amount: Decimal = Decimal(0)
    estimated_amount: Decimal = Decimal(0)

    def __add__(self, other: "Consumption") -> "Consumption":
        return Consumption(
            self.calls + other.calls,
            self.characters + other.characters,
            self.seconds + other.seconds,
            self.amount + other.amount,
            self.estimated_amount + other.estimated_amount,
        )


class UsageService:
    """Sums up records. Nothing is changed here."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def sum_up(self, user_id: uuid.UUID, period: Period, grouping: Grouping) -> dict[str, Consumption]:
        """The calls that a user began in a closed period, by day (`2026-11-01`), model or type.

        Days come in order, models and types by cost, the highest first. Long texts still running count with their cost
        so far. A group without calls is left out.
        """
        async with self._database.snapshot() as session:
            rows = list(await session.execute(_summing(user_id, period, grouping)))
        groups = {row[0]: _consumption(row[1:]) for row in rows}
        if grouping == "day":
            return dict(sorted(groups.items()))
        return dict(sorted(groups.items(), key=lambda group: (-group[1].amount, group[0])))


def total_of(groups: Iterable[Consumption]) -> Consumption:
    """All of them together."""
    return sum(groups, Consumption())


def _summing(user_id: uuid.UUID, period: Period, grouping: Grouping) -> Select[*tuple[Any, ...]]:
    """Records with what was billed; of those without a bill, what is known of a long text so far.

    A bill tells what its record does as well, and is read first: behind a record's text it would take much longer.
    """
    unit = func.coalesce(Bill.unit, Record.unit)
    quantity = func.coalesce(Bill.quantity, LongText.characters)
    amount = func.coalesce(Bill.amount, type_coerce(LongText.characters * Record.unit_price, Money()))
    is_estimate = func.coalesce(Bill.estimated, LongText.guessed > 0)
    sums = (
        func.count(Record.id),
        func.sum(case((unit == "character", quantity))),
        func.sum(case((unit == "second", quantity))),
        func.sum(amount),
        func.sum(case((is_estimate, amount))),
    )
    keys = {"model": func.coalesce(Bill.model, Record.model_name), "type": Record.type}
    key = _day_among(list(period.days())) if grouping == "day" else keys[grouping]
    return (
        select(key.label("key"), *sums)
        .outerjoin(Bill, Bill.record_id == Record.id)
        .outerjoin(LongText, LongText.record_id == Record.id)
        .where(Record.user_id == user_id, Record.created_at >= period.begins, Record.created_at < period.ends)
        .group_by("key")
    )


def _day_among(days: Sequence[tuple[date, datetime]]) -> ColumnElement[str]:
    """The day on which a record was made: a binary search, so that every database finds the records by their index."""
    if len(days) == 1:
        return literal(days[0][0].isoformat())
    middle = len(days) // 2
    is_before = Record.created_at < days[middle][1]
    return case((is_before, _day_among(days[:middle])), else_=_day_among(days[middle:]))


def _consumption(sums: Iterable[Any]) -> Consumption:
    calls, characters, seconds, amount, estimated = sums
    nothing = Decimal(0)
    return Consumption(calls, int(characters or 0), int(seconds or 0), amount or nothing, estimated or nothing)
