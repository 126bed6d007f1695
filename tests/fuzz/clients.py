"""Clients of the live endpoint who say anything, in any order, and leave in any way."""

import asyncio
import base64
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from random import Random
from urllib.parse import quote, urlsplit

from tests.databases import rows
from tests.fuzz import odd
from tests.fuzz.callers import MAX_MEMORY_MB, SETTLED_SECONDS, check_quiet, client_of, resident_mb
from tests.fuzz.house import House, note_log, take_token
from tests.fuzz.sockets import BINARY, CLOSE, CONTINUATION, PING, TEXT, frame, read_frame, read_head
from tests.fuzz.tally import Tally

PATH = "/api/audio/tts/stream"
VISIT_SECONDS = 30.0
KEY = "sk-test-fuzz-of-clients"
_HIS = "replace(CAST(user_id AS TEXT), '-', '') = ?"
_RUNNING = f"SELECT count(*) FROM records WHERE status = 'running' AND {_HIS}"  # noqa: S608
_BILLED = f"SELECT coalesce(sum(quantity), 0) FROM bills WHERE {_HIS}"  # noqa: S608
_GONE = (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError)


async def visit(house: House, *, visits: int, at_once: int, seed: int) -> Tally:
    """Have so many clients behave oddly, and look at what they leave behind."""
    tally = Tally("clients")
    token = await asyncio.to_thread(take_token, house.server, KEY)
    turns = asyncio.Semaphore(at_once)

    async def one(number: int) -> None:
        async with turns:
            visitor = _Visitor(Random(f"{seed}-{number}"), house.server.url, token)
            try:
                async with asyncio.timeout(VISIT_SECONDS):
                    await visitor.come()
            except TimeoutError:
                tally.fail("clients", "are let go", f"visit {number}: {visitor.said}")
            tally.checks["are let go"] += 1
            tally.cases.update(visitor.said)

    await asyncio.gather(*(one(number) for number in range(visits)))
    await _check_traces(house, token, tally)
    return tally


async def _check_traces(house: House, token: str, tally: Tally) -> None:
    deadline = time.monotonic() + SETTLED_SECONDS
    async with client_of(house.server, token) as client:
        user_id = (await client.get("/api/user/me")).json()["data"]["user_id"].replace("-", "")
        while rows(house.server, _RUNNING, user_id) != [(0,)] and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
        tally.checks["every record has an end"] += 1
        if (left := rows(house.server, _RUNNING, user_id)) != [(0,)]:
            tally.fail("records", "every record has an end", f"{left}")
        await check_quiet(client, tally)
    counted = sum(work["counted"] for work in await asyncio.to_thread(house.sandbox.ledger, KEY))
    [(billed,)] = rows(house.server, _BILLED, user_id)
    tally.checks["bills are what was counted"] += 1
    if counted != billed:
        tally.fail("records", "bills are what was counted", f"{billed} billed, {counted} counted")
    tally.checks["memory"] += 1
    if (memory_mb := resident_mb(house.server)) > MAX_MEMORY_MB:
        tally.fail("the server", "memory", f"{memory_mb} MB")
    note_log(house.server, tally)


