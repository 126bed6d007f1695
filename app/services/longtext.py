"""Long text to speech: check and split, open the record with its job, wait for it, follow it, stop it."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Literal

from app.catalog import PriceList, count_characters
from app.computation import compute
from app.dashscope import SpeechParameters
from app.database import outlast
from app.errors import Cancelled, InvalidRequest, NotCancellable, NotReady, RecordNotFound
from app.inflight import InFlight
from app.models import LongText, Segment
from app.services.admission import SpeechAdmission, describe
from app.services.archive import SpeechArchive
from app.services.calls import IdempotencyKey, Price
from app.services.history import HistoryService, RecordedCall
from app.services.narrator import Narrator
from app.services.records import RecordService
from app.settings import Settings
from app.splitting import is_silent, split_text
from app.ssml import split_ssml

# Another process may work on the text, whose bell is not heard here.
LOOK_SECONDS = 1.0
FOLLOWED_AT_MOST_EVERY_SECONDS = 0.2
CANCELLING_SECONDS = 15.0
# A process that is about to end lets a text go. How often nobody may be seen at it before that is believed.
IDLE_LOOKS = 1
# What remains for the answer of those who waited.
ANSWER_SECONDS = 2.0

SpeechSubtitle = Literal["srt", "vtt"]


@dataclass(frozen=True, slots=True)
class StartedText:
    """A long text that is on its way."""

    record_id: int
    segments: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a text will count and cost, and in how many segments."""

    characters: int
    segments: int
    amount: Decimal


