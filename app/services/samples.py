"""Recorded voices: judged before anything is made of them, kept where nobody hears them, removed with their voices."""

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import BinaryIO

import structlog
from anyio import to_thread
from sqlalchemy import Executable, delete, select, update

from app.dashscope import ENROLLMENT, Credential, UploadClient
from app.database import UNAVAILABLE, Database, once_more
from app.errors import StorageError
from app.models import VoiceSample
from app.samples import MAX_BYTES, Sample, examine_sample
from app.services.accounts import require_active
from app.services.delivery import AudioDelivery, AudioFile, AudioUrl
from app.services.spool import Spool
from app.settings import Settings
from app.storage import Storage

log = structlog.get_logger(__name__)

# How long a sample stays while it is not known whether there is a voice of it: longer than a lost voice is looked for.
UNDECIDED = timedelta(days=2)
AGAIN = timedelta(minutes=10)
ROUND_SECONDS = 30.0
REMOVED_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class HeldSample:
    """A sample that is here, and fit."""

    source: BinaryIO
    size: int
    digest: str
    sample: Sample


@dataclass(frozen=True, slots=True)
class PlacedSample:
    """A sample where the provider can read it; of one that we keep, its key in our store."""

    url: str
    key: str | None


class SampleService:
    """Brings samples to the provider, and looks after those that we keep."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        storage: Storage,
        delivery: AudioDelivery,
        uploads: UploadClient,
    ) -> None:
        self._settings = settings
        self._database = database
        self._storage = storage
        self._delivery = delivery
        self._uploads = uploads
        self._awake = asyncio.Event()

    @asynccontextmanager
    async def admitted(self, user_id: uuid.UUID, audio: AudioUrl | AudioFile) -> AsyncIterator[HeldSample | str]:
        """Look at a sample: a URL that the provider may fetch unread, or audio that is fit to be cloned.

        Raises InvalidRequest for a URL that may not be passed on, and InvalidAudio for what is not fit.
        """
        async with AsyncExitStack() as held:
            if isinstance(audio, AudioFile):
                yield await _examined(audio.source)
                return
            found = await self._delivery.locate(user_id, audio)
            if isinstance(found, str):
                yield found
                return
            spool = await held.enter_async_context(Spool())
            await self._delivery.fetch(found, spool, MAX_BYTES)
            yield await _examined(spool.file)

    async def place(
        self, user_id: uuid.UUID, credential: Credential, sample: HeldSample | str, record_id: int | None = None
    ) -> PlacedSample:
        """Keep a sample in our store, privately, and give it to the provider by an address that soon ends.

        It is removed before long unless it is kept for a voice. Raises the AppError of a failure.
        """
        if isinstance(sample, str):
            return PlacedSample(sample, None)
        now = datetime.now(UTC)
        today = now.astimezone(self._settings.zone).strftime("%Y%m%d")
        key = f"audio/voice/{today}/{uuid.uuid4()}.{sample.sample.container}"
        row = VoiceSample(
            key=key,
            user_id=user_id,
            record_id=record_id,
            account=credential.account,
            remove_at=now + UNDECIDED,
        )
        async with self._database.transaction() as session:
            await (await session.connection()).run_sync(require_active, user_id)
            session.add(row)
        content_type = sample.sample.content_type
        await self._storage.put(key, sample.source, content_type=content_type)
        if self._storage.is_fetchable(key):
            return PlacedSample(self._storage.url(key), key)
        name = f"{uuid.uuid4()}.{sample.sample.container}"
        url = await self._uploads.upload(credential, ENROLLMENT, sample.source, sample.size, name, content_type)
        return PlacedSample(url, key)

    @once_more
    async def keep(self, placed: PlacedSample, account: str, voice_id: str) -> None:
        """Keep a sample as that of a voice, in place of what it was made of before."""
        former = update(VoiceSample).where(VoiceSample.voice_id == voice_id)
        async with self._database.transaction() as session:
            await session.execute(former.values(remove_at=datetime.now(UTC)))
            if placed.key:
                mine = update(VoiceSample).where(VoiceSample.key == placed.key)
                await session.execute(mine.values(account=account, voice_id=voice_id, remove_at=None))
        self.wake()

    async def discard(self, placed: PlacedSample) -> None:
        """Have a sample removed of which there is no voice."""
        if placed.key:
            discarding = update(VoiceSample).where(VoiceSample.key == placed.key)
            async with self._database.transaction() as session:
                await session.execute(discarding.values(remove_at=datetime.now(UTC)))
            self.wake()

    def wake(self) -> None:
        """Have what is to be removed removed now."""
        self._awake.set()

    async def run(self) -> None:
        """Until cancelled: remove samples whose time is over."""
        while True:
            self._awake.clear()
            try:
                await self._remove_due()
            except Exception as error:
                # Whatever it was, the next round must come.
                unexpected = not isinstance(error, UNAVAILABLE)
                log.warning("samples_not_removed", error=type(error).__name__, exc_info=unexpected)
            try:
                async with asyncio.timeout(ROUND_SECONDS):
                    await self._awake.wait()
            except TimeoutError:
                continue

    async def _remove_due(self) -> None:
        due = select(VoiceSample.key).where(VoiceSample.remove_at <= datetime.now(UTC)).limit(REMOVED_AT_ONCE)
        async with self._database.snapshot() as session:
            keys = list(await session.scalars(due))
        for key in keys:
            same = VoiceSample.key == key
            removed: Executable = delete(VoiceSample).where(same)
            try:
                await self._storage.delete(key)
            except StorageError:
                log.warning("sample_not_removed", key=key)
                removed = update(VoiceSample).where(same).values(remove_at=datetime.now(UTC) + AGAIN)
            async with self._database.transaction() as session:
                await session.execute(removed)


async def _examined(source: BinaryIO) -> HeldSample:
    sample = await examine_sample(source)

    def measure() -> tuple[int, str]:
        source.seek(0)
        digest = hashlib.file_digest(source, "sha256").hexdigest()  # type: ignore[arg-type]
        return source.tell(), digest

    size, digest = await to_thread.run_sync(measure)
    return HeldSample(source, size, digest, sample)
