"""Cloned voices as a client asks for them, what the provider saw of it, and what is on our disk."""

import asyncio
import time
import uuid
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import Account
from tests.databases import rows
from tests.hearing import PATIENCE_SECONDS, data_of, tone
from tests.servers import Sandbox, Server

FLASH = "cosyvoice-v3-flash"
PLUS = "cosyvoice-v3-plus"
V2 = "cosyvoice-v2"

CUSTOMIZATION = "/api/v1/services/audio/tts/customization"
CREATE = "/api/audio/voice/create"
LIST = "/api/audio/voice/list"

PUBLIC_SAMPLE = "https://media.example.com/sample.mp3"
"""Twelve seconds of fit speech to the sandbox, which fetches nothing from elsewhere."""
REJECTED_SAMPLE = "https://media.example.com/rejected.mp3"
"""A sample of which the sandbox makes a voice that ends as UNDEPLOYED."""

LISTED = {"voice_id", "status", "target_model", "gmt_create", "gmt_modified"}


@cache
def sample(seconds: float = 6.0) -> bytes:
    """A WAV that may be cloned; its length tells it from others."""
    return tone(seconds, rate=16000)


def path_of(voice_id: str) -> str:
    """The route of one voice."""
    return f"/api/audio/voice/{voice_id}"


async def clone(account: Account, audio_url: str | None = PUBLIC_SAMPLE, **body: Any) -> httpx.Response:
    """Ask for a voice by JSON."""
    asked = {"target_model": FLASH, "prefix": "mine", "audio_url": audio_url, **body}
    return await account.client.post(CREATE, json=asked)


async def clone_file(
    account: Account, audio: bytes | None = None, name: str = "sample.wav", **fields: str
) -> httpx.Response:
    """Ask for a voice by form."""
    form = {"target_model": FLASH, "prefix": "mine", **fields}
    return await account.client.post(CREATE, data=form, files={"file": (name, sample() if audio is None else audio)})


async def made(account: Account, **body: Any) -> str:
    """Have a voice made of a public sample; gives its id."""
    voice_id: str = data_of(await clone(account, **body))["voice_id"]
    return voice_id


async def look(account: Account, voice_id: str, **query: Any) -> dict[str, Any]:
    """What the route of one voice tells."""
    return data_of(await account.client.get(path_of(voice_id), params=query))


async def listed(account: Account, **query: Any) -> dict[str, Any]:
    """One page of the list."""
    page = data_of(await account.client.get(LIST, params=query))
    assert page.keys() == {"total", "voices"}
    assert all(voice.keys() == LISTED for voice in page["voices"])
    return page


async def ids(account: Account, **query: Any) -> list[str]:
    """The voices of one page."""
    return [voice["voice_id"] for voice in (await listed(account, **query))["voices"]]


async def item_of(account: Account, record_id: int) -> dict[str, Any]:
    """A record as the history shows it, which makes nobody ask the provider."""
    [item] = [item for item in (await account.history(page_size=100))["items"] if item["id"] == record_id]
    return dict(item)


async def item_with(account: Account, status: str, record_id: int | None = None) -> dict[str, Any]:
    """A record, or the user's only one, once the history shows it with this status."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        items = (await account.history(type="voice"))["items"]
        [item] = [item for item in items if record_id in (None, item["id"])]
        if item.get("status") == status:
            return dict(item)
        assert time.monotonic() < deadline, item
        await asyncio.sleep(0.05)


def asked(sandbox: Sandbox, account: Account, action: str | None = None) -> list[dict[str, Any]]:
    """What the enrollment service was asked with an account's key, of one action or of all."""
    requests = [each for each in sandbox.requests(account.api_key) if each["path"] == CUSTOMIZATION]
    return [each for each in requests if action in (None, each["action"])]


def rounds(sandbox: Sandbox, account: Account) -> int:
    """How often all voices of an account were listed at the provider, however many pages that took."""
    pages = [each["input"] for each in asked(sandbox, account, "list_voice")]
    return sum("prefix" not in page and page["page_index"] == 0 for page in pages)


async def struck(sandbox: Sandbox, account: Account, action: str) -> None:
    """Wait until a fault has struck an account's request of this action."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(each["fault"] for each in asked(sandbox, account, action)):
        assert time.monotonic() < deadline, f"nobody asked for {action}"
        await asyncio.sleep(0.03)


def fault(action: str, **changes: Any) -> dict[str, Any]:
    """What `Sandbox.faults` takes for something that goes wrong with the enrollment service."""
    return {"requests": [{"path": CUSTOMIZATION, "action": action, **changes}]}


def samples_of(backend: Server) -> set[Path]:
    """The samples on a backend's disk."""
    return {file for file in (backend.folder / "data" / "media" / "audio" / "voice").rglob("*") if file.is_file()}


def sample_of(backend: Server, account: Account) -> Path | None:
    """An account's only sample on a backend's disk, found by the database; None when there is none."""
    keys = rows(backend, "SELECT key FROM voice_samples WHERE user_id = ?", uuid.UUID(account.user_id))
    files = [file for file in samples_of(backend) if any(file.as_posix().endswith(key) for (key,) in keys)]
    assert len(files) <= 1, files
    return files[0] if files else None


async def removed(backend: Server, *files: Path | None) -> None:
    """Wait until these samples are on a backend's disk no more."""
    assert all(files)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while samples_of(backend) & set(files):
            await asyncio.sleep(0.02)


async def no_more_than(backend: Server, before: set[Path]) -> None:
    """Wait until a backend's disk has no samples but those."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while samples_of(backend) - before:
            await asyncio.sleep(0.02)


def let_a_minute_pass(server: Server) -> None:
    """Make the lists of all accounts a minute older."""
    rows(server, "UPDATE voice_listings SET listed_at = '2026-01-01 00:00:00.000000'")


def hurry(server: Server, record_id: int) -> None:
    """Let the time pass that lies before the next look at a voice, and that a dead process' claim still lasts."""
    rows(
        server,
        "UPDATE enrollments SET next_check_at = '2026-01-01 00:00:00.000000', claimed_until = NULL, claimed_by = NULL"
        " WHERE record_id = ? AND next_check_at IS NOT NULL",
        record_id,
    )
