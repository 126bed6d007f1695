"""What was paid for, while the store is away: on this machine's disk, and in the store soon after it is back."""

import asyncio
import io
import os
import stat
import time
from collections import namedtuple
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO, ClassVar

import httpx
import pytest
from anyio import to_thread

from app.completion import end_by_cancelling
from app.errors import ObjectNotFound, StorageError, StorageFull
from app.storage import LocalStorage, Storage, room, shelter
from app.storage.held import HeldFolder
from app.storage.links import MediaLinks
from app.storage.oss import OssStorage
from app.storage.shelter import ShelteredStorage
from tests.storage.oss_server import OssServer, busy

KEY = "audio/tts/20251230/a.mp3"
OTHER_KEY = "audio/tts/20251230/b.mp3"
WORK_KEY = "audio/work/1-0.pcm"
MEDIA = "http://media.test"
STORE = "http://store.test"


class FakeStore:
    """Objects in memory; `away` refuses everything, `hold` makes uploads wait after they have read all."""

    fetchable: ClassVar[bool] = True

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, str]] = {}
        self.tries: list[str] = []
        self.away = False
        self.refused: set[str] = set()
        self.hold: asyncio.Event | None = None
        self.read_seconds = 0.0

    async def put(self, key: str, source: BinaryIO, *, content_type: str) -> None:
        self.tries.append(key)
        self._answer(key)
        source.seek(0)
        content = b""
        while chunk := source.read(1000):
            content += chunk
            if self.read_seconds:
                await asyncio.sleep(self.read_seconds)
        if self.hold:
            await self.hold.wait()
        self.objects[key] = content, content_type

    async def get_ready(self) -> None:
        self.tries.append("ready")

    def url(self, key: str) -> str:
        return f"{STORE}/{key}"

    def key_of(self, url: str) -> str | None:
        return url.removeprefix(f"{STORE}/") if url.startswith(STORE) else None

    @asynccontextmanager
    async def open(self, key: str) -> AsyncIterator[AsyncIterator[bytes]]:
        self._answer(key)
        if key not in self.objects:
            raise ObjectNotFound

        async def chunks() -> AsyncIterator[bytes]:
            yield self.objects[key][0]

        yield chunks()

    async def delete(self, key: str) -> None:
        self.tries.append(key)
        self._answer(key)
        self.objects.pop(key, None)

    async def close(self) -> None:
        pass

    def _answer(self, key: str) -> None:
        if self.away or key in self.refused:
            raise StorageError


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "held"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelter, "ROUND_SECONDS", 0.02)
    monkeypatch.setattr(shelter, "LONGEST_PAUSE_SECONDS", 0.05)


def build(
    store: FakeStore | OssStorage, folder: Path, secret: str | None = None, max_bytes: int = 1_000_000
) -> Storage:
    return ShelteredStorage(store, folder, MediaLinks(MEDIA, (secret,) if secret else ()), max_bytes)


@pytest.fixture
def storage(store: FakeStore, folder: Path) -> Storage:
    return build(store, folder)


@asynccontextmanager
async def running(*storages: Storage) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(each.run()) for each in storages]
    yield
    for task in tasks:
        await end_by_cancelling(task)


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not happened():
            await asyncio.sleep(0.01)


async def keep(storage: Storage, key: str = KEY, content: bytes = b"speech") -> None:
    await storage.keep(key, io.BytesIO(content), content_type="audio/mpeg")


async def read(storage: Storage, key: str = KEY) -> bytes:
    async with storage.open(key) as chunks:
        return b"".join([chunk async for chunk in chunks])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("[!.]*")}


async def test_a_store_that_is_there_takes_what_is_kept(storage: Storage, store: FakeStore, folder: Path) -> None:
    await keep(storage)

    assert store.objects == {KEY: (b"speech", "audio/mpeg")}
    assert storage.url(KEY) == f"{STORE}/{KEY}"
    assert storage.is_fetchable(KEY)
    assert names(folder) == set()


