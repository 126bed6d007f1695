"""Long text to speech: check and split, open the record with its job, wait for it, follow it, stop it."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Literal

from app.catalog import PriceList
from app.computation import compute
from app.dashscope import SpeechParameters
from app.errors import AppError, Cancelled, InvalidRequest, NotCancellable, NotReady, UpstreamError
from app.inflight import InFlight
from app.models import LongText, Segment
from app.services.admission import SpeechAdmission, describe
from app.services.archive import SpeechArchive
from app.services.calls import Price
from app.services.narrator import Narrator
from app.services.records import RecordedCall, RecordService
from app.settings import Settings
from app.splitting import is_silent, split_text
from app.ssml import split_ssml

# Another process may work on the text, whose bell is not heard here.
LOOK_SECONDS = 1.0
FOLLOWED_AT_MOST_EVERY_SECONDS = 0.2
CANCELLING_SECONDS = 15.0

SpeechSubtitle = Literal["srt", "vtt"]


@dataclass(frozen=True, slots=True)
class StartedText:
    """A long text that is on its way."""

    record_id: int
    segments: int


class LongTextService:
    """What users do with long texts; the narrator does the work."""

    def __init__(
        self,
        settings: Settings,
        prices: PriceList,
        admission: SpeechAdmission,
        archive: SpeechArchive,
        records: RecordService,
        narrator: Narrator,
        in_flight: InFlight,
    ) -> None:
        self._settings = settings
        self._prices = prices
        self._admission = admission
        self._archive = archive
        self._records = records
        self._narrator = narrator
        self._in_flight = in_flight

    async def start(
        self, user_id: uuid.UUID, parameters: SpeechParameters, text: str, subtitle: SpeechSubtitle | None
    ) -> StartedText:
        """Have a text spoken, whatever becomes of who asked. Raises the AppError of what is wrong with it."""
        max_chars = self._settings.long_text_max_chars
        parameters, _ = await self._admission.admit_text(user_id, parameters, text, max_chars)
        at_once = self._settings.long_text_parallelism
        split = split_ssml if parameters.enable_ssml else partial(split_text, at_once=at_once)
        segments = await compute(len(text.encode()), split, text)
        if len(segments) > 1 and all(map(is_silent, segments)):
            raise InvalidRequest("text 中没有可朗读的内容")
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
        record_id = await self._records.open_job(user_id, "tts", parameters.model, asked, price, rows)
        self._narrator.wake()
        return StartedText(record_id, len(segments))

    async def wait(self, user_id: uuid.UUID, record_id: int) -> RecordedCall:
        """Wait until a text is spoken. Raises what it failed with, Cancelled, or NotReady when this process ends."""
        bell = self._narrator.bell(record_id)
        while (call := await self._records.find(user_id, record_id, whole=False)).record.status == "running":
            if self._in_flight.hurried:
                raise NotReady(f"服务正在重启，合成会在后台继续，请稍后查询记录 {record_id}")
            await bell.wait(LOOK_SECONDS)
        if call.record.status == "cancelled":
            raise Cancelled
        if call.record.status != "succeeded":
            raise _failure(call)
        return call

    async def follow(self, user_id: uuid.UUID, record_id: int) -> AsyncIterator[RecordedCall]:
        """The record now, at every change, and at last at its end. Raises RecordNotFound.

        It stops early when this process ends.
        """
        bell = self._narrator.bell(record_id)
        shown: object = None
        while not self._in_flight.hurried:
            call = await self._records.find(user_id, record_id, whole=False)
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
        call = await self._records.find(user_id, record_id, whole=False)
        if call.record.status != "running":
            return call
        if call.long_text is None:
            raise NotCancellable
        try:
            async with asyncio.timeout(CANCELLING_SECONDS):
                await self._narrator.cancel(record_id)
                bell = self._narrator.bell(record_id)
                while (call := await self._records.find(user_id, record_id, whole=False)).record.status == "running":
                    await bell.wait(LOOK_SECONDS)
        except TimeoutError:
            raise NotReady("正在取消，请稍后查询记录") from None
        return call


def _failure(call: RecordedCall) -> AppError:
    """What the record failed with, as the process that worked on it would have told it."""
    for kind in _every_error(AppError):
        if kind.code == call.record.error:
            return kind(call.record.error_message)
    return UpstreamError(call.record.error_message)


def _every_error(kind: type[AppError]) -> list[type[AppError]]:
    return [kind, *(error for child in kind.__subclasses__() for error in _every_error(child))]
