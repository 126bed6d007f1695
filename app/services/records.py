"""Records and bills: what was asked, how it ended, what it cost.

A record is opened before the provider is asked and reaches exactly one end:

    running ──► succeeded     the whole work was done and kept
            ├─► failed        the provider, the store or we failed; what was counted is billed
            ├─► cancelled     the user stopped it; what was spoken is kept and billed
            ├─► abandoned     the client left; the provider was told to stop, what was spoken is billed
            └─► interrupted   our process stopped or died; after a death the bill is an estimate, and says so

Every transition is one conditional UPDATE from `running`, in one transaction with the bill line. Two ways lead back,
both before anything was billed: a process that was only thought to be dead hands over the task that it got meanwhile,
and a voice or a task that had been given up for lost turns up.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, tzinfo
from decimal import Decimal
from typing import Any

import structlog
from sqlalchemy import ColumnElement, Executable, case, exists, func, literal, null, select, true, update
from sqlalchemy.exc import IntegrityError

from app.columns import Money, UtcDateTime
from app.completion import run_to_end
from app.dashscope import may_have_worked
from app.database import UNAVAILABLE, Database, outlast
from app.errors import AppError, AskedBefore, HandshakeTimeout, NotReady, StorageError, UpstreamError
from app.models import PROVIDER_ID_CHARS, Bill, Record, Table, Watched
from app.services.budgets import require_budget
from app.services.calls import IdempotencyKey, OpenRecord, Price, RecordType, Status, as_told

log = structlog.get_logger(__name__)

LEASE = timedelta(seconds=30)
HEARTBEAT_SECONDS = 10.0
# How long a store that is away is waited for, to find what a dead process had kept already.
RECOVERY_PATIENCE = timedelta(seconds=20)
UNCOUNTED = "（没有收到用量，未计费；如百炼已处理，以百炼账单为准）"
NAMES_REMEMBERED = timedelta(hours=24)
REOPENED = {"status": "running", "lease_expires_at": None, "finished_at": None, "error": None, "error_message": None}


async def _nothing_kept(_: Record) -> int | None:
    return None


class RecordService:
    """Opens and settles records; keeps the leases of those that this process works on.

    `measure_kept` gives the milliseconds of the audio at a record's planned key, None where there is none. Months begin
    in `zone`.
    """

    def __init__(
        self,
        database: Database,
        zone: tzinfo = UTC,
        measure_kept: Callable[[Record], Awaitable[int | None]] = _nothing_kept,
    ) -> None:
        self._database = database
        self._zone = zone
        self._measure_kept = measure_kept
        self._live: set[int] = set()

    @asynccontextmanager
    async def running(
        self,
        user_id: uuid.UUID,
        kind: RecordType,
        model: str,
        input_data: str,
        price: Price,
        quantity: int = 0,
        name: IdempotencyKey | None = None,
    ) -> AsyncIterator[OpenRecord]:
        """Open a record, and settle it when the block ends: as succeeded only when nothing was raised.

        `quantity` is what the call will count, as far as that is known, and `name` what its client calls it. A record
        that was handed over meanwhile stays open. Raises BudgetExceeded, or AskedBefore for a name that stands.
        """
        record = OpenRecord(await self._open(user_id, kind, model, input_data, price, quantity, name), price)
        status: Status = "failed"
        failure: BaseException | None = None
        try:
            yield record
            status = record.cut_off or "succeeded"
        except asyncio.CancelledError as error:
            status, failure = "interrupted", error
            raise
        except BaseException as error:
            status, failure = record.cut_off or "failed", error
            _tell_if_uncounted(record, error)
            raise
        finally:
            if not record.handed_over:
                await run_to_end(self._settle(record, status, failure))

    async def open_job(
        self,
        user_id: uuid.UUID,
        kind: RecordType,
        model: str,
        input_data: str,
        price: Price,
        rows: Callable[[int], Sequence[Table]],
        quantity: int = 0,
        name: IdempotencyKey | None = None,
    ) -> int:
        """Open a record for whoever works on its job, together with the job's rows. Gives the record's id.

        Raises BudgetExceeded or AskedBefore.
        """
        record = _new_record(user_id, kind, model, input_data, price, quantity, name)
        await self._add(record, rows)
        return record.id

    async def hand_over(self, record: OpenRecord, row: Watched, *, is_sent: bool = False) -> None:
        """Leave a record open for whoever looks after the row from now on, this process or another.

        `is_sent` notes that the provider may take work on from now on. Doing it twice is harmless.
        """
        sent = {"sent_at": func.coalesce(Record.sent_at, literal(datetime.now(UTC), UtcDateTime()))} if is_sent else {}
        is_open = Record.status.in_(("running", "interrupted")) & ~exists().where(Bill.record_id == Record.id)
        release = update(Record).where(Record.id == record.id, is_open)
        async with self._database.transaction() as session:
            released = await session.execute(release.values(**REOPENED, **sent).returning(Record.id))
            if released.first() or not await session.get(type(row), record.id):
                await session.merge(row)
        record.handed_over = True
        self._live.discard(record.id)

    async def foresee(self, record: OpenRecord, quantity: int, asked: str | None = None) -> None:
        """Note what the work will count in all, right before it is handed over, and what is `asked` if that has grown.

        It is billed as an estimate should this process die; before it is noted, a death costs nothing.
        """
        now = literal(datetime.now(UTC), UtcDateTime())
        note = update(Record).where(Record.id == record.id, Record.status == "running")
        values: dict[str, Any] = {"expected_quantity": quantity, "sent_at": func.coalesce(Record.sent_at, now)}
        if asked is not None:
            values["input_data"] = asked
        if cost := quantity * record.price.per_unit:
            values["reserved"] = case((Record.reserved > cost, Record.reserved), else_=literal(cost, Money()))
        async with self._database.transaction() as session:
            await session.execute(note.values(planned_key=record.planned_key, **values))
        record.is_sent = True

    async def keep_leases(self) -> None:
        """Until cancelled: renew the leases of this process' records and end those that nobody works on any more."""
        sweep_from = datetime.now(UTC)
        while True:
            try:
                await self._renew_leases()
                if datetime.now(UTC) >= sweep_from:
                    await self.settle_orphans()
            except Exception as error:
                # Whatever it was, the next round must come: without it this process' live records would be swept by
                # others. Those could perhaps not renew either, so give the living time for it before sweeping.
                sweep_from = datetime.now(UTC) + LEASE
                unexpected = not isinstance(error, UNAVAILABLE)
                log.warning("lease_round_failed", error=type(error).__name__, exc_info=unexpected)
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def settle_orphans(self) -> int:
        """End the records whose process died: `interrupted`, billed by estimate. Gives their number."""
        expired = Record.lease_expires_at < datetime.now(UTC)
        async with self._database.snapshot() as session:
            orphans = list(await session.scalars(select(Record).where(Record.status == "running", expired)))
        for orphan in orphans:
            price = Price(orphan.unit, orphan.unit_price, orphan.currency)
            record = OpenRecord(orphan.id, price, quantity=orphan.expected_quantity, estimated=True)
            if not await self._recover(orphan, record):
                continue
            cause = NotReady(_explain_orphan(orphan))
            await self.end(record, "interrupted", cause, provided=expired)  # an owner who lives after all keeps it
        return len(orphans)

    async def end(
        self,
        record: OpenRecord,
        status: Status,
        failure: BaseException | None,
        *,
        provided: ColumnElement[bool] | None = None,
        first: Executable | None = None,
        along: Sequence[Executable] = (),
        corrects: bool = False,
    ) -> bool:
        """Give a running record its end and its bill line, once, and do what is to be done `along` with it.

        Nothing is done where `first`, an update that tells what it found, finds nothing; else it counts whether or not
        the record has its end already. One that `corrects` also takes the place of a failure that was told for want of
        news. False for a record that already has an end, or is not as `provided`: it stays as it is.
        """
        now = datetime.now(UTC)
        known = as_told(failure) if failure else None
        ending = (
            update(Record)
            .where(
                Record.id == record.id,
                Record.status.in_(("running", "failed", "interrupted") if corrects else ("running",)),
                true() if provided is None else provided,
            )
            .values(
                status=status,
                **({} if record.input_data is None else {"input_data": record.input_data}),
                output_key=record.output_key,
                output_text=record.output_text,
                output_data=record.output_data,
                duration_ms=record.duration_ms,
                error=known.code if known else None,
                error_message=known.message if known else None,
                finished_at=now,
                lease_expires_at=None,
                **_freed_name(record, status, failure),
            )
            .returning(Record.user_id, Record.model_name)
        )
        async with self._database.transaction() as session:
            if first is not None and (await session.execute(first)).first() is None:
                return False
            settled = (await session.execute(ending)).one_or_none()
            if settled and record.quantity:
                session.add(_bill(record, settled.user_id, settled.model_name, now))
            if settled or first is not None:
                for statement in along:
                    await session.execute(statement)
        report = log.info if settled else log.warning
        report(
            "record_settled" if settled else "record_already_settled",
            record_id=record.id,
            status=status,
            quantity=record.quantity,
            estimated=record.estimated,
            error=known.code if known else None,
            provider_request_id=record.provider_request_id,
        )
        return settled is not None

    async def _open(
        self,
        user_id: uuid.UUID,
        kind: RecordType,
        model: str,
        input_data: str,
        price: Price,
        quantity: int = 0,
        name: IdempotencyKey | None = None,
    ) -> int:
        record = _new_record(user_id, kind, model, input_data, price, quantity, name)
        record.lease_expires_at = record.created_at + LEASE
        await self._add(record)
        self._live.add(record.id)
        return record.id

    async def _add(self, record: Record, rows: Callable[[int], Sequence[Table]] | None = None) -> None:
        """Write a new record down, if its user's budget allows it and its name is free."""
        outdated = update(Record).where(
            Record.user_id == record.user_id,
            Record.idempotency_key == record.idempotency_key,
            Record.created_at <= record.created_at - NAMES_REMEMBERED,
        )
        try:
            async with self._database.transaction() as session:
                if record.unit_price:
                    await require_budget(session, record.user_id, record.reserved or Decimal(0), self._zone)
                if record.idempotency_key is not None:
                    await session.execute(outdated.values(idempotency_key=None))
                session.add(record)
                if rows is not None:
                    await session.flush()
                    session.add_all(rows(record.id))
        except IntegrityError:
            if record.idempotency_key is None:
                raise
            raise AskedBefore from None

    async def _recover(self, orphan: Record, record: OpenRecord) -> bool:
        """Find the audio that a dead process had kept already. False while the store is away, for a while."""
        if orphan.planned_key is None:
            return True
        try:
            record.duration_ms = await self._measure_kept(orphan)
        except StorageError:
            expired = orphan.lease_expires_at or orphan.created_at
            return datetime.now(UTC) - expired > RECOVERY_PATIENCE
        except Exception:
            log.exception("kept_audio_unreadable", record_id=orphan.id)  # no reason to leave other records without end
        if record.duration_ms is not None:
            record.output_key = orphan.planned_key
        return True

    async def _settle(self, record: OpenRecord, status: Status, failure: BaseException | None) -> None:
        """Write the end of a record of ours; a database that is busy or away for a moment is waited for."""
        try:
            await outlast(lambda: self.end(record, status, failure), record_id=record.id)
        except Exception:
            # The lease runs out, and the next sweep settles the record by estimate; this line holds the true count.
            log.exception("record_unsettled", record_id=record.id, status=status, quantity=record.quantity)
            raise
        finally:
            self._live.discard(record.id)

    async def _renew_leases(self) -> None:
        if not self._live:
            return
        renewal = (
            update(Record)
            .where(
                Record.id.in_(self._live),
                Record.status == "running",
                Record.lease_expires_at.is_not(None),  # else one that is just being handed over would be swept later
            )
            .values(lease_expires_at=datetime.now(UTC) + LEASE)
        )
        async with self._database.transaction() as session:
            await session.execute(renewal)


