"""What a caller may rely on, whichever backend is behind it."""

import io
import os
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import SecretStr

from app.errors import ObjectNotFound
from app.settings import Secrets, Settings
from app.storage import LocalStorage, Store, create_storage, day_of
from app.storage.oss import OssStorage
from app.storage.shelter import ShelteredStorage

KEY = "audio/tts/20251230/0a1b2c3d-4e5f.mp3"
IMPOSSIBLE_KEYS = [
    "",
    "/audio/a.mp3",
    "audio//a.mp3",
    "audio/a.mp3/",
    "audio/../a.mp3",
    "..",
    "audio/./a.mp3",
    "audio/.hidden",
    "audio/a\x00.mp3",
    "audio/a.mp3\n",
    "audio/你好.mp3",
    "audio\\a.mp3",
    "audio/~draft",
    "a" * 513,
]


async def read(storage: Store, key: str) -> bytes:
    async with storage.open(key) as chunks:
        return b"".join([chunk async for chunk in chunks])


async def test_an_object_comes_back_as_it_went_in(storage: Store) -> None:
    content = os.urandom(700_001)

    await storage.put(KEY, io.BytesIO(content), content_type="audio/mpeg")

    async with storage.open(KEY) as stream:
        chunks = [chunk async for chunk in stream]
    assert b"".join(chunks) == content
    assert len(chunks) > 1


async def test_put_stores_from_the_start_wherever_the_source_stands(storage: Store) -> None:
    source = io.BytesIO(b"whole")
    source.seek(3)

    await storage.put(KEY, source, content_type="audio/mpeg")

    assert await read(storage, KEY) == b"whole"


async def test_putting_again_replaces(storage: Store) -> None:
    for content in (b"a first, longer version", b"second", b"second"):
        await storage.put(KEY, io.BytesIO(content), content_type="audio/mpeg")

    assert await read(storage, KEY) == b"second"


async def test_an_absent_object_is_not_found(storage: Store) -> None:
    with pytest.raises(ObjectNotFound):
        await read(storage, KEY)


async def test_delete_removes_and_may_be_repeated(storage: Store) -> None:
    await storage.put(KEY, io.BytesIO(b"x"), content_type="audio/mpeg")

    await storage.delete(KEY)
    await storage.delete(KEY)

    with pytest.raises(ObjectNotFound):
        await read(storage, KEY)


async def test_a_reader_may_stop_early(storage: Store) -> None:
    await storage.put(KEY, io.BytesIO(bytes(2_000_000)), content_type="audio/mpeg")

    async with storage.open(KEY) as chunks:
        async for _ in chunks:
            break

    assert len(await read(storage, KEY)) == 2_000_000


async def test_the_sandbox_accepts_a_signed_address(sandbox_oss: OssStorage) -> None:
    await sandbox_oss.put(KEY, io.BytesIO(b"audio"), content_type="audio/mpeg")

    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(sandbox_oss.url(KEY))

    assert answer.content == b"audio"
    assert answer.headers["content-type"] == "audio/mpeg"


@pytest.mark.parametrize("key", IMPOSSIBLE_KEYS)
async def test_impossible_keys_are_refused(storage: Store, key: str) -> None:
    with pytest.raises(ValueError, match="not a storage key"):
        await storage.put(key, io.BytesIO(b"x"), content_type="audio/mpeg")
    with pytest.raises(ValueError, match="not a storage key"):
        await storage.delete(key)
    with pytest.raises(ValueError, match="not a storage key"):
        storage.url(key)
    with pytest.raises(ObjectNotFound):
        await read(storage, key)


@pytest.mark.parametrize("key", ["a", "A.b-c_d/9.wav", "a/_b/-c.opus", "a" * 200 + "/" + "b" * 200])
async def test_unusual_keys_are_fine(storage: Store, key: str) -> None:
    await storage.put(key, io.BytesIO(b"x"), content_type="audio/wav")

    assert await read(storage, key) == b"x"
    assert urlsplit(storage.url(key)).path.endswith(f"/{key}")


async def test_settings_choose_the_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no .env here
    secrets = Secrets(("s" * 32,), ("c" * 32,))
    local = create_storage(Settings(data_dir=tmp_path, public_base_url="https://voice.example/"), secrets)
    oss = create_storage(
        Settings(
            data_dir=tmp_path,
            oss_endpoint="oss-cn-hangzhou.aliyuncs.com",
            oss_region="cn-hangzhou",
            oss_bucket="voices",
            oss_access_key_id=SecretStr("test-key-id"),
            oss_access_key_secret=SecretStr("test-key-secret"),
        ),
        secrets,
    )

    assert isinstance(local, LocalStorage)
    assert local.url(KEY) == f"https://voice.example/media/{KEY}"
    assert isinstance(oss, ShelteredStorage)
    assert oss.url(KEY) == f"https://voices.oss-cn-hangzhou.aliyuncs.com/{KEY}"
    await oss.close()


def test_a_key_tells_its_day_if_that_is_one() -> None:
    assert day_of("audio/tts/20251230/a.mp3") == datetime(2025, 12, 30, tzinfo=UTC)
    for key in ("audio/tts/a.mp3", "audio/tts/20251340/a.mp3", "audio/tts/00010101/a.mp3", "audio/tts/99991231/a.mp3"):
        assert day_of(key) is None