class _Visitor:
    def __init__(self, chance: Random, url: str, token: str) -> None:
        self._chance = chance
        self._address = urlsplit(url)
        self._token = token
        self.said: list[str] = []

    async def come(self) -> None:
        reader, writer = await asyncio.open_connection(self._address.hostname, self._address.port)
        listening = None
        with suppress(*_GONE):
            self._greet(writer)
            first, _ = await read_head(reader)
            if " 101 " in first:
                listening = asyncio.create_task(_listen(reader))
                for _ in range(self._chance.randrange(12)):
                    await self._speak(writer)
                await self._leave(writer, listening)
        if listening is not None:
            listening.cancel()
            await asyncio.wait([listening])
        writer.transport.abort()

    def _greet(self, writer: asyncio.StreamWriter) -> None:
        chance = self._chance
        token = chance.choices(
            (self._token, "", "x", "a.b.c", self._token[:-2], "é", "x" * 5000, f"{self._token}.x"),
            (20, 1, 1, 1, 1, 1, 1, 1),
        )[0]
        query = {"model": "cosyvoice-v3-flash", "voice": "longanyang"}
        if chance.random() < 0.25:
            names = (
                "model",
                "voice",
                "format",
                "sample_rate",
                "volume",
                "speech_rate",
                "pitch_rate",
                "instruction",
                "token",
                "x",
            )
            query[chance.choice(names)] = str(chance.choice((*odd.SCALARS, "wav", "opus", "48000", "101", "0.5")))
        headers = ["Host: x", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"]
        headers.append(f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}")
        match chance.choices(("header", "query", "protocol", "odd"), (12, 2, 2, 1))[0]:
            case "header":
                headers.append(f"Authorization: Bearer {token}")
            case "query":
                query["token"] = token
            case "protocol":
                headers.append(f"Sec-WebSocket-Protocol: {chance.choice(('', 'x, ', 'bearer, '))}bearer.{token}")
            case _:
                odd_headers = (
                    "Authorization: Basic x",
                    "Sec-WebSocket-Protocol: ,,",
                    "Sec-WebSocket-Extensions: permessage-deflate",
                )
                headers.append(chance.choice(odd_headers))
        asked = "&".join(f"{name}={quote(told, safe='', errors='surrogatepass')}" for name, told in query.items())
        writer.write("\r\n".join([f"GET {PATH}?{asked} HTTP/1.1", *headers, "", ""]).encode("utf-8", "replace"))

    async def _speak(self, writer: asyncio.StreamWriter) -> None:
        name = self._chance.choices(tuple(_SPEECH), tuple(weight for weight, _ in _SPEECH.values()))[0]
        self.said.append(name)
        writer.write(_SPEECH[name][1](self._chance))
        await writer.drain()
        if self._chance.random() < 0.3:
            await asyncio.sleep(self._chance.random() * 0.05)

    async def _leave(self, writer: asyncio.StreamWriter, listening: "asyncio.Task[None]") -> None:
        name = self._chance.choice(("leave: close", "leave: abort", "leave: half", "leave: wait", "leave: odd close"))
        self.said.append(name)
        match name:
            case "leave: close":
                writer.write(frame(CLOSE, b"\x03\xe8", masked=True))
            case "leave: odd close":
                payload = self._chance.choice(
                    (b"", b"\x03", b"\x03\xe7", b"\xff\xff", b"\x03\xe8\xff", b"\x0f\xa0" + b"x" * 123)
                )
                writer.write(frame(CLOSE, payload, masked=True))
            case "leave: half":
                writer.write_eof()
            case "leave: wait":
                writer.write(_say({"type": "end"}))
            case _:
                return
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(listening), 1.0)


async def _listen(reader: asyncio.StreamReader) -> None:
    with suppress(*_GONE):
        while (await read_frame(reader))[0] != CLOSE:
            pass


def _say(message: object) -> bytes:
    return frame(TEXT, odd.json_bytes(message), masked=True)


def _text(chance: Random) -> bytes:
    content = chance.choice(
        ("今天天气真好。", "你好", "Hello.", " ", "", "。", "😀", "<speak>你好</speak>", "é" * 50, "\t\n")
    )
    return _say({"type": "text", "content": content})


def _fragments(chance: Random) -> bytes:
    whole = json.dumps({"type": "text", "content": "你好。"}, ensure_ascii=False).encode()
    cut = chance.randrange(len(whole))
    parts = [frame(TEXT, whole[:cut], fin=False, masked=True), frame(PING, b"", masked=True)]
    return b"".join([*parts, frame(CONTINUATION, whole[cut:], masked=True)])


def _odd_frame(chance: Random) -> bytes:
    return chance.choice(
        (
            frame(TEXT, b"{}"),  # not masked
            frame(TEXT, b"{}", masked=True, reserved=chance.randrange(1, 8)),
            frame(chance.choice((3, 7, 11, 15)), b"x", masked=True),
            frame(TEXT, b"\xff\xfe", masked=True),
            frame(CONTINUATION, b"x", masked=True),
            frame(PING, b"x" * 126, masked=True),
            frame(TEXT, b"x", fin=False, masked=True) + frame(TEXT, b"x", masked=True),
            b"\x81\xff" + b"\xff" * 12,
            b"\x81\xff\x00\x00\x00\x7f\x00\x00\x00\x00\x00\x00\x00\x00",
            chance.randbytes(30),
        )
    )


_SPEECH: dict[str, tuple[int, Callable[[Random], bytes]]] = {
    "text": (30, _text),
    "end": (8, lambda _: _say({"type": "end"})),
    "flush": (6, lambda _: _say({"type": "flush"})),
    "cancel": (5, lambda _: _say({"type": "cancel"})),
    "ping": (3, lambda chance: frame(PING, chance.randbytes(chance.randrange(125)), masked=True)),
    "fragments": (3, _fragments),
    "long text": (1, lambda _: _say({"type": "text", "content": "好" * 20_001})),
    "odd content": (2, lambda chance: _say({"type": "text", "content": odd.value(chance)})),
    "odd type": (2, lambda chance: _say({"type": odd.value(chance), "content": "x"})),
    "odd message": (2, lambda chance: _say(odd.value(chance))),
    "odd document": (2, lambda chance: frame(TEXT, odd.document(chance), masked=True)),
    "binary": (1, lambda chance: frame(BINARY, chance.randbytes(50), masked=True)),
    "empty": (1, lambda _: frame(TEXT, b"", masked=True)),
    "large": (1, lambda _: frame(TEXT, b'"' + b"x" * 2_000_000 + b'"', masked=True)),
    "odd frame": (2, _odd_frame),
}
