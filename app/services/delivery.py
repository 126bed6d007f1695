"""The way of a user's audio to the provider: by the user's URL, inside the request, by our store, or by an upload."""

import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import BinaryIO

import structlog
from anyio import CapacityLimiter, to_thread
from sqlalchemy import select

from app.audio import CONTENT_TYPES
from app.dashscope import MAX_DATA_URI_BYTES, Credential, InlineAudio, UploadClient
from app.database import Database
from app.errors import AudioTooLarge, InvalidAudio, ObjectNotFound, StorageError
from app.inflight import InFlight
from app.models import Record
from app.recordings import RECOGNIZABLE, Recording, probe
from app.services.removals import remove_later
from app.services.spool import Spool
from app.settings import Settings
from app.storage import Storage, day_of, is_private
from app.urls import require_public_url

log = structlog.get_logger(__name__)

MEGABYTE = 1024 * 1024
MAX_AUDIO_BYTES = 10 * MEGABYTE  # of one synchronous recognition (PROTOCOL §4.1)
MAX_FILE_BYTES = 2048 * MEGABYTE  # of one transcription (PROTOCOL §5.1)
A_DAY = timedelta(days=1)
# When audio that lies in the store for the provider alone is removed at the latest, whatever becomes of this process.
LENT_FOR = A_DAY
# Each probe decodes: more at once would only take memory, and the cores from everybody else.
PROBES_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class AudioUrl:
    """Audio that the user names by URL, in the field of this name."""

    url: str
    field: str

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True, slots=True)
class AudioFile:
    """Audio that the user sent: as a file with a name, or encoded in the request without one."""

    source: BinaryIO
    name: str | None

    def close(self) -> None:
        """Let the file go."""
        self.source.close()


@dataclass(frozen=True, slots=True)
class StoredAudio:
    """Audio in our own store, named by a URL in the field of this name."""

    key: str
    field: str


@dataclass(frozen=True, slots=True)
class HeldAudio:
    """Audio that is here and fit to be sent. How long it is, is known where it was measured."""

    source: BinaryIO
    size: int
    container: str
    content_type: str
    duration_ms: int | None