async def test_what_the_store_refuses_is_held_and_brought_there_later(
    storage: Storage, store: FakeStore, folder: Path
) -> None:
    content = os.urandom(600_000)
    store.away = True
    source = io.BytesIO(content)
    source.seek(7)
    await storage.keep(KEY, source, content_type="audio/x-special")

    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    held_url = storage.url(KEY)
    assert held_url == f"{MEDIA}/media/{KEY}"
    assert not storage.is_fetchable(KEY)
    assert await read(storage) == content
    assert storage.path(KEY).read_bytes() == content
    with pytest.raises(ObjectNotFound):
        storage.path(OTHER_KEY)
    assert storage.key_of(held_url) == storage.key_of(f"{STORE}/{KEY}") == KEY
    assert storage.held()[:2] == (1, 600_000)

    async with running(storage):
        await until(lambda: len(store.tries) > 2)
        assert storage.held().files == 1
        store.away = False
        await until(lambda: storage.url(KEY) == f"{STORE}/{KEY}")
        assert store.objects == {KEY: (content, "audio/x-special")}
        assert storage.held()[:2] == (0, 0)
        assert storage.held().put_off == 1
        assert storage.key_of(held_url) == KEY
        assert await read(storage) == content
        await until(lambda: storage._away_since is None)  # type: ignore[attr-defined]
        await keep(storage, OTHER_KEY)
        assert OTHER_KEY in store.objects


async def test_nobody_waits_for_a_store_that_is_known_to_be_away(storage: Storage, store: FakeStore) -> None:
    store.away = True
    await keep(storage)
    await keep(storage, OTHER_KEY)

    assert store.tries == [KEY]
    with pytest.raises(StorageError):
        await storage.delete("audio/tts/c.mp3")
    assert store.tries == [KEY]


async def test_patience_is_for_a_store_that_takes_something(
    storage: Storage, store: FakeStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelter, "PATIENCE_SECONDS", 0.5)
    store.read_seconds = 0.1
    await keep(storage, content=bytes(8000))
    assert KEY in store.objects
    assert names(folder) == set()

    store.read_seconds, store.hold = 0.0, asyncio.Event()
    began = time.monotonic()
    await keep(storage, OTHER_KEY)
    assert 0.4 < time.monotonic() - began < 3
    assert not storage.is_fetchable(OTHER_KEY)


async def test_what_lies_there_is_gone_on_with_after_a_restart(
    storage: Storage, store: FakeStore, folder: Path
) -> None:
    store.away = True
    for number in range(3):
        await keep(storage, f"audio/tts/{number}.mp3", b"%d" % number)
        os.utime(storage.path(f"audio/tts/{number}.mp3"), (time.time() - 60, 1000 - number))
    (folder / "draft-of-a-process-that-died").write_bytes(b"half")
    (folder / ("a" * 64 + ".json")).write_text("{}")
    (folder / ("b" * 64)).write_bytes(b"without a label")
    os.utime(folder / ("b" * 64), (0, 0))
    store.tries.clear()

    again = build(store, folder)
    await keep(again)  # it knows without asking
    assert store.tries == []
    store.away = False
    async with running(again):
        await until(lambda: again.held().files == 0)
    assert store.tries[:3] == ["audio/tts/2.mp3", "audio/tts/1.mp3", "audio/tts/0.mp3"]  # the oldest first
    assert store.objects["audio/tts/1.mp3"] == (b"1", "audio/mpeg")
    assert not names(folder) & {"draft-of-a-process-that-died", "a" * 64 + ".json", "b" * 64}


async def test_processes_of_a_machine_share_what_is_held(store: FakeStore, folder: Path) -> None:
    store.away = True
    ours, theirs = build(store, folder), build(store, folder)
    for number in range(20):
        await keep((ours, theirs)[number % 2], f"audio/tts/{number}.mp3")
    assert await read(theirs, "audio/tts/0.mp3") == b"speech"
    assert ours.held().files == theirs.held().files == 20
    store.tries.clear()

    store.away = False
    async with running(ours, theirs):
        await until(lambda: ours.held().files == 0)
        await until(lambda: ours._away_since is None and theirs._away_since is None)  # type: ignore[attr-defined]
    assert len(store.objects) == 20
    assert len(store.tries) == 20  # each once


