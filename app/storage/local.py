"""Audio as files of this machine, served under `/media/` by the backend itself."""

import os
import shutil
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import BinaryIO, ClassVar

import anyio
import structlog
from anyio import to_thread

from app.completion import run_to_end
from app.errors import ObjectNotFound, StorageError
from app.metrics import HeldAudio
from app.probes import storage_call
from app.storage.keys import check_key, is_key
from app.storage.links import MediaLinks
from app.storage.room import free_bytes, storage_full
from app.timing import measure

CHUNK_BYTES = 256 * 1024

log = structlog.get_logger(__name__)


class LocalStorage:
    """Files under one folder, which nothing leaves: neither by a key nor by a symbolic link."""

    fetchable: ClassVar[bool] = False

    def __init__(self, folder: Path, public_base_url: str) -> None:
        self._folder = folder.resolve()
        self._links = MediaLinks(public_base_url)

    async def put(self, key: str, source: BinaryIO, *, content_type: str) -> None:
        """Store the source; a file's type follows from its extension, so `content_type` is not kept."""
        check_key(key)
        try:
            with storage_call("put"):
                await run_to_end(to_thread.run_sync(self._write, key, source))
        except OSError as error:
            raise _failed("音频保存失败", key, error) from error

    async def keep(self, key: str, source: BinaryIO, *, content_type: str) -> None:
        """Store what was paid for: this disk is all there is."""
        await self.put(key, source, content_type=content_type)

    def require_room(self, size: int = 0) -> None:
        """Refuse new speech while the disk is all but full."""
        try:
            has_room = free_bytes(self._folder) > size
        except OSError:
            has_room = False
        if not has_room:
            raise storage_full()

    async def check(self) -> None:
        """Look into the folder, and at the room there is."""
        with suppress(ObjectNotFound):
            async with self.open(f"health/{uuid.uuid4()}"):
                pass
        self.require_room()

    def is_fetchable(self, key: str) -> bool:
        """No file of this machine can be relied on to be reached by others than our clients."""
        return False

    def admits(self, key: str, query: str) -> bool:
        """Whoever knows the name of a file may play it."""
        return self._links.admits(key, query)

    def grants(self, url: str) -> bool:
        """Whether a URL is an address of the media route."""
        return self._links.grants(url)

    def held(self) -> HeldAudio:
        """Nothing ever waits here to be brought elsewhere."""
        return HeldAudio()

    async def run(self) -> None:
        """There is nothing to bring elsewhere."""

    def url(self, key: str) -> str:
        """Give the address that the media route answers."""
        return self._links.url(key)

    def key_of(self, url: str) -> str | None:
        """Recognise an address of the media route."""
        return self._links.key_of(url)

    @asynccontextmanager
    async def open(self, key: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """Open a file as a stream of chunks."""
        try:
            with storage_call("open"):
                file = await open_file(await to_thread.run_sync(self.path, key))
        except FileNotFoundError:
            raise ObjectNotFound from None
        except OSError as error:
            raise _failed("音频读取失败", key, error) from error
        async with file, aclosing(read_chunks(key, file)) as chunks:
            yield chunks

    async def delete(self, key: str) -> None:
        """Remove a file; its folder stays."""
        check_key(key)
        try:
            with storage_call("delete"):
                await to_thread.run_sync(self._remove, key)
        except OSError as error:
            raise _failed("音频删除失败", key, error) from error

    async def get_ready(self) -> None:
        """A disk always is."""

    async def close(self) -> None:
        """Nothing is kept open between calls."""

    def path(self, key: str) -> Path:
        """Find the file behind a key. It touches the disk: call it in a thread.

        Raises ObjectNotFound when there is none, or when it lies outside the folder.
        """
        if is_key(key):
            # OSError: absent, or a name too long for the file system; RuntimeError: links in a circle.
            with suppress(OSError, RuntimeError):
                path = (self._folder / key).resolve(strict=True)
                if path.is_relative_to(self._folder) and path.is_file():
                    return path
        raise ObjectNotFound

    def _place(self, key: str) -> Path:
        """Where the object's own name is or will be; links among its folders must not lead outside."""
        path = self._folder / key
        folder = path.parent.resolve()
        if not folder.is_relative_to(self._folder):
            raise PermissionError("a symbolic link leads out of the media folder")
        return folder / path.name

    def _write(self, key: str, source: BinaryIO) -> None:
        place = self._place(key)
        draft = place.with_name(f"~{uuid.uuid4().hex}")  # no key contains a tilde: drafts cannot be asked for
        try:
            file = draft.open("xb")
        except FileNotFoundError:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            file = draft.open("xb")
        try:
            with file:
                source.seek(0)
                shutil.copyfileobj(source, file, CHUNK_BYTES)
                file.flush()
                os.fsync(file.fileno())  # else a power cut can leave the name in place of an empty file
            draft.replace(place)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise

    def _remove(self, key: str) -> None:
        with suppress(FileNotFoundError, NotADirectoryError):
            self._place(key).unlink()


async def open_file(path: Path) -> anyio.AsyncFile[bytes]:
    """Open a file; who is cancelled meanwhile leaves none open."""
    opened: list[BinaryIO] = []
    try:
        await run_to_end(to_thread.run_sync(lambda: opened.append(path.open("rb"))))
    except BaseException:
        for file in opened:
            file.close()
        raise
    return anyio.wrap_file(opened[0])


async def read_chunks(key: str, file: anyio.AsyncFile[bytes]) -> AsyncGenerator[bytes, None]:
    """Read a file of this machine that holds an object. Raises StorageError."""
    try:
        while True:
            with measure("storage"):
                chunk = await file.read(CHUNK_BYTES)
            if not chunk:
                return
            yield chunk
    except OSError as error:
        raise _failed("音频读取失败", key, error) from error


def _failed(what: str, key: str, error: OSError) -> StorageError:
    log.error("media_failed", key=key, error=error.strerror or str(error))
    return StorageError(f"{what}，请管理员检查服务器的磁盘空间和数据目录权限")
