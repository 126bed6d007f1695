"""A product with a provider that misbehaves, and calls of every route to try it with."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.cloning import clone
from tests.conftest import Account
from tests.databases import Row, rows
from tests.hearing import recognize_file, tone, transcribe
from tests.narrating import ask as ask_long
from tests.servers import Sandbox, Server
from tests.talking import talking
from tests.tunnels import Tunnel

PATIENCE_SECONDS = 50.0
SAMPLE_RATE = 22050
RECOGNIZED_SECONDS = 2

HASTY = {"UPSTREAM_TIMEOUT": "1", "HANDSHAKE_TIMEOUT": "1"}
"""Settings of a product that soon gives up waiting for the provider."""

OSS_SECRET = "sandbox-secret"
BUCKET = "voices"

_WORDS = "春夏秋冬东南西北山水风云花鸟鱼虫日月星光江河湖海松竹梅兰琴棋书画"


def saying(sentences: int = 2) -> str:
    """A text that nobody has said before, of sentences of 19 characters and about two seconds each."""
    return "".join(f"{''.join(random.choices(_WORDS, k=9))}。" for _ in range(sentences))


@dataclass
class Scene:
    """A product under test: its provider, and what stands between it and its store.

    `way` is an address of its database, where the product's own may not lead there. `before` is what lies in the
    store when the test begins.
    """

    server: Server
    sandbox: Sandbox
    way: str | None = None
    store: Tunnel | None = None
    before: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.before = set(self.store.put_keys) if self.store else self.media
        self._log_begins = len(self.server.log)

    @property
    def log(self) -> str:
        """What the product has written since the test began."""
        return self.server.log[self._log_begins :]

    async def rows(self, sql: str, *values: str) -> list[Row]:
        """Read the database, whichever it is."""
        return await asyncio.to_thread(rows, self, sql, *values)

    @property
    def database_url(self) -> str:
        """Where the database is."""
        return self.way or self.server.database_url

    @property
    def media(self) -> set[str]:
        """The keys of what lies in a store on this machine's disk."""
        return _files(self.server.folder / "data" / "media")

    @property
    def held(self) -> set[str]:
        """What this machine keeps for a store that was away."""
        return {name for name in _files(self.server.folder / "data" / "held") if name.endswith(".json")}


def _files(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def oss_settings(endpoint: str) -> dict[str, str]:
    """What makes a product keep its audio in the stand-in's object store."""
    return {
        "OSS_ENDPOINT": endpoint,
        "OSS_REGION": "cn-hangzhou",
        "OSS_BUCKET": BUCKET,
        "OSS_ACCESS_KEY_ID": "sandbox-id",
        "OSS_ACCESS_KEY_SECRET": OSS_SECRET,
    }


_RUN_OUT = (
    "UPDATE {0} SET claimed_by = NULL, claimed_until = NULL,"
    " next_check_at = (SELECT created_at FROM records WHERE records.id = record_id) WHERE next_check_at IS NOT NULL"
)
JOBS = ("submitted_files", "transcriptions", "long_texts", "enrollments")


async def let_claims_run_out(scene: Scene, *tables: str) -> None:
    """Let the time pass that the leases and claims of the dead still last, on all jobs or on those of some tables."""
    await scene.rows("UPDATE records SET lease_expires_at = created_at WHERE lease_expires_at IS NOT NULL")
    for table in tables or JOBS:
        await scene.rows(_RUN_OUT.format(table))


async def until(
    condition: Callable[[], Awaitable[object] | bool], what: str, seconds: float = PATIENCE_SECONDS
) -> None:
    """Wait until something is so; `what` says what it is if it is not."""
    deadline = time.monotonic() + seconds
    while True:
        met = condition()
        if met if isinstance(met, bool) else await met:
            return
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.05)


# ---- Calls: each gives in short what its client was told

Call = Callable[[Scene, Account, str], Coroutine[Any, Any, str]]


def told(answer: httpx.Response) -> str:
    """Status and error name of an answer."""
    return " ".join([str(answer.status_code), *([] if answer.is_success else [answer.json()["error"]])])


async def synthesize(scene: Scene, account: Account, text: str) -> str:
    """The plain call."""
    return told(await account.synthesize(text, format="wav"))


async def stream(scene: Scene, account: Account, text: str) -> str:
    """The streamed call; `broken` when the body has no proper end."""
    try:
        return told(await account.synthesize(text, format="wav", stream=True))
    except httpx.RemoteProtocolError:
        return "broken"


async def narrate(scene: Scene, account: Account, text: str) -> str:
    """The long text, waited for."""
    return told(await ask_long(account, text, subtitle="srt"))


async def talk(scene: Scene, account: Account, text: str) -> str:
    """The live session."""
    async with talking(scene.server, account, format="pcm") as session:
        message = (await session.speak(text)).message
    return "200" if message["type"] == "complete" else f"{message['code']} {message['error']}"


async def recognize(scene: Scene, account: Account, text: str) -> str:
    """The recognition of a tone."""
    return told(await recognize_file(account, tone(RECOGNIZED_SECONDS)))


async def transcribe_url(scene: Scene, account: Account, text: str) -> str:
    """The transcription, up to its submission."""
    return told(await transcribe(account))


async def clone_url(scene: Scene, account: Account, text: str) -> str:
    """The making of a voice."""
    return told(await clone(account))


SPEECH: dict[str, Call] = {"synthesize": synthesize, "stream": stream, "long": narrate, "live": talk}
EVERY: dict[str, Call] = {**SPEECH, "recognize": recognize, "transcribe": transcribe_url, "voice": clone_url}
