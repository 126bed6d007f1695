"""Live text to speech: a session of utterances, heard while the client still writes."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Literal

import anyio
import structlog

from app.catalog import PriceList, count_characters
from app.dashscope import Credential, SpeechClient, SpeechParameters
from app.database import UNAVAILABLE
from app.errors import AppError, IdleTimeout, NotReady, Restarting, UpstreamError
from app.inflight import InFlight
from app.ratelimit import RateLimiter
from app.services.admission import SpeechAdmission, describe
from app.services.archive import SpeechArchive
from app.services.budgets import BudgetService
from app.services.calls import OpenRecord, Price, as_told
from app.services.inbox import Inbox, Mark
from app.services.records import RecordService
from app.services.spool import Spool
from app.services.utterance import Listen, Utterance
from app.settings import Settings
from app.storage import Storage

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Spoken:
    """How an utterance ended. Without text there is no record, and nothing to pay."""

    ending: Literal["complete", "cancelled"]
    characters: int = 0
    duration_ms: int = 0
    amount: Decimal = Decimal(0)
    record_id: int | None = None
    audio_url: str | None = None


class LiveService:
    """Opens live sessions."""

    def __init__(
        self,
        settings: Settings,
        prices: PriceList,
        admission: SpeechAdmission,
        records: RecordService,
        budgets: BudgetService,
        speech: SpeechClient,
        archive: SpeechArchive,
        storage: Storage,
        limiter: RateLimiter,
        in_flight: InFlight,
    ) -> None:
        self.settings = settings
        self.prices = prices
        self.admission = admission
        self.records = records
        self.budgets = budgets
        self.speech = speech
        self.archive = archive
        self.storage = storage
        self.limiter = limiter
        self.in_flight = in_flight

    async def open(self, user_id: uuid.UUID, parameters: SpeechParameters) -> "LiveSession":
        """Begin a session. Raises the AppError of what is known to be wrong with it."""
        await self.admission.admit(user_id, parameters)
        return LiveSession(self, user_id, parameters)


class LiveSession:
    """One client's utterances, one after the other. `run` speaks what was said; `heard` is what the client gets."""

    def __init__(self, tools: LiveService, user_id: uuid.UUID, parameters: SpeechParameters) -> None:
        self._tools = tools
        self._user_id = user_id
        self._parameters = parameters
        self._inbox = Inbox()
        self._inlet, self._outlet = anyio.create_memory_object_stream[tuple[Utterance, bytes] | Spoken](1)
        self._utterance: Utterance | None = None
        self._failure: AppError | None = None
        self._is_complete = False
        self._left = False

    def say(self, text: str) -> None:
        """Have some text spoken. Raises TextTooLong when too much waits already."""
        if text:
            self._inbox.put(text)
            self._is_complete = False

    def flush(self) -> None:
        """Have the unfinished sentence spoken."""
        self._inbox.put(Mark.FLUSH)

    def end(self) -> None:
        """Say that the utterance is complete."""
        self._inbox.put(Mark.END)
        self._is_complete = True

    def cancel(self) -> None:
        """Stop speaking, and forget everything that was said before."""
        self._inbox.clear()
        if self._utterance is None or self._utterance.is_over:
            self._inbox.put(Mark.CANCEL)
        else:
            self._utterance.stop("cancelled")

    def leave(self, failure: AppError | None = None) -> None:
        """End the session: the client is gone, or did what `failure` tells him. Harmless when done twice."""
        if self._left:
            return
        self._left = True
        self._failure = self._failure or failure
        if self._utterance is not None:
            self._utterance.stop("interrupted" if self._tools.in_flight.hurried else "abandoned")
        self._inbox.wake()

    def wind_up(self) -> None:
        """The process is about to end: speak what was said completely, break off what was not."""
        if self._utterance is None:
            self.leave()
        elif not self._is_complete:
            self.leave(Restarting())

    def close(self) -> None:
        """Nobody listens any more."""
        self.leave()
        self._outlet.close()

    async def run(self) -> None:
        """Speak until the client leaves, or something fails; then nothing more is heard."""
        try:
            with self._tools.in_flight.hastened(self.wind_up):
                while not self._left:
                    await self._serve()
                    if self._tools.in_flight.hurried:
                        self.wind_up()
        except AppError as error:
            self._failure = self._failure or error
        except Exception as error:
            log.exception("live_session_broke")
            self._failure = self._failure or as_told(error)
        finally:
            self._inlet.close()

    async def heard(self) -> AsyncIterator[bytes | Spoken]:
        """Audio as it comes, and how each utterance ended. Raises what ended the session."""
        try:
            async for item in self._outlet:
                if isinstance(item, Spoken):
                    yield item
                elif item[0].cut_off is None:
                    yield item[1]
        except anyio.ClosedResourceError:
            return
        if self._failure is not None:
            raise self._failure

    async def _serve(self) -> None:
        """Take up what comes until an utterance is over."""
        heard = await self._inbox.take_speakable(self._tools.settings.stream_idle_seconds, lambda: self._left)
        if isinstance(heard, list):
            await self._utter("".join(heard))
        elif heard is not None:
            await self._tell(Spoken("complete" if heard is Mark.END else "cancelled"))
        elif not self._left:
            raise IdleTimeout

    async def _utter(self, first: str) -> None:
        settings, tools = self._tools.settings, self._tools
        utterance = Utterance(
            tools.speech,
            tools.records,
            partial(tools.budgets.hold_back, self._user_id),
            self._parameters,
            self._inbox,
            settings.stream_idle_seconds,
            settings.long_text_max_chars,
        )
        self._utterance = utterance
        try:
            await tools.limiter.check(settings.rate_limit, "user", str(self._user_id))
            credential = await tools.admission.admit(self._user_id, self._parameters)
            spoken = Spoken("cancelled")
            if utterance.cut_off is None:
                spoken = await asyncio.shield(tools.in_flight.start(self._perform(utterance, credential, first)))
        finally:
            self._utterance = None
        if utterance.cut_off in {None, "cancelled"}:
            await self._tell(spoken)
        if utterance.was_idle:
            raise IdleTimeout

    async def _perform(self, utterance: Utterance, credential: Credential, first: str) -> Spoken:
        """Speak, keep and settle, whatever becomes of the client."""
        tools, parameters = self._tools, self._parameters
        price = Price("character", tools.prices.per_character(parameters.model), tools.prices.currency)
        asked, characters = describe(parameters, first), count_characters(first)

        async def hear(samples: bytes) -> None:
            if utterance.cut_off is None:
                await self._tell((utterance, samples))

        tools.in_flight.start(tools.storage.get_ready())
        async with (
            tools.records.running(self._user_id, "tts", parameters.model, asked, price, characters) as record,
            tools.archive.new_spool(parameters) as spool,
        ):
            record.planned_key = tools.archive.new_key(parameters.format)
            failure = await self._speak(utterance, credential, record, first, spool, hear)
            if spool.size:
                await tools.archive.keep(record, spool, parameters.format, parameters.sample_rate)
            if failure is not None:
                raise failure
            if record.duration_ms is None and record.cut_off is None:
                raise UpstreamError("百炼平台没有返回可播放的音频，请稍后重试")
        return Spoken(
            "cancelled" if record.cut_off else "complete",
            record.quantity,
            record.duration_ms or 0,
            record.amount,
            record.id,
            tools.storage.url(record.output_key) if record.output_key else None,
        )

    async def _speak(
        self,
        utterance: Utterance,
        credential: Credential,
        record: OpenRecord,
        first: str,
        spool: Spool,
        hear: Listen,
    ) -> AppError | None:
        try:
            with self._tools.in_flight.stoppable(lambda: utterance.stop("interrupted")):
                await utterance.speak(record, credential, first, spool, hear)
        except AppError as error:
            return error
        except UNAVAILABLE:
            log.exception("live_speech_broke", record_id=record.id)
            return NotReady()
        return None

    async def _tell(self, item: tuple[Utterance, bytes] | Spoken) -> None:
        try:
            await self._inlet.send(item)
        except anyio.BrokenResourceError:
            self.leave()
