"""Records and bills: what was asked, how it ended, what it cost.

A record is opened before the provider is asked and reaches exactly one end:

    running ──► succeeded     the whole work was done and kept
            ├─► failed        the provider, the store or we failed; what was counted is billed
            ├─► cancelled     the user stopped it; what was spoken is kept and billed
            ├─► abandoned     the client left; the provider was told to stop, what was spoken is billed
            └─► interrupted   our process stopped or died; after a death the bill is an estimate, and says so

Every transition is one conditional UPDATE from `running`, in one transaction with the bill line. Two ways lead back,
both before anything was billed: a process that was only thought to be dead hands over the task that it got meanwhile,
and a voice that had been given up for lost turns up.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import structlog
from sqlalchemy import ColumnElement, Executable, exists, func, select, true, update
from sqlalchemy.orm import defer, undefer

from app.completion import run_to_end
from app.database import UNAVAILABLE, Database
from app.errors import AppError, NotReady, RecordNotFound
from app.models import PROVIDER_ID_CHARS, Bill, Enrollment, LongText, Record, Table, Transcription, Watched
from app.services.calls import OpenRecord, Price, RecordType, Status

log = structlog.get_logger(__name__)

LEASE = timedelta(seconds=30)
HEARTBEAT_SECONDS = 10.0
SETTLE_RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0)
_REOPENED = {"status": "running", "lease_expires_at": None, "finished_at": None, "error": None, "error_message": None}


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """A record with its bill line and what it belongs to; transcripts are loaded only where one record is asked for."""

    record: Record
    bill: Bill | None
    enrollment: Enrollment | None
    task: Transcription | None = None
    long_text: LongText | None = None

    @property
    def amount(self) -> Decimal:
        """What the call cost so far."""
        if self.bill is None and self.long_text is not None:
            return self.long_text.characters * self.record.unit_price
        return self.bill.amount if self.bill else Decimal(0)


@dataclass(frozen=True, slots=True)
class HistoryPage:
    """One page of a user's records, newest first, and how many there are in all."""

    items: list[RecordedCall]
    total: int


class RecordService:
    """Opens, settles and lists records; keeps the leases of those that this process works on."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._live: set[int] = set()

    @asynccontextmanager
    async def running(
        self,
        user_id: uuid.UUID,
        kind: RecordType,
        model: str,
        input_data: str,
        price: Price,
    ) -> AsyncIterator[OpenRecord]:
        """Open a record, and settle it when the block ends: as succeeded only when nothing was raised.

        A record that was handed over meanwhile stays open.
        """
        record = OpenRecord(await self._open(user_id, kind, model, input_data, price), price)
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
    ) -> int:
        """Open a record for whoever works on its job, together with the job's rows. Gives the record's id."""
        record = _new_record(user_id, kind, model, input_data, price)
        async with self._database.transaction() as session:
            session.add(record)
            await session.flush()
            session.add_all(rows(record.id))
        return record.id

    async def hand_over(self, record: OpenRecord, row: Watched) -> None:
        """Leave a record open for whoever looks after the row from now on, this process or another.

        Doing it twice is harmless.
        """
        is_open = Record.status.in_(("running", "interrupted")) & ~exists().where(Bill.record_id == Record.id)
        release = update(Record).where(Record.id == record.id, is_open)
        async with self._database.transaction() as session:
            released = await session.execute(release.values(**_REOPENED).returning(Record.id))
            if released.first() or not await session.get(type(row), record.id):
                await session.merge(row)
        record.handed_over = True
        self._live.discard(record.id)

    async def foresee(self, record: OpenRecord, quantity: int) -> None:
        """Note what the work will count in all, right before it is handed over.

        It is billed as an estimate should this process die; before it is noted, a death costs nothing.
        """
        note = update(Record).where(Record.id == record.id, Record.status == "running")
        async with self._database.transaction() as session:
            await session.execute(note.values(expected_quantity=quantity, **_asked(record)))

    async def history(
        self, user_id: uuid.UUID, page: int, page_size: int, kind: RecordType | None = None
    ) -> HistoryPage:
        """A user's records, newest first; pages count from 1."""
        wanted = [Record.user_id == user_id, *([Record.type == kind] if kind else [])]
        rows = (
            select(Record, Bill, Enrollment)
            .outerjoin(Bill, Bill.record_id == Record.id)
            .outerjoin(Enrollment, Enrollment.record_id == Record.id)
            .where(*wanted)
            .order_by(Record.id.desc())
            .offset((page - 1) * page_size)
            .limit(page_size)
        )
        async with self._database.snapshot() as session:
            total = await session.scalar(select(func.count()).select_from(Record).where(*wanted))
            items = [RecordedCall(*row) for row in await session.execute(rows)]
        return HistoryPage(items, total or 0)

    async def find(self, user_id: uuid.UUID, record_id: int, *, whole: bool = True) -> RecordedCall:
        """One record of a user, with its transcripts and its input if the whole is wanted. Raises RecordNotFound."""
        large = (Transcription.transcripts, Transcription.transcripts_with_words)
        options = [undefer(column) for column in large] if whole else [defer(Record.input_data, raiseload=True)]
        wanted = (
            select(Record, Bill, Enrollment, Transcription, LongText)
            .outerjoin(Bill, Bill.record_id == Record.id)
            .outerjoin(Enrollment, Enrollment.record_id == Record.id)
            .outerjoin(Transcription, Transcription.record_id == Record.id)
            .outerjoin(LongText, LongText.record_id == Record.id)
            .where(Record.id == record_id, Record.user_id == user_id)
            .options(*options)
        )
        async with self._database.snapshot() as session:
            found = (await session.execute(wanted)).one_or_none()
        if found is None:
            raise RecordNotFound
        return RecordedCall(*found)

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
        known = failure if isinstance(failure, AppError) else AppError() if failure else None
        ending = (
            update(Record)
            .where(
                Record.id == record.id,
                Record.status.in_(("running", "failed", "interrupted") if corrects else ("running",)),
                true() if provided is None else provided,
            )
            .values(
                status=status,
                **_asked(record),
                output_key=record.output_key,
                output_text=record.output_text,
                output_data=record.output_data,
                duration_ms=record.duration_ms,
                error=known.code if known else None,
                error_message=known.message if known else None,
                finished_at=now,
                lease_expires_at=None,
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
    ) -> int:
        record = _new_record(user_id, kind, model, input_data, price)
        record.lease_expires_at = record.created_at + LEASE
        async with self._database.transaction() as session:
            session.add(record)
        self._live.add(record.id)
        return record.id

    async def _settle(self, record: OpenRecord, status: Status, failure: BaseException | None) -> None:
        """Write the end of a record of ours; a database that is busy or away for a moment is waited for."""
        try:
            for delay_seconds in SETTLE_RETRY_SECONDS:
                try:
                    await self.end(record, status, failure)
                except UNAVAILABLE as error:
                    log.warning("settlement_delayed", record_id=record.id, error=type(error).__name__)
                    await asyncio.sleep(delay_seconds)
                else:
                    return
            await self.end(record, status, failure)
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


def _asked(record: OpenRecord) -> dict[str, str]:
    return {} if record.input_data is None else {"input_data": record.input_data}


def _new_record(user_id: uuid.UUID, kind: RecordType, model: str, input_data: str, price: Price) -> Record:
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
        created_at=datetime.now(UTC),
    )


def _explain_orphan(orphan: Record) -> str:
    if orphan.expected_quantity:
        return "服务中断，结果未能取回，费用按估算"
    if orphan.type == "asr":
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
