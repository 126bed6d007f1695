"""Cloning a voice: check the sample, open the record, ask the provider once, and find out what became of it.

The provider tells nothing of an order whose answer is lost, and a repeated order makes a second voice. So what voices
there are is written down before it is asked; afterwards a new one in its list is the one that was ordered.
"""

import asyncio
import hashlib
import json
import uuid
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

import structlog

from app.catalog import cloning_models, find_speech_model
from app.completion import run_to_end
from app.dashscope import CloningOrder, Credential, EnrollmentClient, VoiceReport, may_have_worked
from app.database import outlast
from app.errors import AppError, InvalidModel, InvalidRequest, UpstreamError, UpstreamTimeout
from app.inflight import InFlight
from app.jobs import CLAIM, again_in
from app.models import Enrollment
from app.services.accounts import AccountService
from app.services.calls import IdempotencyKey, OpenRecord, Price, Status
from app.services.delivery import AudioFile, AudioUrl
from app.services.enrollments import ClaimedEnrollment, OpenEnrollments
from app.services.following import VoiceFollower, listed_prefix
from app.services.history import RecordedCall
from app.services.records import RecordService
from app.services.repeats import RepeatService
from app.services.samples import HeldSample, SampleService
from app.services.voicebook import VoiceBook

log = structlog.get_logger(__name__)

FREE = Price("voice", Decimal(0), "CNY")
# After a lost answer, the list is looked at before each of these pauses and after the last; later in the background.
SEEK_PAUSES_SECONDS = (1.0, 2.0, 4.0)
LIST_SECONDS = 15.0
LOST_FOR_NOW = "百炼平台没有返回结果，但音色可能仍会创建成功。后台会继续查找并更新历史记录，请稍后查看音色列表"


@dataclass(frozen=True, slots=True)
class Cloned:
    """A voice that the provider has taken on, with the record of its making."""

    record_id: int
    voice_id: str
    status: str
    target_model: str


