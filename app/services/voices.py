"""Cloned voices from their making to their end: list, look, wait, change, delete, and tell whether one can speak."""

import asyncio
import re
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial

import structlog

from app.catalog import find_voice
from app.dashscope import Credential, EnrollmentClient, VoiceReport, may_have_worked
from app.errors import (
    AppError,
    InvalidVoice,
    ModelVoiceMismatch,
    RateLimited,
    UpstreamError,
    UpstreamTimeout,
    VoiceNotFound,
)
from app.inflight import InFlight
from app.services.accounts import AccountService
from app.services.cloning import provider_prefix
from app.services.delivery import AudioFile, AudioUrl
from app.services.samples import PlacedSample, SampleService
from app.services.voicebook import VoiceBook, VoicePage

log = structlog.get_logger(__name__)

WAIT_POLL_SECONDS = 1.0
POLLS_PER_SECOND = 4  # of all voices of an account that are waited for
SHARED_FOR = 0.9  # of the time between two polls, what one brought is enough for all
DELETE_ATTEMPTS = 2
BRAND_NEW = timedelta(seconds=15)
# For how long a voice that could not speak is believed to be as it was.
TRUSTED = {"DEPLOYING": timedelta(seconds=10), "UNDEPLOYED": timedelta(seconds=60)}
_WHY_NOT = {
    "DEPLOYING": "正在审核（DEPLOYING），请等待状态变为 OK 后再使用",
    "UNDEPLOYED": "未通过审核（UNDEPLOYED），不可使用，请更换音频样本后更新或重新创建",
}
_VOICE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class _Watch:
    """A voice that is waited for: what was last seen of it, who watches it, and for how many."""

    task: asyncio.Task[None]

    def __init__(self, report: VoiceReport) -> None:
        self.report = report
        self.waiting = 0


