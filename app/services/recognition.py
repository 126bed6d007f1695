"""Speech to text at once: check the audio, open the record, ask the provider, settle."""

import asyncio
import json
import math
import uuid
from contextlib import AsyncExitStack, closing
from dataclasses import asdict, dataclass
from decimal import Decimal

import structlog

from app.catalog import PriceList
from app.dashscope import InlineAudio, Recognition, RecognitionClient, RecognitionOrder, may_have_worked
from app.errors import AudioTooLong, ConnectionLost, InvalidAudio, UnclearAnswer, UpstreamTimeout
from app.inflight import InFlight
from app.services.accounts import AccountService
from app.services.calls import IdempotencyKey, OpenRecord, Price
from app.services.delivery import MAX_AUDIO_BYTES, AudioDelivery, AudioFile, AudioUrl, HeldAudio
from app.services.history import RecordedCall
from app.services.recognizers import require_recognizer
from app.services.records import RecordService
from app.settings import Settings

log = structlog.get_logger(__name__)

MIN_SECONDS = 1  # what is shorter the provider may refuse (PROTOCOL §4.1)
_DATA_KEPT = ("language", "emotion", "input_tokens", "output_tokens", "seconds")


@dataclass(frozen=True, slots=True)
class Recognized:
    """A finished recognition: what was heard, how many seconds were billed, what they cost."""

    record_id: int
    heard: Recognition
    seconds: int
    amount: Decimal


class RecognitionService:
    """Turns short audio into text while the caller waits."""

    def __init__(
        self,
        settings: Settings,
        prices: PriceList,
        accounts: AccountService,
        records: RecordService,
        client: RecognitionClient,
        delivery: AudioDelivery,
        in_flight: InFlight,
    ) -> None:
        self._settings = settings
        self._prices = prices
        self._accounts = accounts
        self._records = records
        self._client = client
        self._delivery = delivery
        self._in_flight = in_flight

    async def recognize(
        self,
        user_id: uuid.UUID,
        order: RecognitionOrder,
        audio: AudioUrl | AudioFile,
        name: IdempotencyKey | None = None,
    ) -> Recognized:
        """Recognise audio. Goes on to its end even if the caller does not wait for it; closes the audio.

        Raises the AppError that tells the client what went wrong.
        """
        return await asyncio.shield(self._in_flight.start(self._perform(user_id, order, audio, name)))

    def recall(self, call: RecordedCall) -> Recognized:
        """The answer to a recognition that has its end, told from its record. Raises what it failed with."""
        record = call.record
        if record.status != "succeeded":
            raise call.failure
        known = json.loads(record.output_data or "{}")
        heard = Recognition(
            text=record.output_text or "",
            language=known.get("language"),
            emotion=known.get("emotion"),
            input_tokens=known.get("input_tokens", 0),
            output_tokens=known.get("output_tokens", 0),
            seconds=known.get("seconds"),
            request_id=call.bill.provider_request_id if call.bill else None,
        )
        return Recognized(record.id, heard, call.bill.quantity if call.bill else 0, call.amount)

    async def _perform(
        self,
        user_id: uuid.UUID,
        order: RecognitionOrder,
        audio: AudioUrl | AudioFile,
        name: IdempotencyKey | None,
    ) -> Recognized:
        with closing(audio):
            require_recognizer(order.model, order.context, call_type="sync")
            credential = await self._accounts.credential(user_id)
            price = Price("second", self._prices.per_second[order.model], self._prices.currency)
            max_ms = self._settings.asr_max_seconds * 1000
            async with (
                self._delivery.admitted(user_id, audio, MAX_AUDIO_BYTES, max_ms) as admitted,
                self._records.running(
                    user_id,
                    "asr",
                    order.model,
                    _describe(order, audio, admitted),
                    price,
                    _seconds_of(admitted) or self._settings.asr_max_seconds,
                    name,
                ) as record,
                AsyncExitStack() as stack,
            ):
                sent: InlineAudio | str | None = self._delivery.inline(admitted)
                if sent is None:
                    sent = await stack.enter_async_context(self._delivery.addressed(credential, order.model, admitted))
                expected = _seconds_of(admitted)
                at_least = expected or MIN_SECONDS  # no recognition costs less
                await self._records.foresee(record, at_least)
                try:
                    heard = await self._client.recognize(credential, order, sent)
                except (asyncio.CancelledError, ConnectionLost, UpstreamTimeout, UnclearAnswer) as error:
                    if isinstance(error, asyncio.CancelledError) or may_have_worked(error):
                        # An answer that makes no sense proves less than none at all.
                        record.quantity = expected if isinstance(error, UnclearAnswer) else at_least
                        record.estimated = True
                    raise
                except AudioTooLong:
                    if 0 < expected <= MIN_SECONDS:
                        raise InvalidAudio(f"音频太短，至少需要 {MIN_SECONDS} 秒") from None
                    raise
                _note(record, heard, at_least)
        return Recognized(record.id, heard, record.quantity, record.amount)


def _seconds_of(audio: HeldAudio | str) -> int:
    """What the provider will count: seconds begun. Of a URL nothing is known."""
    if isinstance(audio, str) or audio.duration_ms is None:
        return 0
    return max(MIN_SECONDS, math.ceil(audio.duration_ms / 1000))


def _note(record: OpenRecord, heard: Recognition, expected: int) -> None:
    """Keep what was heard, and the count: the provider's, or our own measure where it gave none."""
    record.provider_request_id = heard.request_id
    record.quantity, record.estimated = (expected, True) if heard.seconds is None else (heard.seconds, False)
    if heard.seconds is None:
        log.warning("provider_counted_nothing", record_id=record.id, billed_seconds=record.quantity)
    record.duration_ms = record.quantity * 1000
    record.output_text = heard.text
    known = {name: value for name, value in asdict(heard).items() if name in _DATA_KEPT and value is not None}
    record.output_data = json.dumps(known, ensure_ascii=False)


def _describe(order: RecognitionOrder, audio: AudioUrl | AudioFile, admitted: HeldAudio | str) -> str:
    """What was asked, as the history shows it."""
    asked: dict[str, object] = {}
    if isinstance(audio, AudioUrl):
        asked["audio_url"] = audio.url
    elif audio.name:
        asked["file"] = audio.name
    if not isinstance(admitted, str):
        asked |= {"bytes": admitted.size, "audio_format": admitted.container}
    if order.language:
        asked["language"] = order.language
    asked["enable_itn"] = order.enable_itn
    if order.context:
        asked["context"] = order.context
    return json.dumps(asked, ensure_ascii=False)
