"""Long audio to text: submit a task, tell how it is doing, give its transcripts."""

import asyncio
import json
import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import structlog
from anyio import CapacityLimiter
from sqlalchemy import select
from sqlalchemy.orm import InstrumentedAttribute

from app.catalog import PriceList
from app.completion import run_to_end
from app.computation import compute
from app.dashscope import Credential, Submission, TranscriptionClient, TranscriptionOrder
from app.database import UNAVAILABLE, Database
from app.errors import AppError, InvalidApiKey, InvalidRequest, NoApiKey, NoTranscript, SealBroken, TaskNotFound
from app.inflight import InFlight
from app.models import Bill, Record, Transcription
from app.services.accounts import AccountService
from app.services.calls import OpenRecord, Price
from app.services.collection import FIRST_CHECK_SECONDS, TaskCollector
from app.services.delivery import MAX_FILE_BYTES, AudioDelivery, AudioUrl
from app.services.recognizers import require_recognizer
from app.services.records import RecordService
from app.subtitling import SubtitleFormat, render_subtitle

log = structlog.get_logger(__name__)

# Who polls more often is answered from what is known; who polls less often makes us ask, but does not wait long.
FRESH = timedelta(seconds=2)
PATIENCE_SECONDS = 2.0
# Subtitles of hours take seconds and much memory to lay out: few at once, and not again for the next who asks.
SHORT_CHARS = 64 * 1024  # of JSON without words: ten minutes
RENDERED_AT_ONCE = 2
RENDERED_KEPT = 16
HAND_OVER_RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True, slots=True)
class Submitted:
    """A task that the provider has taken on, with the record that it belongs to."""

    record_id: int
    task_id: str
    status: str


@dataclass(frozen=True, slots=True)
class Task:
    """What is known of a task: the bill once the record has its end, JSON transcripts once it has succeeded.

    `trouble` is what the user has to mend before the provider can be asked.
    """

    transcription: Transcription
    record: Record
    bill: Bill | None
    transcripts: str | None = None
    trouble: AppError | None = None

    @property
    def amount(self) -> Decimal:
        """What the task cost so far."""
        return self.bill.amount if self.bill else Decimal(0)