class VoiceService:
    """The voices of a user's account at the provider."""

    def __init__(
        self,
        accounts: AccountService,
        book: VoiceBook,
        samples: SampleService,
        client: EnrollmentClient,
        in_flight: InFlight,
    ) -> None:
        self._accounts = accounts
        self._book = book
        self._samples = samples
        self._client = client
        self._in_flight = in_flight
        self._looks: dict[tuple[str, str], asyncio.Task[VoiceReport]] = {}
        self._watches: dict[str, dict[str, _Watch]] = {}

    async def page(
        self, user_id: uuid.UUID, page: int, page_size: int, prefix: str | None, model: str | None
    ) -> VoicePage:
        """List the account's voices, newest first; pages count from 0.

        Raises the AppError that kept us from the provider's list, which is asked for once a minute.
        """
        credential = await self._accounts.credential(user_id)
        await self._book.refresh(credential)
        wanted = provider_prefix(prefix) if prefix else None
        if any(given is not None and not _VOICE_ID.fullmatch(given) for given in (wanted, model)):
            return VoicePage([], 0)
        return await self._book.page(credential.account, page, page_size, wanted, model)

    async def get(self, user_id: uuid.UUID, voice_id: str, wait_seconds: float = 0) -> VoiceReport:
        """Look at a voice; with `wait_seconds`, once it is no more DEPLOYING, or after that time.

        Raises VoiceNotFound, or the AppError that kept us from an answer.
        """
        credential = await self._accounts.credential(user_id)
        report = await self._look(credential, voice_id)
        if report.status != "DEPLOYING" or not wait_seconds:
            return report
        with self._watched(credential, report) as watch:
            await asyncio.wait([watch.task], timeout=wait_seconds)
            if watch.task.done():
                watch.task.result()
            return watch.report

    @contextmanager
    def _watched(self, credential: Credential, report: VoiceReport) -> Iterator[_Watch]:
        """Share the watching of a voice with all who wait for it, until the last of them leaves."""
        of_account = self._watches.setdefault(credential.account, {})
        watch = of_account.get(report.voice_id)
        if watch is None or watch.task.done():
            watch = of_account[report.voice_id] = _Watch(report)
            watch.task = asyncio.create_task(self._watch(credential, watch))
        watch.waiting += 1
        try:
            yield watch
        finally:
            watch.waiting -= 1
            if not watch.waiting:
                watch.task.cancel()
                if of_account.get(report.voice_id) is watch:
                    del of_account[report.voice_id]
                if not of_account:
                    self._watches.pop(credential.account, None)

    async def _watch(self, credential: Credential, watch: _Watch) -> None:
        """Look at a voice until it is ready or rejected, or this process ends; trouble that may pass is waited out."""
        account, voice_id = credential.account, watch.report.voice_id
        while watch.report.status == "DEPLOYING" and not self._in_flight.hurried:
            # Many voices of one account share the provider's rate limit.
            poll_seconds = max(WAIT_POLL_SECONDS, len(self._watches[account]) / POLLS_PER_SECOND)
            await asyncio.sleep(poll_seconds)
            lately = datetime.now(UTC) - timedelta(seconds=poll_seconds * SHARED_FOR)
            if await self._book.is_being_made(account, voice_id, lately):
                continue  # somebody else has just looked
            try:
                watch.report = await self._look(credential, voice_id)
            except (UpstreamError, UpstreamTimeout, RateLimited) as error:
                log.warning("voice_not_looked_at", error=type(error).__name__)

    async def update(self, user_id: uuid.UUID, voice_id: str, audio: AudioUrl | AudioFile) -> VoiceReport:
        """Have a voice made anew of another sample. Goes on to its end even if the caller does not wait for it.

        Raises VoiceNotFound, or the AppError that tells the client what went wrong.
        """
        return await asyncio.shield(self._in_flight.start(self._update(user_id, voice_id, audio)))

    async def delete(self, user_id: uuid.UUID, voice_id: str) -> None:
        """Delete a voice and its sample. Goes on to its end even if the caller does not wait for it.

        Raises VoiceNotFound, or the AppError that tells the client what went wrong.
        """
        await asyncio.shield(self._in_flight.start(self._delete(user_id, voice_id)))

    async def require_ready(self, credential: Credential, voice_id: str, model_id: str) -> None:
        """Refuse a cloned voice that is known to be unable to speak, or to speak with another model.

        Of a voice that nothing is known of, the provider decides. Raises InvalidVoice or ModelVoiceMismatch.
        """
        known = await self._book.find(credential.account, voice_id)
        if known is None:
            return
        if known.deleted_at is not None:
            raise InvalidVoice(f"音色 {voice_id} 已删除，请使用其他音色")
        if known.target_model and known.target_model != model_id:
            raise ModelVoiceMismatch(f"音色 {voice_id} 只能与 {known.target_model} 一起使用，请修改 model")
        status: str = known.status
        if status != "OK" and known.seen_at < datetime.now(UTC) - TRUSTED[status]:
            try:
                status = (await self._look(credential, voice_id)).status
            except VoiceNotFound:
                raise InvalidVoice(f"音色 {voice_id} 已不存在，请使用其他音色") from None
        if status != "OK":
            raise InvalidVoice(f"音色 {voice_id} {_WHY_NOT[status]}")

    async def _look(self, credential: Credential, voice_id: str) -> VoiceReport:
        """Ask the provider about a voice, once for everybody who asks now."""
        if not _VOICE_ID.fullmatch(voice_id) or find_voice(voice_id) is not None:
            raise VoiceNotFound
        wanted = (credential.account, voice_id)
        if wanted not in self._looks:
            self._looks[wanted] = looking = self._in_flight.start(self._query(credential, voice_id))
            looking.add_done_callback(partial(self._end_look, wanted))
        return await asyncio.shield(self._looks[wanted])

    def _end_look(self, wanted: tuple[str, str], looking: asyncio.Task[VoiceReport]) -> None:
        if self._looks.get(wanted) is looking:
            del self._looks[wanted]

    async def _query(self, credential: Credential, voice_id: str) -> VoiceReport:
        asked_at = datetime.now(UTC)
        try:
            report = await self._client.query(credential, voice_id)
        except VoiceNotFound:
            # Of a voice so new, its follower finds out whether that is true.
            if not await self._book.is_being_made(credential.account, voice_id, asked_at - BRAND_NEW):
                await self._book.forget(credential.account, voice_id)
            raise
        await self._book.note(credential.account, report, asked_at)
        return report

    async def _update(self, user_id: uuid.UUID, voice_id: str, audio: AudioUrl | AudioFile) -> VoiceReport:
        with closing(audio):
            credential = await self._accounts.credential(user_id)
            async with self._samples.admitted(user_id, audio) as sample:
                before = await self._look(credential, voice_id)
                begun_at = datetime.now(UTC)
                placed = await self._samples.place(user_id, credential, sample)
                try:
                    await self._submit_update(credential, voice_id, placed)
                except AppError as error:
                    if not may_have_worked(error):
                        await self._samples.discard(placed)
                    raise
        now = datetime.now(UTC)
        changed = replace(before, status="DEPLOYING", modified_at=now.replace(microsecond=0))
        self._looks.pop((credential.account, voice_id), None)
        if await self._book.note(credential.account, changed, now, begun_at):
            await self._samples.keep(placed, credential.account, voice_id)
        else:
            await self._samples.discard(placed)
        return changed

    async def _submit_update(self, credential: Credential, voice_id: str, placed: PlacedSample) -> None:
        """Ask for the change, and once more where no answer tells: doing it twice is harmless."""
        try:
            await self._client.update(credential, voice_id, placed.url)
        except AppError as error:
            if not may_have_worked(error):
                raise
            await self._client.update(credential, voice_id, placed.url)

    async def _delete(self, user_id: uuid.UUID, voice_id: str) -> None:
        credential = await self._accounts.credential(user_id)
        if not _VOICE_ID.fullmatch(voice_id) or find_voice(voice_id) is not None:
            raise VoiceNotFound
        may_be_gone = False
        for attempts_left in reversed(range(DELETE_ATTEMPTS)):
            try:
                await self._client.delete(credential, voice_id)
                break
            except VoiceNotFound:
                if may_be_gone:
                    break
                await self._book.forget(credential.account, voice_id)
                raise
            except AppError as error:
                if not attempts_left or not may_have_worked(error):
                    raise
                may_be_gone = True
        await self._book.forget(credential.account, voice_id, was_ours=True)
        self._looks.pop((credential.account, voice_id), None)
        self._samples.wake()
