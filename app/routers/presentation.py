"""Amounts and times as clients see them."""

from datetime import datetime
from decimal import ROUND_HALF_UP, Decimal
from zoneinfo import ZoneInfo

_FOUR_PLACES = Decimal("0.0001")


def show_amount(amount: Decimal) -> str:
    """An amount of money: half-up to 4 places, `0` when free."""
    return str(amount.quantize(_FOUR_PLACES, ROUND_HALF_UP)) if amount else "0"


def show_exactly(amount: Decimal) -> str:
    """An amount of money to its last digit."""
    return f"{amount.normalize():f}"


def show_time(moment: datetime, zone: ZoneInfo) -> str:
    """An instant: local wall time without zone, to the second."""
    return moment.astimezone(zone).replace(tzinfo=None).isoformat(timespec="seconds")


def show_task_time(moment: datetime, zone: ZoneInfo) -> str:
    """An instant as the task route shows it: `2025-01-01 10:00:00`."""
    return moment.astimezone(zone).strftime("%Y-%m-%d %H:%M:%S")