async def test_one_object_that_the_store_refuses_does_not_keep_it_from_the_rest(
    storage: Storage, store: FakeStore
) -> None:
    store.away = True
    await keep(storage)
    await keep(storage, OTHER_KEY)
    store.away, store.refused = False, {KEY}

    async with running(storage):
        await until(lambda: storage.held().files == 1)
        assert storage.is_fetchable(OTHER_KEY)
        store.refused = set()
        await until(lambda: storage.held().files == 0)


async def test_a_newer_version_is_not_replaced_by_the_one_under_way(storage: Storage, store: FakeStore) -> None:
    store.away = True
    await keep(storage, WORK_KEY, b"first")
    store.away, store.hold = False, asyncio.Event()
    async with running(storage):
        await until(lambda: store.tries.count(WORK_KEY) == 2)
        await keep(storage, WORK_KEY, b"second")
        store.hold.set()
        await until(lambda: storage.held().files == 0)
    assert store.objects[WORK_KEY][0] == b"second"


async def test_what_is_deleted_while_it_is_under_way_is_gone(storage: Storage, store: FakeStore, folder: Path) -> None:
    store.away = True
    await keep(storage, WORK_KEY)
    with pytest.raises(StorageError):
        await storage.delete(WORK_KEY)  # the store may have another version
    assert names(folder) == set()

    await keep(storage, WORK_KEY)
    store.away, store.hold = False, asyncio.Event()
    async with running(storage):
        await until(lambda: store.tries.count(WORK_KEY) == 2)
        with pytest.raises(StorageError):
            await storage.delete(WORK_KEY)
        store.hold.set()
        await until(lambda: store.tries.count(WORK_KEY) == 3)
        await storage.delete(WORK_KEY)
    assert WORK_KEY not in store.objects
    with pytest.raises(ObjectNotFound):
        await read(storage, WORK_KEY)


async def test_a_reader_who_found_the_file_finds_it_after_the_upload(storage: Storage, store: FakeStore) -> None:
    store.away = True
    await keep(storage)
    path = storage.path(KEY)
    store.away = False
    async with running(storage):
        await until(lambda: storage.is_fetchable(KEY))
        assert path.read_bytes() == b"speech"


async def test_the_bound_holds_and_new_speech_is_refused_before_it(store: FakeStore, folder: Path) -> None:
    storage = build(store, folder, max_bytes=100_000)
    store.away = True
    storage.require_room()
    await keep(storage, content=bytes(95_000))
    with pytest.raises(StorageFull) as refusal:
        storage.require_room()
    assert refusal.value.retry_after_seconds
    with pytest.raises(StorageFull):
        await storage.check()
    await keep(storage, OTHER_KEY, bytes(4_000))  # what is under way finds some room still
    with pytest.raises(StorageError):
        await keep(storage, WORK_KEY, bytes(2_000))
    with pytest.raises(ObjectNotFound):
        storage.path(WORK_KEY)

    store.away = False
    await keep(storage, WORK_KEY, bytes(2_000))  # the last resort
    assert WORK_KEY in store.objects
    async with running(storage):
        await until(lambda: storage.held().files == 0)
        storage.require_room()
        await storage.check()


async def test_a_disk_that_fails_is_no_shelter(store: FakeStore, tmp_path: Path) -> None:
    in_the_way = tmp_path / "held"
    storage = build(store, in_the_way / "folder")
    in_the_way.write_bytes(b"a file")
    await keep(storage)
    store.away = True
    storage.require_room()
    with pytest.raises(StorageError):
        await keep(storage, OTHER_KEY)
    with pytest.raises(StorageFull):
        storage.require_room()
    in_the_way.unlink()
    async with running(storage):
        await until(lambda: storage._folder.has_room_for(0))  # type: ignore[attr-defined]
    storage.require_room()


