"""The cloned voices of each account at the provider, as far as this backend knows them.

The provider's list costs calls, lags behind and tells little, so it is written down here once a minute at most. What we
do ourselves, and what the provider says of a single voice, is written down at once and believed more than the list for
a while. The records of the voices' making follow.
"""

import asyncio
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import cast

import structlog
from sqlalchemy import func, or_, select, true, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.catalog import read_voice_id
from app.completion import run_to_end
from app.dashscope import Credential, EnrollmentClient, VoiceReport, VoiceStatus
from app.database import Database, once_more
from app.errors import AppError, NotReady, UpstreamTimeout, VoiceNotFound
from app.inflight import InFlight
from app.models import Enrollment, Voice, VoiceListing, VoiceSample

log = structlog.get_logger(__name__)

LISTED_FOR = timedelta(seconds=60)
# How long the provider's list may lag behind what was done.
LAG = timedelta(seconds=120)
FOLLOW_AFTER = timedelta(seconds=2)
MAX_MODEL_CHARS = 64
MAX_PREFIX_CHARS = 64
ROUND_SECONDS = 60.0
CLAIM = timedelta(seconds=30)
OTHERS_ROUND_POLL_SECONDS = 0.2
# Voices that are asked for one by one in a round, and that one statement names.
QUERIES_PER_ROUND = 10
VOICES_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class VoicePage:
    """One page of an account's voices, newest first, and how many there are in all."""

    voices: list[Voice]
    total: int


