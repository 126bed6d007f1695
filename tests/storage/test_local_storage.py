"""Files of this machine: no half-written object, no way out of the folder."""

import asyncio
import io
import os
import stat
from pathlib import Path

import anyio
import pytest

from app.errors import ObjectNotFound, StorageError
from app.storage import LocalStorage
from app.storage.local import open_file

KEY = "audio/tts/a.mp3"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "media"


class BrokenSource(io.BytesIO):
    """Fails in the middle, as a vanished disk does."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() > 0:
            raise OSError(5, "input/output error")
        return super().read(10)


class SlowSource(io.BytesIO):
    """Takes long enough for its reader to be cancelled."""

    def __init__(self, content: bytes, reading: anyio.Event) -> None:
        super().__init__(content)
        self._reading = reading

    def read(self, size: int | None = -1, /) -> bytes:
        anyio.from_thread.run_sync(self._reading.set)
        return super().read(size)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def mode(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


@pytest.fixture
def outside(folder: Path, tmp_path: Path) -> Path:
    """A folder next to the media folder, which links lead to."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.mp3").write_bytes(b"secret")
    folder.mkdir(parents=True)
    (folder / "folder").symlink_to(outside)
    (folder / "file.mp3").symlink_to(outside / "secret.mp3")
    (folder / "circle.mp3").symlink_to(folder / "circle.mp3")
    return outside


async def test_the_folder_is_private_and_made_on_demand(local: LocalStorage, folder: Path) -> None:
    await local.put(KEY, io.BytesIO(b"x"), content_type="audio/mpeg")

    assert mode(folder) == 0o700
    assert files(folder) == ["a.mp3"]


async def test_a_failed_put_leaves_the_old_object_and_no_draft(local: LocalStorage, folder: Path) -> None:
    await local.put(KEY, io.BytesIO(b"old"), content_type="audio/mpeg")

    with pytest.raises(StorageError) as failure:
        await local.put(KEY, BrokenSource(b"new" * 100), content_type="audio/mpeg")

    assert str(folder) not in failure.value.message
    assert local.path(KEY).read_bytes() == b"old"
    assert files(folder) == ["a.mp3"]


async def test_a_cancelled_put_stores_the_whole_object(local: LocalStorage, folder: Path) -> None:
    reading = anyio.Event()
    source = SlowSource(b"x" * 1_000_000, reading)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: local.put(KEY, source, content_type="audio/mpeg"))
        await reading.wait()
        tasks.cancel_scope.cancel()

    assert files(folder) == ["a.mp3"]
    assert local.path(KEY).read_bytes() == source.getvalue()


async def test_a_name_in_the_way_is_a_storage_error(local: LocalStorage, folder: Path) -> None:
    await local.put("audio/a", io.BytesIO(b"x"), content_type="audio/mpeg")

    with pytest.raises(StorageError):
        await local.put("audio/a/b.mp3", io.BytesIO(b"x"), content_type="audio/mpeg")
    with pytest.raises(StorageError):
        await local.put("audio", io.BytesIO(b"x"), content_type="audio/mpeg")

    assert files(folder) == ["a"]


async def test_a_name_too_long_for_the_disk_fails_cleanly(local: LocalStorage) -> None:
    key = "audio/" + "a" * 300

    with pytest.raises(StorageError):
        await local.put(key, io.BytesIO(b"x"), content_type="audio/mpeg")
    with pytest.raises(ObjectNotFound):
        local.path(key)


async def test_links_lead_nowhere_outside(local: LocalStorage, outside: Path) -> None:
    for key in ("folder/secret.mp3", "file.mp3", "circle.mp3", "folder"):
        with pytest.raises(ObjectNotFound):
            local.path(key)
    for key in ("folder/secret.mp3", "folder/new/b.mp3"):
        with pytest.raises(StorageError):
            await local.put(key, io.BytesIO(b"x"), content_type="audio/mpeg")
        with pytest.raises(StorageError):
            await local.delete(key)
    await local.put("file.mp3", io.BytesIO(b"mine"), content_type="audio/mpeg")

    assert (outside / "secret.mp3").read_bytes() == b"secret"
    assert local.path("file.mp3").read_bytes() == b"mine"
    assert files(outside) == ["secret.mp3"]


async def test_a_folder_is_not_an_object(local: LocalStorage) -> None:
    await local.put(KEY, io.BytesIO(b"x"), content_type="audio/mpeg")

    with pytest.raises(ObjectNotFound):
        local.path("audio/tts")
    with pytest.raises(StorageError):
        await local.delete("audio/tts")
    await local.delete(KEY + "/below")


async def test_who_is_cancelled_while_a_file_is_opened_leaves_none_open(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")  # which is open for reading once it is open for writing
    opening = asyncio.create_task(open_file(pipe))
    await asyncio.sleep(0.05)
    opening.cancel()
    await asyncio.sleep(0.05)
    assert not opening.done()
    writer = await anyio.to_thread.run_sync(os.open, pipe, os.O_WRONLY)
    with pytest.raises(asyncio.CancelledError):
        await opening
    with pytest.raises(BrokenPipeError):
        os.write(writer, b"nobody reads")
    os.close(writer)
