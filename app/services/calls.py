"""A paid call while it is under way: what it may become, and what is known of it so far."""

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Literal

from sqlalchemy import Select, select

from app.database import is_outage
from app.errors import AppError, NotReady
from app.jobs import Claimed
from app.models import Record

RecordType = Literal["tts", "asr", "voice"]
Status = Literal["running", "succeeded", "failed", "cancelled", "abandoned", "interrupted"]
CutOff = Literal["cancelled", "abandoned", "interrupted"]

OUTAGE_SECONDS = 5  # after which a client may ask again


@dataclass(frozen=True, slots=True)
class Price:
    """The price per unit that a call is opened with, and billed with whatever happens to the price list."""

    unit: str
    per_unit: Decimal
    currency: str


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """A client's own name for a request, so that asking again is not ordering again. `digest` is of what he asks."""

    key: str
    digest: str


@dataclass(slots=True)
class OpenRecord:
    """A record under way. Whoever does the work writes here what is known so far; it is settled from this."""

    id: int
    price: Price
    quantity: int = 0
    provider_request_id: str | None = None
    input_data: str | None = None
    """What was asked, where that was not known from the beginning."""
    planned_key: str | None = None
    """Where the audio is to be kept: known before there is any, so that no crash loses what was kept already."""
    output_key: str | None = None
    output_text: str | None = None
    output_data: str | None = None
    duration_ms: int | None = None
    estimated: bool = False
    handed_over: bool = False
    is_sent: bool = False
    """Whether the provider may have taken the work on."""
    cut_off: CutOff | None = None
    opening: "asyncio.Task[None] | None" = None
    """What writes the record down, beside the work; until it has, there is no id."""
    is_due: asyncio.Event = field(default_factory=asyncio.Event)
    """Says that it has to be written down now, with the `expected_quantity` if work is about to be handed over."""
    expected_quantity: int = 0

    async def open_with(self, quantity: int) -> bool:
        """Have it written down now, if it is not yet; says whether it tells of that quantity.

        Raises what kept it from being written down.
        """
        if self.opening is None:
            return False
        was_open = self.opening.done()
        if not was_open:
            self.expected_quantity = quantity
            self.is_due.set()
        await asyncio.shield(self.opening)
        return self.is_sent and not was_open

    def when_open(self, tell: Callable[[int], object]) -> None:
        """Have the id told as soon as there is one."""
        if self.opening is None:
            tell(self.id)
        else:
            self.opening.add_done_callback(lambda _: self.id and tell(self.id))

    def unless_open(self, stop: Callable[[], object]) -> None:
        """Have the work stopped should it turn out that it cannot be written down."""
        if self.opening is not None:
            self.opening.add_done_callback(lambda _: self.id or stop())

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


def standing(record_id: int) -> Select[int]:
    """What finds a record that has not vanished with its user, and keeps it from that until the transaction ends."""
    return select(Record.id).where(Record.id == record_id).with_for_update(read=True, key_share=True)


def as_told(failure: BaseException) -> AppError:
    """What a client is told of a failure, whatever it was."""
    if isinstance(failure, AppError):
        return failure
    if isinstance(failure, Exception) and is_outage(failure):
        return NotReady("数据库暂时不可用，请稍后重试", retry_after_seconds=OUTAGE_SECONDS)
    return AppError()


def new_record(
    user_id: uuid.UUID,
    kind: RecordType,
    model: str,
    input_data: str,
    price: Price,
    quantity: int,
    name: IdempotencyKey | None,
) -> dict[str, Any]:
    """The columns of a call that is about to begin; `quantity` is what it will count, as far as that is known."""
    return {
        "user_id": user_id,
        "type": kind,
        "model_name": model,
        "status": "running",
        "input_data": input_data,
        "unit": price.unit,
        "unit_price": price.per_unit,
        "currency": price.currency,
        "expected_quantity": 0,
        "reserved": quantity * price.per_unit,
        "idempotency_key": name.key if name else None,
        "request_digest": name.digest if name else None,
        "created_at": datetime.now(UTC),
    }
