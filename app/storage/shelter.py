"""A store with a roof in front of it: what was paid for stays on this machine's disk while the store cannot take it.

The first failure makes the store known to be away. From then on nobody waits for it: what is kept goes to the disk at
once, until one of the uploads that are tried from time to time gets through.
"""

import random
import time
import uuid
from asyncio import create_task, wait
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import BinaryIO, ClassVar, cast

import anyio
import structlog
from anyio import to_thread

from app.completion import end_by_cancelling, run_to_end
from app.errors import ObjectNotFound, StorageError, StorageFull
from app.metrics import HELD_AUDIO_PUT_OFF, HeldAudio
from app.probes import storage_call
from app.storage.held import HeldFile, HeldFolder
from app.storage.keys import check_key, is_key
from app.storage.links import MediaLinks
from app.storage.local import open_file, read_chunks
from app.storage.room import storage_full
from app.storage.store import Store

# How long the store may take nothing more of an upload, or not answer, before it is known to be away.
PATIENCE_SECONDS = 5.0
# Shorter than any monitor's.
CHECK_SECONDS = 2.0
ROUND_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0

log = structlog.get_logger(__name__)


class ShelteredStorage:
    """Objects of a store, and those that this machine holds until the store takes them."""

    fetchable: ClassVar[bool] = True

    def __init__(self, store: Store, folder: Path, links: MediaLinks, max_bytes: int) -> None:
        """Go on with what lies in the folder, which all processes of the machine share. It touches the disk."""
        self._store = store
        self._links = links
        self._folder = HeldFolder(folder, max_bytes)
        self._failures: dict[str, int] = {}
        self._put_off = 0
        self._away_since = time.monotonic() if self._folder.files() else None

    async def put(self, key: str, source: BinaryIO, *, content_type: str) -> None:
        """Store what was not paid for yet: in the store or not at all."""
        await self._store.put(key, source, content_type=content_type)

    async def keep(self, key: str, source: BinaryIO, *, content_type: str) -> None:
        """Store what was paid for, here while the store is away."""
        check_key(key)
        is_held = await to_thread.run_sync(self._folder.holds, key)
        # An older version that is still held would follow a newer one into the store, and replace it there.
        may_bypass = not is_held
        if may_bypass and self._away_since is None:
            try:
                await self._bring(key, source, content_type)
                return
            except StorageError:
                may_bypass = False
        try:
            with storage_call("hold"):
                await run_to_end(to_thread.run_sync(self._folder.write, key, source, content_type))
        except (StorageFull, OSError) as error:
            log.error("not_held", key=key, error=type(error).__name__)  # noqa: TRY400 - the disk is full, no bug
            if not may_bypass:
                raise StorageError("音频保存失败，请管理员检查对象存储与服务器的磁盘空间") from error
            await self._bring(key, source, content_type)
        else:
            self._put_off += 1
            HELD_AUDIO_PUT_OFF.inc()

    def require_room(self, size: int = 0) -> None:
        """Refuse new speech while the store is away and the disk would not take it either."""
        if self._away_since is not None and not self._folder.has_room_for(size):
            raise storage_full()

    async def check(self) -> None:
        """Ask the store whether it is there; if not, there must be room here."""
        if self._away_since is None:
            await self._ask()
        self.require_room()

    def is_fetchable(self, key: str) -> bool:
        """Whether the object is in the store, as far as this machine knows."""
        return not self._folder.holds(key)

    def url(self, key: str) -> str:
        """Give the address in the store, or that of the media route for what this machine holds."""
        check_key(key)
        return self._links.url(key) if self._folder.holds(key) else self._store.url(key)

    def key_of(self, url: str) -> str | None:
        """Recognise an address of the store, and one that was given out while the object was held."""
        return self._store.key_of(url) or self._links.key_of(url)

    def admits(self, key: str, query: str) -> bool:
        """Whether the query is signed, if the store's addresses are."""
        return self._links.admits(key, query)

    def grants(self, url: str) -> bool:
        """Whether a URL is an address of the media route, and signed if need be."""
        return self._links.grants(url)

    def path(self, key: str) -> Path:
        """Find the file of an object that is held."""
        path = self._folder.path(key) if is_key(key) else None
        if path is None:
            raise ObjectNotFound
        return path

    @asynccontextmanager
    async def open(self, key: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """Open an object where it is: here, or in the store."""
        file: anyio.AsyncFile[bytes] | None = None
        with suppress(ObjectNotFound, FileNotFoundError):
            file = await open_file(await to_thread.run_sync(self.path, key))
        if file is None:
            async with self._store.open(key) as chunks:
                yield chunks
        else:
            async with file, aclosing(read_chunks(key, file)) as chunks:
                yield chunks

    async def delete(self, key: str) -> None:
        """Remove an object here, and in the store. One that is away is not waited for: StorageError tells so."""
        check_key(key)
        try:
            await run_to_end(to_thread.run_sync(self._folder.remove, key))
        except OSError as error:
            raise StorageError("音频删除失败，请管理员检查服务器的磁盘") from error
        if self._away_since is not None:
            raise StorageError("对象存储暂时不可用，稍后会再次删除")
        with anyio.move_on_after(PATIENCE_SECONDS) as patience:
            try:
                await self._store.delete(key)
            except StorageError:
                self._note_absence()
                raise
        if patience.cancelled_caught:
            self._note_absence()
            raise StorageError

    def held(self) -> HeldAudio:
        """Count what lies here, whichever process put it there."""
        files = self._folder.files()
        oldest_seconds = max(0.0, time.time() - files[0].since) if files else 0.0
        return HeldAudio(len(files), sum(each.size for each in files), oldest_seconds, self._put_off)

    async def run(self) -> None:
        """Until cancelled: bring to the store what lies here, the oldest first."""
        failures = 0
        while True:
            try:
                failures = 0 if await self._go_round() else failures + 1
            except Exception as error:
                # Whatever it was, the next round must come.
                failures += 1
                log.warning("held_round_failed", error=type(error).__name__, exc_info=not isinstance(error, OSError))
            longest = min(LONGEST_PAUSE_SECONDS, ROUND_SECONDS * 2 ** min(failures, 10))
            await anyio.sleep(random.uniform(longest / 2, longest))  # noqa: S311 - spreads load, hides nothing

    async def get_ready(self) -> None:
        """Connect to the store, unless it is known to be away."""
        if self._away_since is None:
            await self._store.get_ready()

    async def close(self) -> None:
        """Let go of the store. What is held stays for the next start."""
        await self._store.close()

    async def _bring(self, key: str, source: BinaryIO, content_type: str) -> None:
        """Upload, for as long as the store takes something. Raises StorageError; it is known to be away then."""
        progress = _Progress(source)
        upload = create_task(self._store.put(key, cast(BinaryIO, progress), content_type=content_type))
        try:
            while not upload.done() and progress.patience_seconds > 0:
                await wait([upload], timeout=progress.patience_seconds)
        finally:
            await end_by_cancelling(upload)
            failure = StorageError("对象存储没有响应，请稍后重试") if upload.cancelled() else upload.exception()
        if isinstance(failure, StorageError):
            self._note_absence()
        if failure is not None:
            raise failure

    async def _go_round(self) -> bool:
        """Bring to the store what it takes. False if it takes nothing, or not all."""
        files = await to_thread.run_sync(self._folder.files)
        self._failures = {each.name: self._failures.get(each.name, 0) for each in files}
        await to_thread.run_sync(self._folder.tidy)
        if not files:
            return self._away_since is None or await self._ask()
        turn = await to_thread.run_sync(self._folder.take_turn)
        if turn is None:
            return True
        with turn:
            # What the store refused before must not keep it from the rest.
            for file in sorted(files, key=lambda each: self._failures[each.name]):
                if not await self._upload(file):
                    return False
        return True

    async def _upload(self, file: HeldFile) -> bool:
        """Bring one object to the store. False if it could not be."""
        key = None
        try:
            held = await to_thread.run_sync(self._folder.take, file.name)
            if held is None:
                return True
            with held.content:
                key = held.key
                await self._bring(key, held.content, held.content_type)
                self._note_presence()
                is_wanted = await run_to_end(to_thread.run_sync(self._folder.release, held))
        except (StorageError, OSError, ValueError) as error:
            self._failures[file.name] += 1
            log.warning("held_upload_failed", key=key, tries=self._failures[file.name], error=type(error).__name__)
            return False
        log.info("held_uploaded", key=key)
        if not is_wanted:
            with suppress(StorageError):
                await self._store.delete(key)
        return True

    async def _ask(self) -> bool:
        """See whether the store is there: it is, if it can say of an object that it has none."""
        with anyio.move_on_after(CHECK_SECONDS), suppress(StorageError):
            try:
                async with self._store.open(f"health/{uuid.uuid4()}"):
                    pass
            except ObjectNotFound:
                self._note_presence()
                return True
        self._note_absence()
        return False

    def _note_absence(self) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
            log.warning("store_away")

    def _note_presence(self) -> None:
        if self._away_since is not None:
            log.warning("store_back", seconds=round(time.monotonic() - self._away_since, 1))
            self._away_since = None


class _Progress:
    """A source that knows how long nothing more was read of it."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._moved_at = time.monotonic()

    @property
    def patience_seconds(self) -> float:
        """How long the reader may still wait."""
        return self._moved_at + PATIENCE_SECONDS - time.monotonic()

    def read(self, size: int = -1) -> bytes:
        self._moved_at = time.monotonic()
        return self._source.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._source.seek(offset, whence)

    def tell(self) -> int:
        return self._source.tell()
