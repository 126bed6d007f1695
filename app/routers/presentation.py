"""Amounts and times as clients see them."""

from datetime import datetime
from decimal import ROUND_HALF_UP, Decimal
from zoneinfo import ZoneInfo

_FOUR_PLACES = Decimal("0.0001")


def show_amount(amount: Decimal) -> str:
    """An amount of money: half-up to 4 places, `0` when free."""
    return str(amount.quantize(_FOUR_PLACES, ROUND_HALF_UP)) if amount else "0"


def show_time(moment: datetime, zone: ZoneInfo) -> str:
    """An instant: local wall time without zone, to the second."""
    return moment.astimezone(zone).replace(tzinfo=None).isoformat(timespec="seconds")