class VoiceBook:
    """Knows the voices of all accounts, and keeps what it knows fresh."""

    def __init__(self, database: Database, client: EnrollmentClient, in_flight: InFlight) -> None:
        self._database = database
        self._client = client
        self._in_flight = in_flight
        self._rounds: dict[str, asyncio.Task[None]] = {}

    async def page(
        self, account: str, page: int, page_size: int, prefix: str | None = None, model: str | None = None
    ) -> VoicePage:
        """An account's voices by pages that count from 0; `prefix`, in whatever case, and `model` are exact."""
        wanted = [Voice.account == account, Voice.deleted_at.is_(None)]
        if prefix:
            wanted.append(func.lower(Voice.prefix) == prefix.lower())
        if model:
            wanted.append(Voice.target_model == model)
        rows = (
            select(Voice)
            .where(*wanted)
            .order_by(Voice.created_at.desc(), Voice.voice_id.desc())
            .offset(page * page_size)
            .limit(page_size)
        )
        async with self._database.snapshot() as session:
            total = await session.scalar(select(func.count()).select_from(Voice).where(*wanted))
            voices = list(await session.scalars(rows))
        return VoicePage(voices, total or 0)

    async def find(self, account: str, voice_id: str) -> Voice | None:
        """A voice of the account, also one that we deleted lately."""
        async with self._database.snapshot() as session:
            return await session.get(Voice, (account, voice_id))

    async def is_being_made(self, account: str, voice_id: str, since: datetime) -> bool:
        """Whether a voice was seen DEPLOYING since then, by whatever process."""
        known = await self.find(account, voice_id)
        return known is not None and known.deleted_at is None and known.status == "DEPLOYING" and known.seen_at > since

    async def refresh(self, credential: Credential) -> None:
        """List the account's voices at the provider, unless that was done within the last minute, by whatever process.

        Raises the AppError that kept it from that.
        """
        account = credential.account
        if not await self._is_listed(account):
            if account not in self._rounds:
                self._rounds[account] = listing = self._in_flight.start(self._list(credential))
                listing.add_done_callback(lambda _: self._rounds.pop(account))
            await asyncio.shield(self._rounds[account])

    async def note(
        self, account: str, report: VoiceReport, asked_at: datetime, begun_at: datetime | None = None
    ) -> bool:
        """Write down what the provider says of one voice, asked at that moment, unless more is known since.

        False for a voice that was deleted since then, or since `begun_at`.
        """

        @once_more
        async def write() -> bool:
            async with self._database.transaction() as session:
                known = await session.get(Voice, (account, report.voice_id), with_for_update=True)
                if known is None:
                    session.add(_voice(account, report, asked_at))
                elif known.seen_at > asked_at or (begun_at and known.deleted_at and known.deleted_at > begun_at):
                    return known.deleted_at is None
                else:
                    _copy(report, known, asked_at)
                await _follow(session, [report])
            return True

        try:
            return await write()
        except IntegrityError:  # somebody else wrote the same voice down first
            return await write()

    async def forget(self, account: str, voice_id: str, *, was_ours: bool = False) -> None:
        """Write down that a voice is gone; its sample goes too.

        Of one that `was_ours` the provider has taken our order to delete it, so that it is gone for every other key of
        the account as well.
        """
        now = datetime.now(UTC)

        @once_more
        async def write() -> None:
            gone = update(Voice).where(Voice.voice_id == voice_id, true() if was_ours else Voice.account == account)
            async with self._database.transaction() as session:
                marked = await session.scalars(gone.values(deleted_at=now, seen_at=now).returning(Voice.account))
                if was_ours and account not in marked.all():
                    session.add(_tombstone(account, voice_id, now))
                await _retire(session, None if was_ours else account, [voice_id], now)

        try:
            await write()
        except IntegrityError:  # a list wrote it down meanwhile
            await write()

    async def _is_listed(self, account: str) -> bool:
        async with self._database.snapshot() as session:
            listed_at = await session.scalar(select(VoiceListing.listed_at).where(VoiceListing.account == account))
        return listed_at is not None and listed_at > datetime.now(UTC) - LISTED_FOR

    async def _list(self, credential: Credential) -> None:
        account = credential.account
        token = await self._take_turn(account)
        if token is None:
            return
        started_at, listed_at = datetime.now(UTC), None
        try:
            async with asyncio.timeout(ROUND_SECONDS):
                listed = await self._complete(credential, await self._client.find(credential), started_at)
            try:
                await self._write_down(account, listed, started_at)
            except IntegrityError:  # a voice was written down meanwhile
                await self._write_down(account, listed, started_at)
            listed_at = started_at
        except TimeoutError:
            raise UpstreamTimeout from None
        finally:
            await run_to_end(self._end_turn(account, token, listed_at))

    async def _complete(
        self, credential: Credential, listed: list[VoiceReport], started_at: datetime
    ) -> list[VoiceReport]:
        """Ask for voices that the list lacks, which does not prove them gone, and for models that ids do not tell."""
        voices = {report.voice_id: report for report in listed}
        async with self._database.snapshot() as session:
            known = list(await session.scalars(select(Voice).where(Voice.account == credential.account)))
        strange = {voice_id for voice_id in voices if read_voice_id(voice_id) is None}
        strange -= {voice.voice_id for voice in known if voice.target_model}
        missing = {voice.voice_id for voice in known if voice.deleted_at is None} - voices.keys()
        if len(missing) > QUERIES_PER_ROUND:  # a second list will hardly lack the same by mistake, but for new ones
            new = {voice.voice_id: _report(voice) for voice in known if voice.seen_at > started_at - LAG}
            again = {report.voice_id: report for report in await self._client.find(credential)}
            voices = {voice_id: new[voice_id] for voice_id in missing & new.keys()} | voices | again
            missing = set()
        for voice in (voice for voice in known if voice.voice_id in missing):
            try:
                voices[voice.voice_id] = await self._client.query(credential, voice.voice_id)
            except VoiceNotFound:
                continue
            except AppError:  # whatever it is, it does not prove the voice gone
                voices[voice.voice_id] = _report(voice)
        for voice_id in sorted(strange)[:QUERIES_PER_ROUND]:
            with suppress(AppError):
                voices[voice_id] = await self._client.query(credential, voice_id)
        return list(voices.values())

    async def _take_turn(self, account: str) -> uuid.UUID | None:
        """Wait for the right to list; None when somebody else has listed meanwhile. Raises NotReady after a while."""
        deadline = datetime.now(UTC) + 2 * CLAIM
        token = uuid.uuid4()
        while (now := datetime.now(UTC)) < deadline:
            free = or_(VoiceListing.claimed_until.is_(None), VoiceListing.claimed_until < now)
            stale = or_(VoiceListing.listed_at.is_(None), VoiceListing.listed_at <= now - LISTED_FOR)
            claiming = update(VoiceListing).where(VoiceListing.account == account, free, stale)
            try:
                async with self._database.transaction() as session:
                    listing = await session.get(VoiceListing, account)
                    if listing is None:
                        session.add(VoiceListing(account=account, claimed_by=token, claimed_until=now + CLAIM))
                        return token
                    if listing.listed_at is not None and listing.listed_at > now - LISTED_FOR:
                        return None
                    claimed = claiming.values(claimed_by=token, claimed_until=now + CLAIM)
                    if await session.scalar(claimed.returning(VoiceListing.account)):
                        return token
            except IntegrityError:
                continue
            await asyncio.sleep(OTHERS_ROUND_POLL_SECONDS)
        raise NotReady("音色列表正在刷新，请稍后重试")

    @once_more
    async def _end_turn(self, account: str, token: uuid.UUID, listed_at: datetime | None) -> None:
        mine = update(VoiceListing).where(VoiceListing.account == account, VoiceListing.claimed_by == token)
        values = {"listed_at": listed_at} if listed_at else {}
        async with self._database.transaction() as session:
            await session.execute(mine.values(claimed_by=None, claimed_until=None, **values))

    @once_more
    async def _write_down(self, account: str, listed: list[VoiceReport], started_at: datetime) -> None:
        """Make the book say what the list says, but for what is known better."""
        rows = select(Voice).where(Voice.account == account).order_by(Voice.voice_id).with_for_update()
        async with self._database.transaction() as session:
            known = {voice.voice_id: voice for voice in await session.scalars(rows)}
            news = []
            for report in listed:
                voice = known.pop(report.voice_id, None)
                if voice is None:
                    session.add(_voice(account, report, started_at))
                elif _is_news(report, voice, started_at):
                    _copy(report, voice, started_at)
                else:
                    continue
                news.append(report)
            gone = [voice for voice in known.values() if _is_gone(voice, started_at)]
            for voice in gone:
                await session.delete(voice)
            await _follow(session, news)
            await _retire(session, account, [voice.voice_id for voice in gone if not voice.deleted_at], started_at)


