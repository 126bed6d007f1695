"""Text to speech: check, open the record, let the provider speak, keep the audio, settle."""

import asyncio
from dataclasses import dataclass
from decimal import Decimal
from functools import partial

from app.catalog import PriceList, count_characters
from app.dashscope import Credential, Interruption, SpeechClient, SpeechParameters, Usage
from app.errors import AppError, NotReady, UpstreamError
from app.inflight import InFlight
from app.models import User
from app.services.admission import SpeechAdmission, describe
from app.services.archive import SpeechArchive
from app.services.calls import IdempotencyKey, OpenRecord, Price, as_told
from app.services.history import RecordedCall
from app.services.listening import Audience, Listener
from app.services.logins import Visitor
from app.services.records import RecordService
from app.services.spool import Spool
from app.storage import Storage

MAX_TEXT_CHARS = 2000
# A streamed answer ends when its record is settled, so that a client finds it in the history at once; a slow store
# holds the end back no longer than this.
KEEPING_SECONDS = 2.0
BROKEN_OFF = "服务正在重启，合成已中止，已合成的部分见历史记录"


@dataclass(frozen=True, slots=True)
class SpokenAudio:
    """A finished synthesis: where the audio is, how long it plays, what it cost."""

    record_id: int
    url: str
    duration_ms: int
    characters: int
    amount: Decimal


class SynthesisService:
    """Turns text into stored audio, whole or while it is spoken."""

    def __init__(
        self,
        prices: PriceList,
        admission: SpeechAdmission,
        records: RecordService,
        speech: SpeechClient,
        archive: SpeechArchive,
        storage: Storage,
        in_flight: InFlight,
    ) -> None:
        self._prices = prices
        self._admission = admission
        self._records = records
        self._speech = speech
        self._archive = archive
        self._storage = storage
        self._in_flight = in_flight

    async def synthesize(
        self, visitor: Visitor, parameters: SpeechParameters, text: str, name: IdempotencyKey | None = None
    ) -> SpokenAudio:
        """Speak a text and keep the audio. Goes on to its end even if the caller does not wait for it.

        Raises the AppError that tells the client what went wrong.
        """
        user = visitor.user
        parameters, credential = await self._admission.admit_text(
            user.id, parameters, text, MAX_TEXT_CHARS, None if name else visitor.api_key
        )
        self._archive.require_room(parameters, text)
        work = self._perform(user, credential, parameters, text, Audience(), name)
        record = await asyncio.shield(self._in_flight.start(work))
        if record.output_key is None or record.duration_ms is None:
            raise NotReady(BROKEN_OFF)
        url = self._storage.url(record.output_key)
        return SpokenAudio(record.id, url, record.duration_ms, record.quantity, record.amount)

    async def stream(
        self, visitor: Visitor, parameters: SpeechParameters, text: str, name: IdempotencyKey | None = None
    ) -> Listener:
        """Speak a text to a listener; the same audio is kept. The record is settled also when the listener leaves.

        Who leaves stops the speech, unless the request has a name: then he means to come back for the whole. Raises
        what is known to be wrong before the provider is asked; later failures reach the listener.
        """
        user = visitor.user
        parameters, credential = await self._admission.admit_text(
            user.id, parameters, text, MAX_TEXT_CHARS, None if name else visitor.api_key
        )
        self._archive.require_room(parameters, text)
        listener = Listener(is_awaited=name is not None)
        self._in_flight.start(self._perform(user, credential, parameters, text, listener, name))
        try:
            await listener.welcomed()
        except asyncio.CancelledError:
            listener.dismiss()
            raise
        except AppError:
            listener.leave()
            raise
        return listener

    def recall(self, call: RecordedCall) -> SpokenAudio:
        """The answer to a synthesis that has its end, told from its record. Raises what it failed with."""
        record, key = call.record, _kept(call)
        characters = call.bill.quantity if call.bill else 0
        return SpokenAudio(record.id, self._storage.url(key), record.duration_ms or 0, characters, call.amount)

    def replay(self, call: RecordedCall) -> Listener:
        """The whole audio of a stream that has its end, from the store. Raises what it failed with."""
        key, listener = _kept(call), Listener()
        listener.welcome(call.record.id)
        self._in_flight.start(self._read_out(key, listener))
        return listener

    async def _read_out(self, key: str, listener: Listener) -> None:
        try:
            async with self._storage.open(key) as chunks:
                async for chunk in chunks:
                    await listener.hear(chunk)
                    if listener.left:
                        break
        except BaseException as error:
            listener.end(as_told(error))
            raise
        listener.end()

    async def _perform(
        self,
        user: User,
        credential: Credential,
        parameters: SpeechParameters,
        text: str,
        audience: Audience,
        name: IdempotencyKey | None,
    ) -> OpenRecord:
        """Speak, keep and settle. Gives the record as it was settled, or raises what it failed with."""
        price = Price("character", self._prices.per_character(parameters.model), self._prices.currency)
        asked = describe(parameters, text)
        characters = count_characters(text, ssml=parameters.enable_ssml)
        self._in_flight.start(self._storage.get_ready())
        # The provider may get ready meanwhile, unless there is something that it must not even be asked for.
        is_awaited = name is not None or user.monthly_budget is not None
        try:
            async with (
                self._records.running(
                    user.id, "tts", parameters.model, asked, price, characters, name, is_awaited=is_awaited
                ) as record,
                self._archive.new_spool(parameters) as spool,
            ):
                record.when_open(audience.welcome)
                record.planned_key = self._archive.new_key(parameters.format)
                spoken = text.strip() if parameters.enable_ssml else text  # blanks around markup would be billed
                failure = await self._speak(record, credential, parameters, spoken, spool, audience)
                audience.end_within(KEEPING_SECONDS, failure)
                if spool.size:
                    await self._archive.keep(record, spool, parameters.format, parameters.sample_rate)
                if failure is not None:
                    raise failure
                if record.duration_ms is None and record.cut_off is None:
                    raise UpstreamError("百炼平台没有返回可播放的音频，请稍后重试")
        except BaseException as error:
            audience.end(as_told(error))
            raise
        audience.end()
        return record

    async def _speak(
        self,
        record: OpenRecord,
        credential: Credential,
        parameters: SpeechParameters,
        text: str,
        spool: Spool,
        audience: Audience,
    ) -> AppError | None:
        """Bring the audio into the spool and to the audience. Gives what cut it off; the count is in the record."""
        usage, interruption = Usage(), Interruption()
        audience.on_leave(interruption.request)
        record.unless_open(interruption.request)
        foresee = partial(self._records.foresee, record, count_characters(text, ssml=parameters.enable_ssml))
        try:
            with self._in_flight.stoppable(interruption.request):
                async with self._speech.speak(credential, parameters, text, usage, foresee, interruption) as task:
                    async for chunk in task.audio():
                        await spool.write(chunk)
                        await audience.hear(chunk)
        except AppError as error:
            return error
        finally:
            record.quantity, record.provider_request_id = usage.characters, usage.request_id
            if audience.dismissed or self._in_flight.stopping:
                record.cut_off = "interrupted"
            elif audience.has_abandoned:
                record.cut_off = "abandoned"
        return None


def _kept(call: RecordedCall) -> str:
    """Where the whole speech of a record is kept. Raises what it failed with."""
    if call.record.status != "succeeded" or call.record.output_key is None:
        raise call.failure if call.record.error else NotReady(BROKEN_OFF)
    return call.record.output_key
