"""Playing audio that lies on this machine over HTTP, and finding what lies in the store."""

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from app.errors import AppError
from app.routers.media import router
from app.storage import LocalStorage, Storage
from app.storage.links import MediaLinks
from app.storage.oss import OssStorage
from app.storage.shelter import ShelteredStorage

CONTENT = bytes(range(256)) * 1000
KEY = "audio/tts/20251230/a.mp3"


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    (tmp_path / "jwt_secret").write_text("secret")
    return LocalStorage(tmp_path / "media", "http://media.test")


@asynccontextmanager
async def playing(storage: Storage) -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    app.include_router(router)
    app.state.services = SimpleNamespace(storage=storage)

    @app.exception_handler(AppError)
    async def answer(request: Request, error: AppError) -> JSONResponse:
        return JSONResponse({"error": error.code}, error.status)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://media.test") as client:
        yield client


@pytest.fixture
async def client(storage: LocalStorage) -> AsyncIterator[httpx.AsyncClient]:
    await storage.put(KEY, io.BytesIO(CONTENT), content_type="audio/mpeg")
    async with playing(storage) as client:
        yield client


async def test_a_stored_file_plays_at_its_url(client: httpx.AsyncClient, storage: LocalStorage) -> None:
    answer = await client.get(storage.url(KEY))

    assert answer.status_code == 200
    assert answer.content == CONTENT
    assert answer.headers["content-type"] == "audio/mpeg"
    assert answer.headers["content-length"] == str(len(CONTENT))
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert answer.headers["etag"]


async def test_head_tells_the_same_without_a_body(client: httpx.AsyncClient) -> None:
    head = await client.head(f"/media/{KEY}")
    get = await client.get(f"/media/{KEY}")

    assert head.status_code == 200
    assert head.content == b""
    assert head.headers == get.headers


@pytest.mark.parametrize(
    ("range_header", "part", "content_range"),
    [
        ("bytes=0-99", CONTENT[:100], "bytes 0-99/256000"),
        ("bytes=255000-", CONTENT[255000:], "bytes 255000-255999/256000"),
        ("bytes=-10", CONTENT[-10:], "bytes 255990-255999/256000"),
    ],
)
async def test_a_player_may_seek(client: httpx.AsyncClient, range_header: str, part: bytes, content_range: str) -> None:
    answer = await client.get(f"/media/{KEY}", headers={"Range": range_header})

    assert answer.status_code == 206
    assert answer.content == part
    assert answer.headers["content-range"] == content_range


async def test_a_range_beyond_the_end_is_refused(client: httpx.AsyncClient) -> None:
    answer = await client.get(f"/media/{KEY}", headers={"Range": "bytes=256000-"})

    assert answer.status_code == 416
    assert answer.headers["content-range"] == "bytes */256000"


@pytest.mark.parametrize(
    ("suffix", "content_type"),
    [
        ("wav", "audio/wav"),
        ("pcm", "audio/pcm"),
        ("opus", "audio/ogg"),
        ("html", "application/octet-stream"),
        ("", "application/octet-stream"),
    ],
)
async def test_the_content_type_follows_the_extension(
    client: httpx.AsyncClient, storage: LocalStorage, suffix: str, content_type: str
) -> None:
    key = f"audio/b.{suffix}".rstrip(".")
    await storage.put(key, io.BytesIO(b"x"), content_type="text/html")

    assert (await client.get(f"/media/{key}")).headers["content-type"] == content_type


NOWHERE = [
    "/media/",
    "/media/audio/tts/20251230/absent.mp3",
    "/media/audio",
    "/media/..%2fjwt_secret",
    "/media/audio/%2e%2e/%2e%2e/jwt_secret",
    "/media//etc/hostname",
    "/media/%2fetc%2fhostname",
    "/media/audio%5c..%5c..%5cjwt_secret",
    "/media/audio/a.mp3%00.html",
    "/media/" + "a" * 2000,
]