def _voice(account: str, report: VoiceReport, seen_at: datetime) -> Voice:
    model, prefix = read_voice_id(report.voice_id) or (report.target_model or "", "")
    return Voice(
        account=account,
        voice_id=report.voice_id,
        target_model=(report.target_model or model)[:MAX_MODEL_CHARS],
        prefix=prefix[:MAX_PREFIX_CHARS],
        status=report.status,
        created_at=report.created_at,
        modified_at=report.modified_at,
        seen_at=seen_at,
    )


def _report(voice: Voice) -> VoiceReport:
    """What is known of a voice, as the provider would say it."""
    status = cast(VoiceStatus, voice.status)
    return VoiceReport(voice.voice_id, status, voice.created_at, voice.modified_at, voice.target_model)


def _tombstone(account: str, voice_id: str, now: datetime) -> Voice:
    """A voice that we never saw, and deleted."""
    voice = _voice(account, VoiceReport(voice_id, "UNDEPLOYED", now, now), now)
    voice.deleted_at = now
    return voice


def _copy(report: VoiceReport, voice: Voice, seen_at: datetime) -> None:
    voice.target_model = report.target_model or voice.target_model
    voice.status, voice.created_at, voice.modified_at = report.status, report.created_at, report.modified_at
    voice.seen_at, voice.deleted_at = seen_at, None


def _is_news(report: VoiceReport, voice: Voice, listed_at: datetime) -> bool:
    """Whether the list tells more of a voice than we know; it may lag behind."""
    recent = listed_at - LAG
    if voice.deleted_at is not None:
        return voice.deleted_at < recent
    if (report.status, report.modified_at) == (voice.status, voice.modified_at) or voice.seen_at >= listed_at:
        return False
    is_progress = report.modified_at >= voice.modified_at and report.status != "DEPLOYING"
    return voice.seen_at < recent or report.modified_at > voice.modified_at or is_progress


def _is_gone(voice: Voice, listed_at: datetime) -> bool:
    """Whether a voice that the list lacks is to be forgotten; one that was asked for meanwhile was seen since."""
    if voice.deleted_at is not None:
        return voice.deleted_at < listed_at - LAG
    return voice.seen_at < listed_at


async def _follow(session: AsyncSession, reports: Iterable[VoiceReport]) -> None:
    """Let the records of voices' making tell their status, and be followed again while that is not final."""
    by_status: defaultdict[str, list[str]] = defaultdict(list)
    for report in reports:
        by_status[report.status].append(report.voice_id)
    now = datetime.now(UTC)
    for status, voice_ids in by_status.items():
        for some in _in_parts(voice_ids):
            made = update(Enrollment).where(Enrollment.voice_id.in_(some))
            await session.execute(made.where(Enrollment.status != status).values(status=status))
            if status == "DEPLOYING":
                again = made.where(Enrollment.next_check_at.is_(None))
                await session.execute(again.values(followed_since=now, misses=0, next_check_at=now + FOLLOW_AFTER))


async def _retire(session: AsyncSession, account: str | None, voice_ids: list[str], now: datetime) -> None:
    """Have the samples of voices that are gone removed, and nobody follow those. What never was ready never will be."""
    for some in _in_parts(voice_ids):
        made = update(Enrollment).where(Enrollment.voice_id.in_(some))
        samples = update(VoiceSample).where(VoiceSample.voice_id.in_(some))
        if account is not None:
            made, samples = made.where(Enrollment.account == account), samples.where(VoiceSample.account == account)
        await session.execute(made.values(next_check_at=None, claimed_by=None, claimed_until=None))
        await session.execute(made.where(Enrollment.status == "DEPLOYING").values(status="UNDEPLOYED"))
        await session.execute(samples.values(remove_at=now))


def _in_parts(voice_ids: list[str]) -> Iterator[list[str]]:
    """As many as one statement names."""
    for start in range(0, len(voice_ids), VOICES_AT_ONCE):
        yield voice_ids[start : start + VOICES_AT_ONCE]