class CloningService:
    """Makes voices of samples, each order once."""

    def __init__(
        self,
        accounts: AccountService,
        records: RecordService,
        enrollments: OpenEnrollments,
        follower: VoiceFollower,
        book: VoiceBook,
        samples: SampleService,
        client: EnrollmentClient,
        repeats: RepeatService,
        in_flight: InFlight,
    ) -> None:
        self._repeats = repeats
        self._accounts = accounts
        self._records = records
        self._enrollments = enrollments
        self._follower = follower
        self._book = book
        self._samples = samples
        self._client = client
        self._in_flight = in_flight

    async def create(
        self, user_id: uuid.UUID, order: CloningOrder, audio: AudioUrl | AudioFile, name: IdempotencyKey | None = None
    ) -> Cloned:
        """Have a voice made. Goes on to its end even if the caller does not wait for it; closes the audio.

        Where the answer to the same order was lost before, that one's voice is looked for first. Raises the AppError
        that tells the client what went wrong.
        """
        return await asyncio.shield(self._in_flight.start(self._create(user_id, order, audio, name)))

    def recall(self, call: RecordedCall) -> Cloned:
        """The answer to an earlier order. Raises what it failed with."""
        if call.enrollment is None or call.enrollment.voice_id is None:
            raise call.failure
        return Cloned(call.record.id, call.enrollment.voice_id, "DEPLOYING", call.enrollment.target_model)

    async def _create(
        self, user_id: uuid.UUID, order: CloningOrder, audio: AudioUrl | AudioFile, name: IdempotencyKey | None
    ) -> Cloned:
        with closing(audio):
            sent = _as_sent(order)
            if find_speech_model(order.target_model) is None:
                raise InvalidModel(f"无效的模型名称：{order.target_model[:64]}，可用模型见 /api/audio/tts/models")
            credential = await self._accounts.credential(user_id)
            _require_cloning_model(order.target_model, credential.region)
            async with self._samples.admitted(user_id, audio) as sample:
                digest = _digest(sent, sample)
                lost = await self._enrollments.find_lost(user_id, credential.account, digest)
                if lost is not None and (found := await self._look_for(lost)):
                    if name is not None:
                        await self._repeats.give_name(user_id, found.record_id, name)
                    return found
                asked = _describe(order, audio)
                async with self._records.running(
                    user_id, "voice", order.target_model, asked, FREE, name=name
                ) as record:
                    return await self._order(user_id, credential, sent, sample, digest, record)

    async def _look_for(self, lost: Enrollment) -> Cloned | None:
        """The voice of a lost order, looked for a few times if need be."""
        found: Enrollment | None = lost
        for pause_seconds in (*SEEK_PAUSES_SECONDS, None):
            if found and found.voice_id is None:
                await asyncio.shield(self._follower.check(lost.record_id))
                found = await self._enrollments.find(lost.record_id)
            if found and found.voice_id is not None:
                await self._enrollments.tell(found.record_id)
                return Cloned(found.record_id, found.voice_id, found.status or "DEPLOYING", found.target_model)
            if pause_seconds is not None:
                await asyncio.sleep(pause_seconds)
        return None

    async def _list_before(self, credential: Credential, prefix: str) -> list[str] | None:
        """The voices of a prefix that there are; None where they can't be listed, which is no reason not to order."""
        try:
            async with asyncio.timeout(LIST_SECONDS):
                return [voice.voice_id for voice in await self._client.find(credential, listed_prefix(prefix))]
        except (TimeoutError, UpstreamError, UpstreamTimeout) as error:
            log.warning("voices_not_listed_before", error=type(error).__name__)
            return None

    async def _order(
        self,
        user_id: uuid.UUID,
        credential: Credential,
        order: CloningOrder,
        sample: HeldSample | str,
        digest: str,
        record: OpenRecord,
    ) -> Cloned:
        """Ask the provider, and bring the record to its end, or to those who go on looking for the voice."""
        before = await self._list_before(credential, order.prefix)
        now = datetime.now(UTC)
        row = Enrollment(
            record_id=record.id,
            user_id=user_id,
            account=credential.account,
            target_model=order.target_model,
            prefix=order.prefix,
            digest=digest,
            voices_before=json.dumps(before),
            next_check_at=now + CLAIM,
        )
        claimed = await self._enrollments.announce(record, row)
        async with self._enrollments.kept(claimed):
            try:
                placed = await self._samples.place(user_id, credential, sample, record.id)
                await self._records.foresee(record, 0)
            except BaseException as error:
                status: Status = "interrupted" if isinstance(error, asyncio.CancelledError) else "failed"
                await run_to_end(self._enrollments.fail(claimed, status, error))
                self._samples.wake()
                raise
            try:
                voice_id = await self._client.create(credential, order, placed.url)
            except AppError as error:
                voice_id = await self._clear_up(claimed, credential, error)
            except BaseException:
                await run_to_end(self._leave_to_follower(claimed))
                raise
            else:
                await run_to_end(self._settle(claimed, voice_id))
        return Cloned(record.id, voice_id, "DEPLOYING", order.target_model)

    async def _settle(self, claimed: ClaimedEnrollment, voice_id: str) -> None:
        record_id = claimed.record.id
        if not await outlast(lambda: self._enrollments.succeed(claimed, voice_id, is_told=True), record_id=record_id):
            log.error("voice_without_record", record_id=claimed.record.id, voice_id=voice_id)
        now = datetime.now(UTC).replace(microsecond=0)
        await self._book.note(claimed.row.account, VoiceReport(voice_id, "DEPLOYING", now, now), now)
        self._follower.wake()

    async def _clear_up(self, claimed: ClaimedEnrollment, credential: Credential, failure: AppError) -> str:
        """Find out what became of an order that failed: gives its voice. Raises the failure if there is none yet."""
        unclear = may_have_worked(failure)
        try:
            if unclear or (isinstance(failure, UpstreamError) and failure.is_its_fault):
                await run_to_end(self._enrollments.lose(claimed))
                for pause_seconds in (*SEEK_PAUSES_SECONDS, None) if unclear else (None,):
                    voice_id = await self._seek(claimed, credential)
                    if voice_id is not None:
                        self._follower.wake()
                        return voice_id
                    if pause_seconds is not None:
                        await asyncio.sleep(pause_seconds)
        except BaseException:
            await run_to_end(self._leave_to_follower(claimed))
            raise
        if unclear:
            await run_to_end(self._leave_to_follower(claimed))
            raise type(failure)(LOST_FOR_NOW) from failure
        await run_to_end(self._enrollments.fail(claimed, "failed", failure))
        self._samples.wake()
        raise failure

    async def _seek(self, claimed: ClaimedEnrollment, credential: Credential) -> str | None:
        try:
            return (await self._follower.seek(claimed, credential, is_told=True)).voice_id
        except AppError as error:
            log.warning("lost_voice_not_sought", record_id=claimed.record.id, error=type(error).__name__)
            return None

    async def _leave_to_follower(self, claimed: ClaimedEnrollment) -> None:
        await self._enrollments.lose(claimed)
        await self._enrollments.put_back(claimed, again_in(0))
        self._follower.wake()


def _as_sent(order: CloningOrder) -> CloningOrder:
    """The order in the provider's terms, whose prefixes have no underscores (PROTOCOL §3). Raises InvalidRequest."""
    prefix = provider_prefix(order.prefix)
    if not prefix:
        raise InvalidRequest("prefix 至少要包含一个字母或数字")
    return CloningOrder(order.target_model, prefix, order.language_hints)


def provider_prefix(prefix: str) -> str:
    """What the provider makes of a prefix of ours: it knows no underscores."""
    return prefix.replace("_", "")


def _require_cloning_model(model_id: str, region: str) -> None:
    here = cloning_models(region)
    if model_id not in here:
        raise InvalidModel(f"API Key 所在地域不支持用 {model_id} 复刻声音，可用：{'、'.join(here)}")


def _digest(order: CloningOrder, sample: HeldSample | str) -> str:
    of_sample = sample if isinstance(sample, str) else sample.digest
    named = json.dumps([order.target_model, order.prefix, order.language_hints, of_sample])
    return hashlib.sha256(named.encode()).hexdigest()


def _describe(order: CloningOrder, audio: AudioUrl | AudioFile) -> str:
    """What was asked, as the history shows it."""
    asked: dict[str, object] = {"prefix": order.prefix}
    if isinstance(audio, AudioUrl):
        asked["audio_url"] = audio.url
    elif audio.name:
        asked["file"] = audio.name
    if order.language_hints:
        asked["language_hints"] = list(order.language_hints)
    return json.dumps(asked, ensure_ascii=False)
