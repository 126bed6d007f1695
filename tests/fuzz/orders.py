"""What users of a backend are told when the services that it asks over HTTP answer with anything."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import httpx
from anyio import to_thread

from tests.cloning import sample
from tests.databases import rows
from tests.fuzz.callers import IMPATIENCE, MAX_MEMORY_MB, check_quiet, client_of, resident_mb
from tests.fuzz.gateway import SMUGGLED, HostileGateway
from tests.fuzz.house import note_log, take_token
from tests.fuzz.tally import Tally
from tests.servers import Server, run_backend

ANSWER_SECONDS = 40.0
MAX_SECONDS_BILLED = 2_000_000
ADDRESS = "https://example.com/a.mp3"
RECORDING = base64.b64encode(sample(6.0)).decode()
_SMUGGLED = f"SELECT count(*) FROM records WHERE output_text LIKE '%{SMUGGLED}%'"  # noqa: S608
_BILLS = "SELECT record_id, quantity, amount FROM bills"
ORDERS: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "recognize": ("POST", "/api/audio/asr/recognize", {"model": "qwen3-asr-flash", "audio_url": ADDRESS}),
    "recognize inline": ("POST", "/api/audio/asr/recognize", {"model": "qwen-audio-asr", "audio_base64": RECORDING}),
    "transcribe": ("POST", "/api/audio/asr/transcribe", {"model": "qwen3-asr-flash-filetrans", "file_url": ADDRESS}),
    "transcribe v2": ("POST", "/api/audio/asr/transcribe", {"model": "paraformer-v2", "file_url": ADDRESS}),
    "task": ("GET", "/api/audio/asr/task/{task_id}", None),
    "subtitle": ("GET", "/api/audio/asr/task/{task_id}/subtitle", None),
    "create voice": (
        "POST",
        "/api/audio/voice/create",
        {"target_model": "cosyvoice-v3-flash", "prefix": "mine", "audio_url": ADDRESS},
    ),
    "list voices": ("GET", "/api/audio/voice/list", None),
    "voice": ("GET", "/api/audio/voice/{voice_id}", None),
    "update voice": ("PUT", "/api/audio/voice/{voice_id}", {"audio_url": ADDRESS}),
    "delete voice": ("DELETE", "/api/audio/voice/{voice_id}", None),
    "history": ("GET", "/api/audio/history", None),
    "export": ("GET", "/api/audio/history.csv", None),
}


@asynccontextmanager
async def meeting_gateway(folder: Path, seed: int) -> AsyncIterator[tuple[Server, HostileGateway, list[str]]]:
    """Run a backend whose provider is hostile; also gives who walked into the trap."""
    visitors: list[str] = []

    async def trap(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visitors.append((await reader.read(2000)).decode("latin-1"))
        writer.close()

    trap_server = await asyncio.start_server(trap, "127.0.0.1", 0)
    gateway = HostileGateway(seed, f"http://127.0.0.1:{trap_server.sockets[0].getsockname()[1]}/x")
    async with trap_server, gateway.listening() as url:
        running = run_backend(
            folder, {"DASHSCOPE_HTTP_URL": url, "DASHSCOPE_WS_URL": "ws://127.0.0.1:9/", **IMPATIENCE}
        )
        server = await to_thread.run_sync(running.__enter__)
        try:
            yield server, gateway, visitors
        finally:
            await to_thread.run_sync(running.__exit__, None, None, None)


async def order_anything(
    server: Server, gateway: HostileGateway, visitors: list[str], *, calls: int, at_once: int, seed: int
) -> Tally:
    """Ask for everything that is done over HTTP, and check what came of it."""
    tally = Tally("services")
    token = await asyncio.to_thread(take_token, server, "sk-test-hostile-gateway")
    described = (await asyncio.to_thread(httpx.get, f"{server.url}/openapi.json")).json()["paths"]
    turns = asyncio.Semaphore(at_once)
    known: dict[str, list[str]] = {"task_id": ["none"], "voice_id": ["cosyvoice-v3-flash-none-1"]}
    async with client_of(server, token) as client:

        async def call(number: int) -> None:
            chance = Random(f"{seed}-{number}")
            kind, (method, path, body) = chance.choice(tuple(ORDERS.items()))
            documented = described[path][method.lower()]["responses"].keys() - {"500"}
            async with turns:
                filled = path.format(**{name: chance.choice(values[-3:]) for name, values in known.items()})
                began = time.monotonic()
                try:
                    answer = await client.request(method, filled, json=body, timeout=ANSWER_SECONDS)
                except httpx.TimeoutException:
                    tally.fail(kind, "ends in time", f"call {number}: {time.monotonic() - began:.1f} s")
                    return
            tally.cases[kind] += 1
            tally.checks["answered as documented"] += 1
            tally.note(kind, answer.status_code)
            if str(answer.status_code) not in documented:
                tally.fail(kind, "answered as documented", f"{answer.status_code} {answer.text[:300]}")
            if method != "GET" and answer.is_success and isinstance(answer.json()["data"], dict):
                data = answer.json()["data"]
                for name, values in known.items():
                    values += [data[name]] if name in data and "/" not in data[name] else []

        await asyncio.gather(*(call(number) for number in range(calls)))
        await check_quiet(client, tally)
    for record_id, quantity, amount in rows(server, _BILLS):
        tally.checks["bills are counts"] += 1
        if not (isinstance(quantity, int) and 0 <= quantity <= MAX_SECONDS_BILLED and amount >= 0):
            tally.fail("bills", "bills are counts", f"{record_id}: {quantity}, {amount}")
    tally.checks["no answer is taken for another's"] += 1
    if (taken := rows(server, _SMUGGLED)) != [(0,)]:
        tally.fail("records", "no answer is taken for another's", f"{taken}")
    tally.checks["memory"] += 1
    if (memory_mb := resident_mb(server)) > MAX_MEMORY_MB:
        tally.fail("the server", "memory", f"{memory_mb} MB")
    for visitor in visitors:
        tally.fail("the server", "follows no redirect", visitor[:300])
    tally.answers.update({("acts of the services", name): times for name, times in gateway.tried.items()})
    note_log(server, tally)
    return tally