class LongTextService:
    """What users do with long texts; the narrator does the work."""

    def __init__(
        self,
        settings: Settings,
        prices: PriceList,
        admission: SpeechAdmission,
        archive: SpeechArchive,
        records: RecordService,
        history: HistoryService,
        narrator: Narrator,
        in_flight: InFlight,
    ) -> None:
        self._settings = settings
        self._prices = prices
        self._admission = admission
        self._archive = archive
        self._records = records
        self._history = history
        self._narrator = narrator
        self._in_flight = in_flight

    async def start(
        self,
        user_id: uuid.UUID,
        parameters: SpeechParameters,
        text: str,
        subtitle: SpeechSubtitle | None,
        name: IdempotencyKey | None = None,
    ) -> StartedText:
        """Have a text spoken, whatever becomes of who asked. Raises the AppError of what is wrong with it."""
        max_chars = self._settings.long_text_max_chars
        parameters, _ = await self._admission.admit_text(user_id, parameters, text, max_chars)
        segments, characters = await self._plan(parameters, text)
        price = Price("character", self._prices.per_character(parameters.model), self._prices.currency)

        def rows(record_id: int) -> list[LongText | Segment]:
            key = self._archive.new_key(parameters.format)
            job = LongText(
                record_id=record_id,
                user_id=user_id,
                next_check_at=datetime.now(UTC),
                segments_total=len(segments),
                output_key=key,
                subtitle_key=subtitle and f"{key.rpartition('.')[0]}.{subtitle}",
            )
            return [job, *(Segment(record_id=record_id, number=n, text=each) for n, each in enumerate(segments))]

        asked = describe(parameters, text)
        model = parameters.model
        record_id = await self._records.open_job(user_id, "tts", model, asked, price, rows, characters, name)
        self._narrator.wake()
        return StartedText(record_id, len(segments))

    async def estimate(self, user_id: uuid.UUID, parameters: SpeechParameters, text: str) -> Estimate:
        """What a text will cost, if nothing has to be bought twice. Nobody is asked; the voice may be left empty.

        Raises the AppError of what is wrong with it.
        """
        max_chars = self._settings.long_text_max_chars
        parameters = await self._admission.assess_text(user_id, parameters, text, max_chars)
        segments, characters = await self._plan(parameters, text)
        return Estimate(characters, len(segments), characters * self._prices.per_character(parameters.model))

    async def _plan(self, parameters: SpeechParameters, text: str) -> tuple[list[str], int]:
        """The segments that a text is spoken in, and what they will count in all. Raises InvalidRequest."""
        at_once = self._settings.long_text_parallelism
        return await compute(len(text.encode()), _split, text, parameters.enable_ssml, at_once)

    def recall(self, call: RecordedCall) -> StartedText:
        """The text that an earlier request has started."""
        return StartedText(call.record.id, call.long_text.segments_total if call.long_text else 1)

    async def wait(self, user_id: uuid.UUID, record_id: int) -> RecordedCall:
        """Wait until a text is spoken. Raises what it failed with, Cancelled, or NotReady when this process ends.

        That is waited for as long as some process works on the text, and this one may take to end.
        """
        bell = self._narrator.bell(record_id)
        idle_looks = 0
        while (call := await self._look(user_id, record_id)).record.status == "running":
            if self._in_flight.hurried:
                idle_looks = 0 if _is_worked_on(call) else idle_looks + 1
                left_seconds = self._settings.drain_seconds - self._in_flight.hurried_for_seconds
                if idle_looks > IDLE_LOOKS or left_seconds < ANSWER_SECONDS:
                    raise NotReady(f"服务正在重启，合成会在后台继续，请稍后查询记录 {record_id}")
            await bell.wait(LOOK_SECONDS)
        if call.record.status == "cancelled":
            raise Cancelled
        if call.record.status != "succeeded":
            raise call.failure
        return call

    async def _look(self, user_id: uuid.UUID, record_id: int) -> RecordedCall:
        """The record, once the database tells it: the work goes on meanwhile."""
        return await outlast(lambda: self._history.find(user_id, record_id, whole=False), record_id=record_id)

    async def follow(self, user_id: uuid.UUID, record_id: int) -> AsyncIterator[RecordedCall]:
        """The record now, at every change, and at last at its end. Raises RecordNotFound.

        It stops early when this process ends.
        """
        bell = self._narrator.bell(record_id)
        shown: object = None
        while not self._in_flight.hurried:
            try:
                call = await self._history.find(user_id, record_id, whole=False)
            except RecordNotFound:
                if shown is None:
                    raise
                return  # it has vanished with its user
            state = (call.record.status, call.amount, call.long_text and call.long_text.segments_done)
            if state != shown:
                shown = state
                yield call
            if call.record.status != "running":
                return
            await bell.wait(LOOK_SECONDS)
            await asyncio.sleep(FOLLOWED_AT_MOST_EVERY_SECONDS)

    async def cancel(self, user_id: uuid.UUID, record_id: int) -> RecordedCall:
        """Stop a text, and give its record once it has its end; one that has ended stays as it is.

        Raises RecordNotFound, NotCancellable, or NotReady when the end takes too long.
        """
        call = await self._history.find(user_id, record_id, whole=False)
        if call.record.status != "running":
            return call
        if call.long_text is None:
            raise NotCancellable
        try:
            async with asyncio.timeout(CANCELLING_SECONDS):
                await self._narrator.cancel(record_id)
                bell = self._narrator.bell(record_id)
                while (call := await self._history.find(user_id, record_id, whole=False)).record.status == "running":
                    await bell.wait(LOOK_SECONDS)
        except TimeoutError:
            raise NotReady("正在取消，请稍后查询记录") from None
        return call


def _is_worked_on(call: RecordedCall) -> bool:
    """Whether a process is speaking a text now."""
    claimed_until = call.long_text.claimed_until if call.long_text else None
    return claimed_until is not None and claimed_until > datetime.now(UTC)


def _split(text: str, is_ssml: bool, at_once: int) -> tuple[list[str], int]:
    segments = split_ssml(text) if is_ssml else split_text(text, at_once)
    bought = [each for each in segments if not is_silent(each)] if len(segments) > 1 else segments
    if not bought:
        raise InvalidRequest("text 中没有可朗读的内容")
    return segments, sum(count_characters(each, ssml=is_ssml) for each in bought)
