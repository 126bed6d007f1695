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
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import groupby
from typing import Any

import structlog
from sqlalchemy import ColumnElement, Connection, Executable, Row, exists, func, insert, literal, select, update
from sqlalchemy.exc import IntegrityError

from app.columns import UtcDateTime
from app.completion import end_by_cancelling, run_to_end
from app.database import UNAVAILABLE, Database, once_more, outlast
from app.errors import AskedBefore, NotReady, StorageError
from app.models import Bill, Record, Table, Watched
from app.services.accounts import require_active
from app.services.budgets import require_budget
from app.services.calls import IdempotencyKey, OpenRecord, Price, RecordType, Status, as_told, new_record, standing
from app.services.endings import count_ending, explain_orphan, freed_name, tell_if_uncounted
from app.services.ledger import BILLING, CORRECTION, ENDING, FORGETTING, NOTING, OPENING, bill_of, ending_of, noting_of
from app.timing import note

log = structlog.get_logger(__name__)

LEASE = timedelta(seconds=20)
HEARTBEAT_SECONDS = 4.0
# A provider that is ready sooner saves its record a transaction; one that is not is asked without a record till then.
OPENED_AFTER_SECONDS = 0.01
ORPHANS_AT_ONCE = 1000
LOOKS_AT_ONCE = 8
# How long a store that is away is waited for, to find what a dead process had kept already.
RECOVERY_PATIENCE = timedelta(seconds=20)
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
        self._sweep_from = datetime.now(UTC)

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
        *,
        is_awaited: bool = True,
    ) -> AsyncIterator[OpenRecord]:
        """Open a record, and settle it when the block ends: as succeeded only when nothing was raised.

        `quantity` is what the call will count, as far as that is known, and `name` what its client calls it. A record
        that was handed over stays open. If it is not awaited, the block begins before it is opened, together with what
        `foresee` says if that comes soon. Raises BudgetExceeded, or AskedBefore for a name that stands.
        """
        record = OpenRecord(0, price)

        if is_awaited:
            record.id = await self._open(user_id, kind, model, input_data, price, quantity, name)
        else:
            opened = new_record(user_id, kind, model, input_data, price, quantity, name)
            record.opening = asyncio.create_task(self._open_in_time(record, opened))
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
            tell_if_uncounted(record, error)
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
        return await self._add(new_record(user_id, kind, model, input_data, price, quantity, name), rows)

    @once_more
    async def hand_over(self, record: OpenRecord, row: Watched, *, is_sent: bool = False) -> None:
        """Leave a record open for whoever looks after the row from now on, this process or another.

        `is_sent` notes that the provider may take work on from now on. Doing it twice is harmless.
        """
        sent = {"sent_at": func.coalesce(Record.sent_at, literal(datetime.now(UTC), UtcDateTime()))} if is_sent else {}
        is_open = Record.status.in_(("running", "interrupted")) & ~exists().where(Bill.record_id == Record.id)
        release = update(Record).where(Record.id == record.id, is_open)
        async with self._database.transaction() as session:
            released = await session.execute(release.values(**REOPENED, **sent).returning(Record.id))
            if released.first() or (
                await session.scalar(standing(record.id)) and not await session.get(type(row), record.id)
            ):
                await session.merge(row)
        record.handed_over = True
        self._live.discard(record.id)

    async def foresee(self, record: OpenRecord, quantity: int, asked: str | None = None) -> None:
        """Note what the work will count in all, right before it is handed over, and what is `asked` if that has grown.

        It is billed as an estimate should this process die; before it is noted, a death costs nothing. Raises NotReady
        when the record has been given its end meanwhile, because this process slept: nothing may be bought for it.
        Raises as well whatever kept the record from being opened.
        """
        if await record.open_with(quantity):
            return
        if not await self.note(record, quantity, asked):
            log.warning("record_ended_by_others", record_id=record.id)
            raise NotReady("服务刚才停顿过久，本次请求未提交，请重试")

    @once_more
    async def note(self, record: OpenRecord, quantity: int, asked: str | None = None) -> bool:
        """Note what the work will count, like `foresee`, of work that goes on whatever it is. False if it has ended."""
        noted = noting_of(record, quantity, asked, until=datetime.now(UTC) + LEASE)
        is_running = await self._database.change(NOTING, noted)
        record.is_sent = record.is_sent or is_running
        return is_running

    async def keep_leases(self) -> None:
        """Until cancelled: renew the leases of this process' records, and end those that nobody works on any more."""
        sweeping = asyncio.create_task(self._keep_sweeping())
        try:
            while True:
                try:
                    await self._renew_leases()
                except Exception as error:
                    # Whatever it was, the next round must come: without it this process' live records would be swept by
                    # others. Those could perhaps not renew either, so give the living time for it before sweeping.
                    self._sweep_from = datetime.now(UTC) + LEASE
                    unexpected = not isinstance(error, UNAVAILABLE)
                    log.warning("leases_not_renewed", error=type(error).__name__, exc_info=unexpected)
                await asyncio.sleep(HEARTBEAT_SECONDS)
        finally:
            await end_by_cancelling(sweeping)

    async def _keep_sweeping(self) -> None:
        while True:
            try:
                if datetime.now(UTC) >= self._sweep_from:
                    await self.settle_orphans()
            except Exception as error:
                self._sweep_from = datetime.now(UTC) + LEASE
                unexpected = not isinstance(error, UNAVAILABLE)
                log.warning("orphans_not_settled", error=type(error).__name__, exc_info=unexpected)
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def settle_orphans(self) -> int:
        """End the records whose process died: `interrupted`, billed by estimate. Gives their number."""
        expired = Record.lease_expires_at < datetime.now(UTC)
        found = select(Record.id).where(Record.status == "running", expired).limit(ORPHANS_AT_ONCE)
        async with self._database.snapshot() as session:
            orphans = list(await session.scalars(found))
        random.shuffle(orphans)  # other processes sweep too: each begins elsewhere
        looks = asyncio.Semaphore(LOOKS_AT_ONCE)

        async def settle(record_id: int) -> None:
            async with looks:
                await self._settle_orphan(record_id, expired)

        ends = await asyncio.gather(*(settle(each) for each in orphans), return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException):
                raise end
        return len(orphans)

    async def _settle_orphan(self, record_id: int, expired: ColumnElement[bool]) -> None:
        still_orphaned = select(Record).where(Record.id == record_id, Record.status == "running", expired)
        async with self._database.snapshot() as session:
            orphan = await session.scalar(still_orphaned)
        if orphan is None:
            return
        price = Price(orphan.unit, orphan.unit_price, orphan.currency)
        record = OpenRecord(orphan.id, price, quantity=orphan.expected_quantity, estimated=True)
        if await self._recover(orphan, record):
            cause = NotReady(explain_orphan(orphan))
            await self.end(record, "interrupted", cause, provided=expired)  # an owner who lives after all keeps it

    @once_more
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
        ending = (CORRECTION if corrects else ENDING).where(*([] if provided is None else [provided]))
        if freed := freed_name(record, status, failure):
            ending = ending.values(freed)
        ended = ending_of(record, status, known, now)

        def write(connection: Connection) -> tuple[bool, Row[uuid.UUID, str, str] | None]:
            if first is not None and connection.execute(first).first() is None:
                return False, None
            settled = connection.execute(ending, ended).one_or_none()
            if settled and record.quantity:
                # Dated within the transaction: by the time that its month is added up, it is there or never will be.
                connection.execute(BILLING, bill_of(record, settled.user_id, settled.model_name, datetime.now(UTC)))
            if settled or first is not None:
                for statement in along:
                    connection.execute(statement)
            return True, settled

        is_found, settled = await self._database.write(write)
        if not is_found:
            return False
        if settled:
            count_ending(record, settled.type, settled.model_name, status)
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
        return await self._add_live(new_record(user_id, kind, model, input_data, price, quantity, name))

    async def _open_in_time(self, opened: OpenRecord, record: dict[str, Any]) -> None:
        """Open a record when its work is about to be handed over, or soon; at once where an answer can be lost.

        Then what is at stake must be noted in a record that is known to be there.
        """
        is_sent = False
        if self._database.tells_every_outcome:
            timer = asyncio.get_running_loop().call_later(OPENED_AFTER_SECONDS, opened.is_due.set)
            await opened.is_due.wait()
            timer.cancel()
            is_sent = opened.expected_quantity > 0
        if is_sent:
            told = {"expected_quantity": opened.expected_quantity, "planned_key": opened.planned_key}
            record |= {**told, "sent_at": datetime.now(UTC)}
        opened.id, opened.is_sent = await self._add_live(record), is_sent

    async def _add_live(self, record: dict[str, Any]) -> int:
        record_id = await self._add(record, is_ours=True)
        self._live.add(record_id)
        return record_id

    @once_more
    async def _add(
        self, record: dict[str, Any], rows: Callable[[int], Sequence[Table]] | None = None, *, is_ours: bool = False
    ) -> int:
        """Write a new record down, if its user's budget allows it and its name is free. Gives its id.

        The lease of one that is ours begins when it is written: who waited long for the database is not dead.
        """
        user_id, name = record["user_id"], record["idempotency_key"]

        def write(connection: Connection) -> int:
            budget = require_active(connection, user_id)
            if record["unit_price"] and budget is not None:
                require_budget(connection, user_id, record["reserved"], self._zone)
            if name is not None:
                until = record["created_at"] - NAMES_REMEMBERED
                connection.execute(FORGETTING, {"of_user": user_id, "named": name, "until": until})
            leased = {"lease_expires_at": datetime.now(UTC) + LEASE} if is_ours else {}
            record_id: int = connection.execute(OPENING, {**record, **leased}).scalar_one()
            for kind, group in groupby(rows(record_id) if rows else (), type):
                connection.execute(insert(kind), [row.stated for row in group])
            return record_id

        try:
            record_id = await self._database.write(write)
        except IntegrityError:
            if name is None:
                raise
            raise AskedBefore from None
        note(record_id=record_id)
        return record_id

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
        """Write the end of a record of ours; a database that is busy or away for a moment is waited for.

        Raises what kept the record from being opened, if that came first.
        """
        if record.opening is not None:
            record.is_due.set()
            await record.opening
        try:
            await outlast(lambda: self.end(record, status, failure), record_id=record.id)
        except Exception:
            # The lease runs out, and the next sweep settles the record by estimate; this line holds the true count.
            log.exception("record_unsettled", record_id=record.id, status=status, quantity=record.quantity)
            raise
        finally:
            self._live.discard(record.id)

    @once_more
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
        async with self._database.pulse() as session:
            await session.execute(renewal)