async def test_a_full_disk_is_no_room(
    storage: Storage, store: FakeStore, local: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: usage(room.MIN_FREE_BYTES))  # type: ignore[attr-defined]

    storage.require_room()  # the store takes it
    with pytest.raises(StorageFull):
        local.require_room()
    with pytest.raises(StorageFull):
        await local.check()
    store.away = True
    with pytest.raises(StorageFull):
        await storage.check()
    with pytest.raises(StorageError):
        await keep(storage)


async def test_a_check_learns_of_an_outage(storage: Storage, store: FakeStore) -> None:
    store.away = True
    await storage.check()
    await keep(storage)
    assert store.tries == []
    assert not storage.is_fetchable(KEY)


async def test_an_outage_ends_also_while_nothing_is_held(storage: Storage, store: FakeStore) -> None:
    store.away = True
    await storage.check()
    store.away = False
    async with running(storage):
        await until(lambda: storage._away_since is None)  # type: ignore[attr-defined]
    await keep(storage)
    assert KEY in store.objects


async def test_signed_addresses_of_held_audio_end_and_cannot_be_forged(
    store: FakeStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = build(store, folder, secret="s" * 32)
    store.away = True
    await keep(storage)
    url = storage.url(KEY)
    address, _, query = url.partition("?")
    assert address == f"{MEDIA}/media/{KEY}"
    assert storage.grants(url)
    assert storage.admits(KEY, query)
    assert storage.key_of(url) == KEY
    assert not storage.admits(OTHER_KEY, query)
    expires, _, signature = query.removeprefix("expires=").partition("&signature=")
    for forged in (
        "",
        f"expires={int(expires) + 1}&signature={signature}",
        f"expires={expires}&signature={signature[::-1]}",
        f"expires={expires}&signature=",
        "expires=never&signature=你",
        f"signature={signature}",
    ):
        assert not storage.admits(KEY, forged)
    assert not build(store, folder, secret="t" * 32).admits(KEY, query)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3601)
    assert not storage.grants(url)


async def test_writers_at_once_stay_within_the_bound(folder: Path) -> None:
    held = HeldFolder(folder, 10_000)

    async def write(number: int) -> bool:
        try:
            await to_thread.run_sync(held.write, f"a/{number}", io.BytesIO(bytes(1_500)), "audio/mpeg")
        except StorageFull:
            return False
        return True

    outcomes = await asyncio.gather(*(write(number) for number in range(20)))
    assert outcomes.count(True) == 6
    assert sum(each.size for each in held.files()) == 9_000
    assert len(names(folder)) == 12  # with a label each


async def test_a_real_store_that_is_busy_is_borne(oss: OssStorage, oss_server: OssServer, folder: Path) -> None:
    storage = build(oss, folder)
    oss_server.always = busy
    await keep(storage, content=bytes(300_000))
    await storage.check()
    async with running(storage):
        await asyncio.sleep(0.2)
        assert not storage.is_fetchable(KEY)
        oss_server.always = None
        await until(lambda: storage.is_fetchable(KEY))
    assert oss_server.objects[KEY] == (bytes(300_000), "audio/mpeg")
    assert await read(storage) == bytes(300_000)


async def test_the_sandboxs_outage_is_borne(
    sandbox_oss: OssStorage, sandbox_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = build(sandbox_oss, folder)
    async with httpx.AsyncClient(base_url=sandbox_url, trust_env=False) as client:
        (await client.put("/_sandbox/faults", json={"oss_unavailable": -1})).raise_for_status()
        try:
            await keep(storage)
            assert await read(storage) == b"speech"
        finally:
            (await client.put("/_sandbox/faults", json={})).raise_for_status()
        async with running(storage):
            await until(lambda: storage.is_fetchable(KEY))
        answer = await client.get(storage.url(KEY))
    assert (answer.content, answer.headers["content-type"]) == (b"speech", "audio/mpeg")


async def test_a_store_that_is_away_is_not_connected_in_advance(storage: Storage, store: FakeStore) -> None:
    await storage.get_ready()
    assert store.tries == ["ready"]
    store.away = True
    await keep(storage)
    store.tries.clear()
    await storage.get_ready()
    assert store.tries == []
