"""Users of a backend whose provider is hostile: what they are told, what is written down, what they pay."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import httpx
from anyio import to_thread
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from tests.databases import rows
from tests.fuzz.house import note_log, take_token
from tests.fuzz.provider import HostileProvider
from tests.fuzz.tally import Tally
from tests.servers import NO_AUTHORITIES, Server, run_backend

# Silence is borne for a second in these runs, a call is tried four times at most, and what was heard is stored.
ANSWER_SECONDS = 30.0
SETTLED_SECONDS = 40.0
MAX_MEMORY_MB = 700
OPEN = ("open_streams", 'provider_connections{state="busy"}', "jobs_running")
_BILLS = (
    "SELECT records.input_data, records.status, bills.quantity, bills.estimated FROM records"
    " LEFT JOIN bills ON bills.record_id = records.id ORDER BY records.id"
)
IMPATIENCE = {"UPSTREAM_TIMEOUT": "1", "HANDSHAKE_TIMEOUT": "1"}
SPEECH = {"model": "cosyvoice-v3-flash", "voice": "longanyang"}
Call = Callable[[httpx.AsyncClient, str, Random], Awaitable[str | int]]


async def call_hostile(server: Server, provider: HostileProvider, *, calls: int, at_once: int, seed: int) -> Tally:
    """Have texts spoken by a hostile provider, and check the books afterwards."""
    tally = Tally("provider")
    documented = await asyncio.to_thread(_documented, server)
    token = await asyncio.to_thread(take_token, server, "sk-test-hostile")
    turns = asyncio.Semaphore(at_once)
    async with client_of(server, token) as client:

        async def call(number: int) -> None:
            chance = Random(f"{seed}-{number}")
            kind, speak = chance.choice(tuple(CALLS.items()))
            text = f"第{number}次。"
            async with turns:
                began = time.monotonic()
                try:
                    async with asyncio.timeout(ANSWER_SECONDS):
                        told = await speak(client, text, chance)
                except TimeoutError:
                    told = "no end"
            tally.cases[kind] += 1
            tally.checks["answered as documented"] += 1
            tally.note(kind, told)
            if told not in documented:
                tally.fail(kind, "answered as documented", f"{text} {told} after {time.monotonic() - began:.1f} s")

        await asyncio.gather(*(call(number) for number in range(calls)))
        await _check_books(server, provider, tally)
        tally.answers.update({("acts of the provider", name): times for name, times in provider.tried.items()})
        await check_quiet(client, tally)
    tally.checks["memory"] += 1
    if (memory_mb := resident_mb(server)) > MAX_MEMORY_MB:
        tally.fail("the server", "memory", f"{memory_mb} MB")
    for breach in provider.breaches:
        tally.fail("the server", "leaves what is broken", breach)
    note_log(server, tally)
    return tally


@asynccontextmanager
async def meeting_hostile(folder: Path, seed: int) -> AsyncIterator[tuple[Server, HostileProvider]]:
    """Run a backend whose provider is hostile, and see that nobody is led into the trap."""
    visitors: list[str] = []

    async def trap(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visitors.append((await reader.read(2000)).decode("latin-1"))
        writer.close()

    trap_server = await asyncio.start_server(trap, "127.0.0.1", 0)
    async with trap_server:
        provider = HostileProvider(seed, f"http://127.0.0.1:{trap_server.sockets[0].getsockname()[1]}/x")
        async with provider.listening() as url:
            settings = {"DASHSCOPE_WS_URL": url, **IMPATIENCE}
            # Both ends run in loops of their own, and the provider serves in this one.
            running = run_backend(folder, settings)
            server = await to_thread.run_sync(running.__enter__)
            try:
                yield server, provider
            finally:
                await to_thread.run_sync(running.__exit__, None, None, None)
    provider.breaches += [f"a redirect was followed: {visitor[:200]}" for visitor in visitors]


async def check_quiet(client: httpx.AsyncClient, tally: Tally) -> None:
    """Wait until nothing is open any more."""
    tally.checks["nothing is left open"] += 1
    deadline = time.monotonic() + SETTLED_SECONDS
    while True:
        page = (await client.get("/metrics")).text
        left = [line for line in page.splitlines() if line.startswith(OPEN) and not line.endswith(" 0.0")]
        if not left:
            return
        if time.monotonic() > deadline:
            tally.fail("the server", "nothing is left open", f"{left}")
            return
        await asyncio.sleep(0.2)


async def _plain(client: httpx.AsyncClient, text: str, chance: Random) -> str | int:
    answer = await client.post("/api/audio/tts/synthesize", json={**SPEECH, "text": text, "format": "pcm"})
    return answer.status_code


async def _stream(client: httpx.AsyncClient, text: str, chance: Random) -> str | int:
    asked = {**SPEECH, "text": text, "stream": True, "format": chance.choice(("pcm", "mp3", "wav"))}
    try:
        async with client.stream("POST", "/api/audio/tts/synthesize", json=asked) as answer:
            async for _ in answer.aiter_bytes():
                if chance.random() < 0.01:
                    return "left"
            return answer.status_code
    except httpx.RemoteProtocolError:
        return "broken off"


async def _live(client: httpx.AsyncClient, text: str, chance: Random) -> str | int:
    url = f"{client.base_url}/api/audio/tts/stream".replace("http", "ws", 1)
    async with connect(
        f"{url}?model={SPEECH['model']}&voice={SPEECH['voice']}",
        additional_headers={"Authorization": client.headers["Authorization"]},
        proxy=None,
    ) as socket:
        await socket.send(json.dumps({"type": "text", "content": text}))
        await socket.send(json.dumps({"type": chance.choice(("end", "end", "end", "cancel"))}))
        try:
            async for message in socket:
                if isinstance(message, str):
                    told: dict[str, Any] = json.loads(message)
                    return int(told["code"]) if told["type"] == "error" else str(told["type"])
        except ConnectionClosed:
            return "closed without a word"
    return "closed without a word"


CALLS: dict[str, Call] = {"plain": _plain, "stream": _stream, "live": _live}


async def _check_books(server: Server, provider: HostileProvider, tally: Tally) -> None:
    """Every record has its end, once, and no bill is more than the provider told."""
    deadline = time.monotonic() + SETTLED_SECONDS
    books = rows(server, _BILLS)
    while any(status == "running" for _, status, _, _ in books) and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
        books = rows(server, _BILLS)
    seen: set[str] = set()
    for asked, status, quantity, estimated in books:
        text = json.loads(asked)["text"]
        told = [*provider.told.get(text, []), *provider.told.get("", [])]  # of a text, or before it was read
        tally.checks["settled and billed"] += 1
        wrong = [
            status == "running" and "has no end",
            text in seen and "has two records",
            bool(estimated) and "was guessed",
            (quantity or 0) not in {0, *told} and f"costs {quantity} of {told}",
        ]
        seen.add(text)
        for what in filter(None, wrong):
            tally.fail("records", "settled and billed", f"{text} ({status}) {what}")


def client_of(server: Server, token: str) -> httpx.AsyncClient:
    """A client that is logged in."""
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.AsyncClient(
        base_url=server.url, timeout=ANSWER_SECONDS, verify=NO_AUTHORITIES, trust_env=False, headers=headers
    )


def _documented(server: Server) -> set[str | int]:
    """What may come of a synthesis, in words or as a status."""
    schema = httpx.get(f"{server.url}/openapi.json").json()
    statuses = {int(status) for status in schema["paths"]["/api/audio/tts/synthesize"]["post"]["responses"]}
    return statuses - {500, 503, 413, 409} | {"left", "broken off", "complete", "cancelled"}


def resident_mb(server: Server) -> int:
    """How much memory a process holds."""
    with open(f"/proc/{server.process.pid}/status") as status:
        [line] = [line for line in status if line.startswith("VmRSS:")]
    return int(line.split()[1]) // 1024