@pytest.mark.parametrize("path", NOWHERE)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_there_is_nothing_else_to_get(client: httpx.AsyncClient, method: str, path: str) -> None:
    answer = await client.request(method, path)

    assert answer.status_code == 404
    assert method == "HEAD" or answer.json() == {"error": "NOT_FOUND"}


async def test_the_documentation_names_it_once(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]

    assert list(paths) == ["/media/{key}"]
    assert list(paths["/media/{key}"]) == ["get"]
    assert set(paths["/media/{key}"]["get"]["responses"]["200"]["content"]) == {
        "audio/mpeg",
        "audio/wav",
        "audio/pcm",
        "audio/ogg",
    }


# Where there is a store, and this machine holds what the store has not taken


def shelter(tmp_path: Path, secret: str | None = None) -> ShelteredStorage:
    """A store that is never asked, and a folder with one object that waits for it."""
    store = OssStorage(
        endpoint="oss-cn-hangzhou.aliyuncs.com",
        region="cn-hangzhou",
        bucket="voices",
        access_key_id="test-key-id",
        access_key_secret="test-key-secret",
        signed_urls=secret is not None,
    )
    sheltered = ShelteredStorage(
        store, tmp_path / "held", MediaLinks("http://media.test", (secret,) if secret else ()), 1_000_000
    )
    for key in (KEY, "audio/work/1-0.pcm", "audio/tts/a.srt"):
        sheltered._folder.write(key, io.BytesIO(CONTENT), "audio/mpeg")
    return sheltered


async def test_held_audio_plays_and_what_is_in_the_store_is_found(tmp_path: Path) -> None:
    storage = shelter(tmp_path)
    async with playing(storage) as client:
        whole = await client.get(storage.url(KEY))
        assert (whole.status_code, whole.content) == (200, CONTENT)
        assert whole.headers["content-type"] == "audio/mpeg"
        part = await client.get(storage.url(KEY), headers={"Range": "bytes=255000-"})
        assert (part.status_code, part.content) == (206, CONTENT[255000:])
        assert (await client.get("/media/audio/tts/a.srt")).headers["content-type"].startswith("application/x-subrip")
        assert (await client.get("/media/audio/work/1-0.pcm")).status_code == 404
        assert (await client.get("/media/audio/voice/a.wav")).status_code == 404

        for method in ("GET", "HEAD"):
            stored = await client.request(method, "/media/audio/tts/20251230/b.mp3?expires=1")
            assert stored.status_code == 307
            assert stored.headers["location"] == "https://voices.oss-cn-hangzhou.aliyuncs.com/audio/tts/20251230/b.mp3"
            assert stored.headers["cache-control"] == "no-store"


async def test_signed_addresses_are_for_whoever_was_given_them(tmp_path: Path) -> None:
    storage = shelter(tmp_path, "s" * 32)
    held_url = storage.url(KEY)
    async with playing(storage) as client:
        whole = await client.get(held_url)
        assert (whole.status_code, whole.content) == (200, CONTENT)
        assert "public" not in whole.headers["cache-control"]
        query = held_url.partition("?")[2]
        for path in (KEY, "audio/tts/a.srt", "audio/tts/20251230/b.mp3"):
            assert (await client.get(f"/media/{path}")).status_code == 404
            assert (await client.get(f"/media/{path}?{query}x")).status_code == 404
        assert (await client.get(f"/media/audio/tts/a.srt?{query}")).status_code == 404

        storage._folder.remove(KEY)
        stored = await client.get(held_url)
        assert stored.status_code == 307
        location = httpx.URL(stored.headers["location"])
        assert (location.host, location.path) == ("voices.oss-cn-hangzhou.aliyuncs.com", f"/{KEY}")
        assert "x-oss-signature" in location.params


@pytest.mark.parametrize("path", [*NOWHERE[3:], "/media//evil.example/a.mp3", "/media/https://evil.example/a.mp3"])
async def test_a_store_opens_no_other_way(tmp_path: Path, path: str) -> None:
    async with playing(shelter(tmp_path)) as client:
        assert (await client.get(path)).status_code == 404
