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
from app.dashscope import Credential, Submission, TranscriptionClient, TranscriptionOrder, may_have_worked
from app.database import Database, outlast
from app.errors import (
    AppError,
    InvalidApiKey,
    InvalidRequest,
    NoApiKey,
    NoTranscript,
    NotReady,
    SealBroken,
    TaskNotFound,
)
from app.inflight import InFlight
from app.jobs import CLAIM, again_in
from app.models import Bill, Record, SubmittedFile, Transcription
from app.services.accounts import AccountService
from app.services.calls import IdempotencyKey, OpenRecord, Price, Status
from app.services.collection import FIRST_CHECK_SECONDS, TaskCollector
from app.services.delivery import MAX_FILE_BYTES, AudioDelivery, AudioUrl
from app.services.history import RecordedCall
from app.services.recognizers import require_recognizer
from app.services.records import RecordService
from app.services.seeking import LOST_SO_FAR, TaskSeeker
from app.services.submissions import ClaimedFile, OpenSubmissions
from app.subtitling import SubtitleFormat, render_subtitle

log = structlog.get_logger(__name__)

# Who polls more often is answered from what is known; who polls less often makes us ask, but does not wait long.
FRESH = timedelta(seconds=2)
PATIENCE_SECONDS = 2.0
# After a lost answer, the provider's list is looked at before each of these pauses and after the last; later in the
# background.
SEEK_PAUSES_SECONDS = (1.0, 2.0, 4.0)
SEEK_SECONDS = 15.0
LOST_FOR_NOW = (
    "百炼平台没有返回结果，但任务可能已被接受并计费。后台会继续查找，找到后历史记录中会出现转写结果与费用，请勿重复提交"
)
# Subtitles of hours take seconds and much memory to lay out: few at once, and not again for the next who asks.
SHORT_CHARS = 64 * 1024  # of JSON without words: ten minutes
RENDERED_AT_ONCE = 2
RENDERED_KEPT = 16


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
        submissions: OpenSubmissions,
        seeker: TaskSeeker,
    ) -> None:
        self._submissions = submissions
        self._seeker = seeker
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

    async def submit(
        self, user_id: uuid.UUID, order: TranscriptionOrder, file_url: str, name: IdempotencyKey | None = None
    ) -> Submitted:
        """Hand a file over to the provider. Goes on to its end even if the caller does not wait for it.

        Raises the AppError that tells the client what went wrong.
        """
        return await asyncio.shield(self._in_flight.start(self._submit(user_id, order, file_url, name)))

    def recall(self, call: RecordedCall) -> Submitted:
        """The answer to an earlier submission. Raises what it failed with."""
        if call.task is None:
            raise call.failure
        return Submitted(call.record.id, call.task.task_id, "PENDING")

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

    async def _submit(
        self, user_id: uuid.UUID, order: TranscriptionOrder, file_url: str, name: IdempotencyKey | None
    ) -> Submitted:
        model = require_recognizer(order.model, order.context, call_type="async")
        if order.language and model.languages and order.language not in model.languages:
            raise InvalidRequest(f"language 对 {order.model} 只能是：{'、'.join(model.languages)}")
        credential = await self._accounts.credential(user_id)
        price = Price("second", self._prices.per_second[order.model], self._prices.currency)
        audio = AudioUrl(file_url, "file_url")
        async with (
            self._delivery.admitted(user_id, audio, MAX_FILE_BYTES, None) as admitted,
            self._records.running(
                user_id, "asr", order.model, _describe(order, file_url), price, len(order.channel_ids), name
            ) as record,
            self._delivery.addressed(credential, order.model, admitted, fetched_later=True) as address,
        ):
            return await self._order(user_id, credential, order, address, record)

    async def _order(
        self, user_id: uuid.UUID, credential: Credential, order: TranscriptionOrder, address: str, record: OpenRecord
    ) -> Submitted:
        """Ask the provider, and bring the record to its end, or to those who look after its task or for it."""
        file = SubmittedFile(
            record_id=record.id,
            user_id=user_id,
            key_fingerprint=credential.fingerprint,
            file_url=address,
            next_check_at=datetime.now(UTC) + CLAIM,
        )
        claimed = await self._submissions.announce(record, file)
        async with self._submissions.kept(claimed):
            try:
                submission = await self._client.submit(credential, order, address)
            except AppError as error:
                return await self._clear_up(claimed, credential, error)
            except BaseException:
                await run_to_end(self._leave_to_seeker(claimed, "interrupted", NotReady(LOST_SO_FAR)))
                raise
            await run_to_end(self._settle(claimed, submission))
        return Submitted(record.id, submission.task_id, submission.status)

    async def _settle(self, claimed: ClaimedFile, submission: Submission) -> None:
        """Write down what the provider has taken on; a database that is busy or away for a moment is waited for."""
        now, file = datetime.now(UTC), claimed.row

        async def write() -> None:
            task = Transcription(
                record_id=file.record_id,
                user_id=file.user_id,
                task_id=submission.task_id,
                key_fingerprint=file.key_fingerprint,
                status=submission.status,
                submitted_at=now,
                checked_at=now,
                next_check_at=now + timedelta(seconds=FIRST_CHECK_SECONDS),
            )
            await self._submissions.settle(claimed, task)

        try:
            await outlast(write, record_id=file.record_id)
        except Exception:
            # The task is looked for from now on; it can also be found by this line.
            log.exception("transcription_unrecorded", record_id=file.record_id, task_id=submission.task_id)
            raise
        self._collector.wake()

    async def _clear_up(self, claimed: ClaimedFile, credential: Credential, failure: AppError) -> Submitted:
        """Find out what became of a submission that failed. Raises the failure if there is no task of it yet."""
        record_id = claimed.record.id
        if not may_have_worked(failure):
            await run_to_end(outlast(lambda: self._submissions.fail(claimed, "failed", failure), record_id=record_id))
            raise failure
        lost = type(failure)(LOST_FOR_NOW)
        try:
            await run_to_end(self._submissions.lose(claimed))
            for pause_seconds in (*SEEK_PAUSES_SECONDS, None):
                task_id = await self._seek(claimed, credential)
                if task_id is not None:
                    return Submitted(record_id, task_id, "PENDING")
                if pause_seconds is not None:
                    await asyncio.sleep(pause_seconds)
        except BaseException:
            await run_to_end(self._leave_to_seeker(claimed, "failed", lost))
            raise
        await run_to_end(self._leave_to_seeker(claimed, "failed", lost))
        raise lost from failure

    async def _seek(self, claimed: ClaimedFile, credential: Credential) -> str | None:
        try:
            return (await self._seeker.seek(claimed, credential, SEEK_SECONDS)).task_id
        except AppError as error:
            log.warning("lost_task_not_sought", record_id=claimed.record.id, error=type(error).__name__)
            return None

    async def _leave_to_seeker(self, claimed: ClaimedFile, status: Status, failure: AppError) -> None:
        """End the record for now, and leave the submission to those who look for its task."""
        await self._submissions.despair(claimed, status, failure)
        await self._submissions.put_back(claimed, again_in(0))
        self._seeker.wake()

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
            .where(Transcription.user_id == user_id, Transcription.task_id == task_id, Record.erased_at.is_(None))
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
