"""A paid call while it is under way: what it may become, and what is known of it so far."""

from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from app.jobs import Claimed

RecordType = Literal["tts", "asr", "voice"]
Status = Literal["running", "succeeded", "failed", "cancelled", "abandoned", "interrupted"]
CutOff = Literal["cancelled", "abandoned", "interrupted"]


@dataclass(frozen=True, slots=True)
class Price:
    """The price per unit that a call is opened with, and billed with whatever happens to the price list."""

    unit: str
    per_unit: Decimal
    currency: str


@dataclass(slots=True)
class OpenRecord:
    """A record under way. Whoever does the work writes here what is known so far; it is settled from this."""

    id: int
    price: Price
    quantity: int = 0
    provider_request_id: str | None = None
    input_data: str | None = None
    """What was asked, where that was not known from the beginning."""
    output_key: str | None = None
    output_text: str | None = None
    output_data: str | None = None
    duration_ms: int | None = None
    estimated: bool = False
    handed_over: bool = False
    cut_off: CutOff | None = None

    @property
    def amount(self) -> Decimal:
        """The exact cost of what was counted so far."""
        return self.quantity * self.price.per_unit


def reopened(claimed: Claimed[Any]) -> OpenRecord:
    """The record of a job, to be ended; what is known of its cost is billed."""
    record = claimed.record
    price = Price(record.unit, record.unit_price, record.currency)
    return OpenRecord(
        record.id, price, quantity=record.expected_quantity, provider_request_id=claimed.row.provider_name
    )
