"""How a record's life is written down: it is opened, what is at stake is noted, it is ended and billed.

Every paid call writes these, so they are built once; what differs is told as their parameters.
"""

import uuid
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import bindparam, case, func, insert, null, update

from app.columns import Money, UtcDateTime
from app.errors import AppError
from app.models import PROVIDER_ID_CHARS, Bill, Record
from app.services.calls import OpenRecord, Status

BILLING = insert(Bill)
OPENING = insert(Record).returning(Record.id)
FORGETTING = (
    update(Record)
    .where(
        Record.user_id == bindparam("of_user"),
        Record.idempotency_key == bindparam("named"),
        Record.created_at <= bindparam("until"),
    )
    .values(idempotency_key=None)
)
"""Lets a name go that was given long ago."""
_COST = bindparam("cost", type_=Money())
# Whoever is about to end a record because we seemed to be dead finds by its lease that we are not.
_LEASE = case((Record.lease_expires_at.is_(None), null()), else_=bindparam("leased_until", type_=UtcDateTime()))
_OF_RECORD = update(Record).where(Record.id == bindparam("of_record"))
NOTING = (
    _OF_RECORD.where(Record.status == "running")
    .values(
        sent_at=func.coalesce(Record.sent_at, bindparam("noted_at", type_=UtcDateTime())),
        lease_expires_at=_LEASE,
        reserved=case((Record.reserved > _COST, Record.reserved), else_=_COST),
    )
    .returning(Record.id)
)
"""Tells of a running record what `noting_of` says; finds none that has its end."""
_TOLD = (Record.user_id, Record.model_name, Record.type)
ENDING = _OF_RECORD.where(Record.status == "running").returning(*_TOLD)
"""Gives a running record its end, which `ending_of` tells."""
CORRECTION = _OF_RECORD.where(Record.status.in_(("running", "failed", "interrupted"))).returning(*_TOLD)
"""The same, also for a record that had been given a failure for an end."""


def noting_of(record: OpenRecord, quantity: int, asked: str | None, until: datetime) -> dict[str, Any]:
    """What is at stake from now on: what the work will count, and what is `asked` if that has grown."""
    return {
        "of_record": record.id,
        "noted_at": datetime.now(UTC),
        "leased_until": until,
        "cost": quantity * record.price.per_unit,
        "expected_quantity": quantity,
        "planned_key": record.planned_key,
        **({} if asked is None else {"input_data": asked}),
    }


def ending_of(record: OpenRecord, status: Status, failure: AppError | None, now: datetime) -> dict[str, Any]:
    """What is written down at the end of a call."""
    return {
        "of_record": record.id,
        "status": status,
        **({} if record.input_data is None else {"input_data": record.input_data}),
        "output_key": record.output_key,
        "output_text": record.output_text,
        "output_data": record.output_data,
        "duration_ms": record.duration_ms,
        "error": failure.code if failure else None,
        "error_message": failure.message if failure else None,
        "finished_at": now,
        "lease_expires_at": None,
    }


def bill_of(record: OpenRecord, user_id: uuid.UUID, model: str, now: datetime) -> dict[str, Any]:
    """The `Bill` that says what a record cost."""
    return {
        "record_id": record.id,
        "user_id": user_id,
        "model": model,
        "unit": record.price.unit,
        "quantity": record.quantity,
        "unit_price": record.price.per_unit,
        "amount": record.amount,
        "currency": record.price.currency,
        "estimated": record.estimated,
        "provider_request_id": (record.provider_request_id or "")[:PROVIDER_ID_CHARS] or None,
        "created_at": now,
    }
