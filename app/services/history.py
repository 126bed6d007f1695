"""What a user did, and what it cost: his records, newest first, and each in full."""

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from decimal import Decimal

from sqlalchemy import Select, Subquery, func, select
from sqlalchemy.orm import defer, undefer

from app.database import Database
from app.errors import AppError, NotReady, RateLimited, RecordNotFound, UpstreamError
from app.models import Bill, Enrollment, LongText, Record, Transcription
from app.services.milestones import Surveyor
from app.services.selection import NEWEST_FIRST, HistoryFilter, Place

LINES_AT_ONCE = 200
SHOWN_CHARS = 32_000  # what a cell of a spreadsheet takes, about
RETRY_AFTER_SECONDS = 5  # told again, whatever was told before


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

    @property
    def quantity(self) -> int:
        """What the provider counted so far."""
        if self.bill is None and self.long_text is not None:
            return self.long_text.characters
        return self.bill.quantity if self.bill else 0

    @property
    def is_estimated(self) -> bool:
        """Whether that is an estimate, at least in part."""
        if self.bill is None and self.long_text is not None:
            return self.long_text.guessed > 0
        return self.bill is not None and self.bill.estimated

    @property
    def failure(self) -> AppError:
        """What the record failed with, as the process that worked on it would have told it."""
        if self.record.status == "interrupted" and self.record.error in {None, AppError.code}:
            return NotReady("服务重启，请求已中止，已完成的部分见历史记录", retry_after_seconds=RETRY_AFTER_SECONDS)
        for kind in _every_error(AppError):
            if kind.code == self.record.error:
                seconds = RETRY_AFTER_SECONDS if issubclass(kind, RateLimited | NotReady) else None
                return kind(self.record.error_message, retry_after_seconds=seconds)
        return UpstreamError(self.record.error_message)


@dataclass(frozen=True, slots=True)
class HistoryLine:
    """A record for a spreadsheet: of what was asked and what was heard, no more than a cell takes."""

    call: RecordedCall
    asked: str
    heard: str | None
    voice_id: str | None


@dataclass(frozen=True, slots=True)
class HistoryPage:
    """One page of a user's records, newest first, and how many there are in all."""

    items: list[RecordedCall]
    total: int


class HistoryService:
    """Finds records. Nothing is changed here."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._surveyor = Surveyor()

    async def page(
        self, user_id: uuid.UUID, page: int, page_size: int, wanted: HistoryFilter | None = None
    ) -> HistoryPage:
        """The wanted records of a user, newest first; pages count from 1."""
        wanted = wanted or HistoryFilter()
        async with self._database.snapshot() as session:
            way = await self._surveyor.survey(session, user_id, wanted)
            begin = (page - 1) * page_size
            end = min(begin + page_size, way.total)
            if begin >= end:
                return HistoryPage([], way.total)
            # Which ones, an index says alone; only those are read.
            found = await session.execute(_calls_among(way.ids(begin, end).subquery()))
            items = [RecordedCall(record, bill, order, long_text=text) for record, bill, order, text in found]
        return HistoryPage(items, way.total)

    async def lines(self, user_id: uuid.UUID, wanted: HistoryFilter) -> AsyncIterator[list[HistoryLine]]:
        """All the wanted records of a user, newest first, some at a time. Nothing is open in between."""
        rows = (
            select(
                Record,
                Bill,
                LongText,
                func.substr(Record.input_data, 1, SHOWN_CHARS),
                func.substr(Record.output_text, 1, SHOWN_CHARS),
                Enrollment.voice_id,
            )
            .outerjoin(Bill, Bill.record_id == Record.id)
            .outerjoin(LongText, LongText.record_id == Record.id)
            .outerjoin(Enrollment, Enrollment.record_id == Record.id)
            .order_by(*NEWEST_FIRST)
            .limit(LINES_AT_ONCE)
            .options(*(defer(large, raiseload=True) for large in (Record.input_data, Record.output_text)))
            .options(defer(Record.output_data, raiseload=True))
        )
        last: Place | None = None
        while True:
            async with self._database.snapshot() as session:
                found = list(await session.execute(rows.where(*wanted.conditions(user_id, before=last))))
            if found:
                yield [
                    HistoryLine(RecordedCall(record, bill, None, long_text=text), asked, heard, voice_id)
                    for record, bill, text, asked, heard, voice_id in found
                ]
            if len(found) < LINES_AT_ONCE:
                return
            last = found[-1][0].created_at, found[-1][0].id

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


def _calls_among(ids: Subquery) -> Select[Record, Bill, Enrollment, LongText]:
    """The records with these ids and what belongs to them, the latest first.

    Those of a page are told by when they were made, and shown in the order in which they were written down.
    """
    return (
        select(Record, Bill, Enrollment, LongText)
        .join(ids, ids.c.id == Record.id)
        .outerjoin(Bill, Bill.record_id == Record.id)
        .outerjoin(Enrollment, Enrollment.record_id == Record.id)
        .outerjoin(LongText, LongText.record_id == Record.id)
        .order_by(Record.id.desc())
    )


def _every_error(kind: type[AppError]) -> list[type[AppError]]:
    return [kind, *(error for child in kind.__subclasses__() for error in _every_error(child))]