class AudioDelivery:
    """Checks audio before anything is paid, and brings it to where the provider can read it."""

    def __init__(
        self, settings: Settings, database: Database, storage: Storage, uploads: UploadClient, in_flight: InFlight
    ) -> None:
        self._in_flight = in_flight
        self._settings = settings
        self._database = database
        self._storage = storage
        self._uploads = uploads
        self._probing = CapacityLimiter(PROBES_AT_ONCE)

    @asynccontextmanager
    async def admitted(
        self, user_id: uuid.UUID, audio: AudioUrl | AudioFile, max_bytes: int, max_ms: int | None
    ) -> AsyncIterator[HeldAudio | str]:
        """Look at the audio: a URL that the provider may fetch unread, or audio that is fit to be sent.

        Audio is measured where `max_ms` limits it. Raises InvalidRequest for a URL that may not be passed on,
        InvalidAudio, AudioTooLarge or AudioTooLong.
        """
        async with AsyncExitStack() as held:
            if isinstance(audio, AudioFile):
                yield await self._look_at(audio.source, max_bytes, max_ms)
                return
            found = await self.locate(user_id, audio)
            if isinstance(found, str):
                yield found
            elif self._storage.is_fetchable(found.key):
                yield self._storage.url(found.key)
            else:
                spool = await held.enter_async_context(Spool())
                await self.fetch(found, spool, max_bytes)
                if max_ms is None:
                    yield _trusted(found.key, spool)
                else:
                    yield await self._look_at(spool.file, max_bytes, max_ms)

    async def locate(self, user_id: uuid.UUID, audio: AudioUrl) -> StoredAudio | str:
        """Find out where a URL leads: to audio of our own store that the user may use, or elsewhere.

        Gives a URL as it may be passed on. Raises InvalidRequest for one that may not, and InvalidAudio for a recorded
        voice, which is nobody's to use.
        """
        key = self._storage.key_of(audio.url)
        if key is None:
            return require_public_url(audio.url, audio.field)
        if is_private(key):
            raise _absent(audio.field)
        # Reading with our own rights is for the owner, and for whoever may play it through us. Others pass on whatever
        # right their URL carries.
        if self._storage.fetchable and not self._storage.grants(audio.url) and not await self._owns(user_id, key):
            return audio.url
        return StoredAudio(key, audio.field)

    async def fetch(self, stored: StoredAudio, spool: Spool, max_bytes: int) -> None:
        """Read audio from our store. Raises InvalidAudio for what is not there, AudioTooLarge or StorageError."""
        try:
            async with self._storage.open(stored.key) as chunks:
                async for chunk in chunks:
                    await spool.write(chunk)
                    if spool.size > max_bytes:
                        raise _too_large(max_bytes)
        except ObjectNotFound:
            raise _absent(stored.field) from None

    def inline(self, audio: HeldAudio | str) -> InlineAudio | None:
        """The audio as part of the request, if it is here and small enough."""
        if isinstance(audio, str):
            return None
        within = InlineAudio(audio.source, audio.size, audio.content_type)
        return within if within.encoded_size <= MAX_DATA_URI_BYTES else None

    @asynccontextmanager
    async def addressed(
        self, credential: Credential, model: str, audio: HeldAudio | str, *, fetched_later: bool = False
    ) -> AsyncIterator[str]:
        """The audio's address for the provider, for as long as the block lasts; for a day if it is `fetched_later`.

        Raises the AppError of a failure; nothing is paid then.
        """
        if isinstance(audio, str):
            yield audio
        elif self._storage.fetchable:
            today = datetime.now(self._settings.zone).strftime("%Y%m%d")
            key = f"audio/asr/{today}/{uuid.uuid4()}.{audio.container}"
            async with self._database.transaction() as session:
                remove_later(session, [key], after=LENT_FOR)
            await self._storage.put(key, audio.source, content_type=audio.content_type)
            try:
                yield self._storage.url(key)
            finally:
                if not fetched_later:
                    self._in_flight.start(self._forget(key))
        else:
            name = f"{uuid.uuid4()}.{audio.container}"
            yield await self._uploads.upload(credential, model, audio.source, audio.size, name, audio.content_type)

    async def _look_at(self, source: BinaryIO, max_bytes: int, max_ms: int | None) -> HeldAudio:
        size = await to_thread.run_sync(source.seek, 0, 2)
        if size > max_bytes:
            raise _too_large(max_bytes)
        if size == 0:
            raise InvalidAudio("音频内容为空，请检查上传的文件")

        def look() -> Recording:
            source.seek(0)
            return probe(source, containers=RECOGNIZABLE, max_ms=max_ms)

        heard = await to_thread.run_sync(look, limiter=self._probing)
        return HeldAudio(source, size, heard.container, heard.content_type, heard.duration_ms)

    async def _owns(self, user_id: uuid.UUID, key: str) -> bool:
        owned = select(Record.id).where(Record.user_id == user_id, Record.output_key == key).limit(1)
        if (day := day_of(key)) is not None:  # of somebody's million records, only those are looked at
            owned = owned.where(Record.created_at >= day - A_DAY, Record.created_at < day + 2 * A_DAY)
        async with self._database.snapshot() as session:
            return await session.scalar(owned) is not None

    async def _forget(self, key: str) -> None:
        try:
            await self._storage.delete(key)
        except StorageError:
            log.warning("audio_not_removed", key=key)


def _trusted(key: str, spool: Spool) -> HeldAudio:
    """Audio that we stored ourselves, of any length, so that its name tells what it is. Raises InvalidAudio for PCM."""
    container = key.rpartition(".")[2]
    content_type = {str(format): kind for format, kind in CONTENT_TYPES.items()}.get(container)
    if content_type is None or container not in RECOGNIZABLE:
        raise InvalidAudio(f"{container} 格式的音频无法转写，请使用 mp3、wav 或 opus")
    return HeldAudio(spool.file, spool.size, container, content_type, None)


def _absent(field: str) -> InvalidAudio:
    return InvalidAudio(f"{field} 指向的音频文件不存在，请检查 URL")


def _too_large(max_bytes: int) -> AudioTooLarge:
    return AudioTooLarge(f"音频文件过大，不能超过 {max_bytes // MEGABYTE} MB")