class TranscriptionService:
    """Transcribes long audio in the background."""

    def __init__(
        self,
        prices: PriceList,
        database: Database,
        accounts: AccountService,
        records: RecordService,
        client: TranscriptionClient,
        delivery: AudioDelivery,
        collector: TaskCollector,
        in_flight: InFlight,
    ) -> None:
        self._prices = prices
        self._database = database
        self._accounts = accounts
        self._records = records
        self._client = client
        self._delivery = delivery
        self._collector = collector
        self._in_flight = in_flight
        self._rendering = CapacityLimiter(RENDERED_AT_ONCE)
        self._rendered: dict[tuple[int, SubtitleFormat, int | None], str] = {}

    async def submit(self, user_id: uuid.UUID, order: TranscriptionOrder, file_url: str) -> Submitted:
        """Hand a file over to the provider. Goes on to its end even if the caller does not wait for it.

        Raises the AppError that tells the client what went wrong.
        """
        return await asyncio.shield(self._in_flight.start(self._submit(user_id, order, file_url)))

    async def look(self, user_id: uuid.UUID, task_id: str) -> Task:
        """Tell how a user's task is doing: what is known if that is fresh, after asking the provider otherwise.

        Raises TaskNotFound.
        """
        task = await self._find(user_id, task_id)
        if _is_stale(task.transcription):
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    failure = await asyncio.shield(self._collector.check(task.record.id))
            except TimeoutError:
                return task
            task = await self._find(user_id, task_id)
            if isinstance(failure, NoApiKey | SealBroken | InvalidApiKey):
                task = replace(task, trouble=failure)
        if task.transcription.status != "SUCCEEDED":
            return task
        return replace(task, transcripts=await self._load(Transcription.transcripts, task))

    async def subtitle(self, user_id: uuid.UUID, task_id: str, format: SubtitleFormat, channel_id: int | None) -> str:
        """Lay the transcripts of a task out: a subtitle file, or a JSON list of cues.

        Raises TaskNotFound, NoTranscript until and unless the task succeeds, and InvalidRequest for a channel that was
        not transcribed.
        """
        task = await self.look(user_id, task_id)
        if task.transcripts is None:
            raise NoTranscript(task.record.error_message and f"任务失败，没有转写结果：{task.record.error_message}")
        if len(task.transcripts) < SHORT_CHARS:
            return await self._render(task, format, channel_id)
        wanted = (task.record.id, format, channel_id)
        async with self._rendering:
            if wanted not in self._rendered:
                self._rendered[wanted] = await self._render(task, format, channel_id)
            while len(self._rendered) > RENDERED_KEPT:
                del self._rendered[next(iter(self._rendered))]
            return self._rendered[wanted]

    async def _render(self, task: Task, format: SubtitleFormat, channel_id: int | None) -> str:
        transcripts = await self._load(Transcription.transcripts_with_words, task) or task.transcripts or "[]"
        return await compute(len(transcripts), render_subtitle, transcripts, format, channel_id)

    async def _submit(self, user_id: uuid.UUID, order: TranscriptionOrder, file_url: str) -> Submitted:
        model = require_recognizer(order.model, order.context, call_type="async")
        if order.language and model.languages and order.language not in model.languages:
            raise InvalidRequest(f"language 对 {order.model} 只能是：{'、'.join(model.languages)}")
        credential = await self._accounts.credential(user_id)
        price = Price("second", self._prices.per_second[order.model], self._prices.currency)
        audio = AudioUrl(file_url, "file_url")
        async with (
            self._delivery.admitted(user_id, audio, MAX_FILE_BYTES, None) as admitted,
            self._records.running(user_id, "asr", order.model, _describe(order, file_url), price) as record,
            self._delivery.addressed(credential, order.model, admitted) as address,
        ):
            submission = await self._client.submit(credential, order, address)
            await run_to_end(self._hand_over(user_id, credential, record, submission))
        self._collector.wake()
        return Submitted(record.id, submission.task_id, submission.status)

    async def _hand_over(
        self, user_id: uuid.UUID, credential: Credential, record: OpenRecord, submission: Submission
    ) -> None:
        """Write down what the provider has taken on; a database that is busy or away for a moment is waited for."""
        now = datetime.now(UTC)
        record.provider_request_id = submission.request_id
        for delay_seconds in (*HAND_OVER_RETRY_SECONDS, None):
            task = Transcription(
                record_id=record.id,
                user_id=user_id,
                task_id=submission.task_id,
                key_fingerprint=credential.fingerprint,
                status=submission.status,
                submitted_at=now,
                checked_at=now,
                next_check_at=now + timedelta(seconds=FIRST_CHECK_SECONDS),
            )
            try:
                await self._records.hand_over(record, task)
            except UNAVAILABLE as error:
                if delay_seconds is None:
                    # The task can still be found by this line.
                    log.exception("transcription_unrecorded", record_id=record.id, task_id=submission.task_id)
                    raise
                log.warning("hand_over_delayed", record_id=record.id, error=type(error).__name__)
                await asyncio.sleep(delay_seconds)
            else:
                return

    async def _load(self, column: InstrumentedAttribute[str | None], task: Task) -> str | None:
        wanted = select(column).where(Transcription.record_id == task.record.id)
        async with self._database.snapshot() as session:
            text: str | None = await session.scalar(wanted)
        return text

    async def _find(self, user_id: uuid.UUID, task_id: str) -> Task:
        if not (task_id.isascii() and task_id.isprintable()):  # PostgreSQL would not even look for some
            raise TaskNotFound
        wanted = (
            select(Transcription, Record, Bill)
            .join(Record, Record.id == Transcription.record_id)
            .outerjoin(Bill, Bill.record_id == Record.id)
            .where(Transcription.user_id == user_id, Transcription.task_id == task_id)
            .order_by(Record.id.desc())
            .limit(1)
        )
        async with self._database.snapshot() as session:
            found = (await session.execute(wanted)).one_or_none()
        if found is None:
            raise TaskNotFound
        return Task(*found)


def _is_stale(transcription: Transcription) -> bool:
    now = datetime.now(UTC)
    if transcription.next_check_at is None:
        return False
    if transcription.misses and transcription.next_check_at > now:
        return False  # who asks often must not use up the patience with a provider in trouble
    return transcription.checked_at is None or now - transcription.checked_at >= FRESH


def _describe(order: TranscriptionOrder, file_url: str) -> str:
    """What was asked, as the history shows it."""
    asked: dict[str, object] = {"file_url": file_url}
    if order.language:
        asked["language"] = order.language
    asked |= {"enable_itn": order.enable_itn, "channel_id": list(order.channel_ids)}
    if order.enable_words:
        asked["enable_words"] = True
    if order.context:
        asked["context"] = order.context
    return json.dumps(asked, ensure_ascii=False)