def _new_record(
    user_id: uuid.UUID,
    kind: RecordType,
    model: str,
    input_data: str,
    price: Price,
    quantity: int,
    name: IdempotencyKey | None,
) -> Record:
    return Record(
        user_id=user_id,
        type=kind,
        model_name=model,
        status="running",
        input_data=input_data,
        unit=price.unit,
        unit_price=price.per_unit,
        currency=price.currency,
        expected_quantity=0,
        reserved=quantity * price.per_unit,
        idempotency_key=name.key if name else None,
        request_digest=name.digest if name else None,
        created_at=datetime.now(UTC),
    )


def _freed_name(record: OpenRecord, status: Status, failure: BaseException | None) -> dict[str, Any]:
    """A call that surely bought nothing lets go of its name: whoever asks again under it orders anew."""
    if status not in {"failed", "interrupted"} or record.quantity:
        return {}
    if _is_refusal(failure):
        return {"idempotency_key": None}
    return {"idempotency_key": case((Record.sent_at.is_(None), null()), else_=Record.idempotency_key)}


def _tell_if_uncounted(record: OpenRecord, failure: BaseException) -> None:
    """Let nobody take a missing count for a proof that nothing was counted."""
    if isinstance(failure, AppError) and may_have_worked(failure) and record.is_sent and not record.quantity:
        failure.message += UNCOUNTED if record.price.per_unit else ""


def _is_refusal(failure: BaseException | None) -> bool:
    """Whether the provider, or we before it, surely took no work on."""
    if not isinstance(failure, AppError) or may_have_worked(failure):
        return False
    if isinstance(failure, UpstreamError):
        return not failure.is_its_fault and not isinstance(failure, StorageError)
    return failure.status < 500 or isinstance(failure, HandshakeTimeout)


def _explain_orphan(orphan: Record) -> str:
    if orphan.expected_quantity:
        return "服务中断，结果未能取回，费用按估算"
    if orphan.sent_at:
        return "服务中断，请求可能已被百炼接受，实际费用以百炼账单为准"
    return "服务中断，未产生费用"


def _bill(record: OpenRecord, user_id: uuid.UUID, model: str, now: datetime) -> Bill:
    return Bill(
        record_id=record.id,
        user_id=user_id,
        model=model,
        unit=record.price.unit,
        quantity=record.quantity,
        unit_price=record.price.per_unit,
        amount=record.amount,
        currency=record.price.currency,
        estimated=record.estimated,
        provider_request_id=(record.provider_request_id or "")[:PROVIDER_ID_CHARS] or None,
        created_at=now,
    )
