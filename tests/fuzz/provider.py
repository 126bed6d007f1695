"""A CosyVoice that does what it should not, whenever it likes (PROTOCOL §1)."""

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from random import Random
from typing import Any

from tests.fuzz import odd
from tests.fuzz.sockets import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, accept_key, frame, read_frame, read_head

CLOSE_CODES = (
    999,
    1000,
    1001,
    1002,
    1003,
    1005,
    1006,
    1007,
    1008,
    1009,
    1010,
    1011,
    1012,
    1013,
    1015,
    3000,
    4999,
    65535,
)
LONG_SECONDS = 4.0  # more than what is waited for an answer
# A connection that was broken in the middle of a frame says anything: what came of it is seen on the client's side.
_GONE = (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError)


class Left(Exception):
    """This connection says no more."""


class HostileProvider:
    """Serves the WebSocket, and keeps what it told: of each text the counts."""

    def __init__(self, seed: int, trap_url: str) -> None:
        self.trap_url = trap_url
        self.tried: Counter[str] = Counter()
        self.told: defaultdict[str, list[int]] = defaultdict(list)
        self.breaches: list[str] = []
        self._seed = seed
        self._connections = 0

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Serve inside the block; gives the URL."""
        server = await asyncio.start_server(self._meet, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            yield f"ws://127.0.0.1:{port}/api-ws/v1/inference"

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        chance = Random(f"{self._seed}-{self._connections}")
        with suppress(Left, *_GONE, asyncio.CancelledError):  # the last is the end of the run
            await _Visit(self, chance, reader, writer).run()
        writer.transport.abort()


class _Visit:
    def __init__(
        self, provider: HostileProvider, chance: Random, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._provider, self._chance, self._reader, self._writer = provider, chance, reader, writer
        self._is_broken = False
        self._task_id = ""
        self._text = ""

    async def run(self) -> None:
        _, headers = await read_head(self._reader)
        if self._chance.random() < 0.15:
            await self._answer_handshake(headers)
        self._writer.write(_switching(accept_key(headers["sec-websocket-key"])))
        while True:
            message = await self._hear("run-task")
            if self._is_broken:
                self._provider.breaches.append("a connection that had broken the protocol was given another task")
            self._task_id, self._text = message["header"]["task_id"], ""
            await self._work()

    # ---- Handshakes

    async def _answer_handshake(self, headers: dict[str, str]) -> None:
        chance, key = self._chance, accept_key(headers.get("sec-websocket-key", ""))
        status = chance.choice((200, 204, 301, 302, 307, 308, 400, 401, 403, 404, 426, 429, 500, 502, 503, 599))
        body = chance.choice((odd.document(chance), odd.json_bytes({"code": chance.choice(odd.CODES), "message": "x"})))
        location = f"Location: {self._provider.trap_url}\r\n" if status in range(301, 309) else ""
        retry = f"Retry-After: {chance.choice(('1', '-1', 'x', '9' * 400, 'Wed, 21 Oct 2099 07:28:00 GMT'))}\r\n"
        refusal = f"HTTP/1.1 {status} X\r\n{location}{retry}Content-Length: {len(body)}\r\n\r\n".encode() + body
        name, answer = chance.choice(
            (
                ("handshake: refusal", refusal),
                ("handshake: redirect", refusal),
                ("handshake: garbage", chance.randbytes(400) + b"\r\n\r\n"),
                ("handshake: nothing", b""),
                ("handshake: half", _switching(key)[:40]),
                ("handshake: wrong key", _switching("AAAA")),
                ("handshake: no upgrade", b"HTTP/1.1 101 X\r\n\r\n"),
                ("handshake: extension", _switching(key, "Sec-WebSocket-Extensions: permessage-deflate\r\n")),
                ("handshake: subprotocol", _switching(key, "Sec-WebSocket-Protocol: x\r\n")),
                ("handshake: long header", _switching(key, f"X: {'x' * 100_000}\r\n")),
                ("handshake: many headers", _switching(key, "X: y\r\n" * 1000)),
                ("handshake: zero in header", _switching(key, "X: \0\r\n")),
                ("handshake: endless body", b"HTTP/1.1 500 X\r\n\r\n" + b"x" * 3_000_000),
                ("handshake: wrong length", b"HTTP/1.1 403 X\r\nContent-Length: -1\r\n\r\n"),
            )
        )
        self._provider.tried[name] += 1
        self._writer.write(answer)
        await self._writer.drain()
        if name == "handshake: redirect" or chance.random() < 0.3:
            await asyncio.sleep(LONG_SECONDS if name in {"handshake: nothing", "handshake: half"} else 0.05)
        raise Left

    # ---- Tasks

    async def _work(self) -> None:
        chance = self._chance
        while chance.random() < 0.1:
            await self._do("before start", chance.choice((self._say_odd, self._send_sound, self._be_odd)))
        if chance.random() < 0.95:
            await self._event("task-started")
        if chance.random() < 0.9:
            await self._hear_text()
        for _ in range(chance.randrange(6)):
            act = chance.choices((self._speak, self._say_odd, self._be_odd), (0.75, 0.15, 0.1))[0]
            await self._do("task", act)
        await self._do("end", chance.choices((self._finish, self._fail, self._say_odd, self._be_odd), (6, 2, 1, 1))[0])
        if chance.random() < 0.1:
            was_broken = self._is_broken
            await self._do("after the end", chance.choice((self._say_odd, self._send_sound, self._be_odd)))
            self._is_broken = was_broken  # nobody listens until the next task

    async def _do(self, when: str, act: Any) -> None:
        self._provider.tried[f"{when}: {act.__name__.strip('_').replace('_', ' ')}"] += 1
        await act()
        await self._writer.drain()

    async def _hear(self, action: str) -> dict[str, Any]:
        while True:
            opcode, payload = await read_frame(self._reader)
            if opcode == PING:
                self._writer.write(frame(PONG, payload))
            if opcode == CLOSE:
                self._writer.write(frame(CLOSE, payload))
                raise Left
            message: dict[str, Any] = json.loads(payload) if opcode == TEXT else {"header": {}}
            if message["header"].get("action") == action:
                return message

    async def _hear_text(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(2):
                while not self._text:
                    self._text = (await self._hear("continue-task"))["payload"]["input"].get("text", "")

    async def _event(self, name: str, payload: Any = None, **header: Any) -> None:
        event = {
            "header": {"task_id": self._task_id, "event": name, "attributes": {}, **header},
            "payload": payload or {},
        }
        self._writer.write(frame(TEXT, odd.json_bytes(event)))

    def _count(self) -> int:
        count = self._chance.choice((0, 1, 2, 5, 20))
        self._provider.told[self._text].append(count)
        return count

    async def _send_sound(self) -> None:
        self._writer.write(frame(BINARY, bytes(self._chance.choice((0, 1, 7, 1000, 8000, 100_000)))))

    async def _speak(self) -> None:
        output = {"type": "sentence-synthesis", "sentence": {"index": 0, "words": []}}
        await self._event("result-generated", {"output": output})
        await self._send_sound()
        if self._chance.random() < 0.4:
            ended = {"type": "sentence-end", "original_text": self._text, "sentence": {"index": 0, "words": []}}
            await self._event("result-generated", {"output": ended, "usage": {"characters": self._count()}})

    async def _finish(self) -> None:
        attributes = {"request_uuid": self._chance.choice(("r", "", "\0", "x" * 3000, None, 5))}
        await self._event("task-finished", {"usage": {"characters": self._count()}}, attributes=attributes)

    async def _fail(self) -> None:
        self._is_broken = True
        told = {"error_code": self._chance.choice(odd.CODES), "error_message": self._chance.choice(odd.MESSAGES)}
        await self._event("task-failed", None, **told)
        if self._chance.random() < 0.5:
            raise Left

    async def _say_odd(self) -> None:
        """An event that is none, or one of somebody else's."""
        chance = self._chance
        counted: dict[str, Any] = {
            "usage": {"characters": chance.choice((-1, 1.5, "5", True, 10**12, 2**64, [], {"a": 1}))}
        }
        good = {
            "header": {"task_id": self._task_id, "event": "result-generated", "attributes": {"request_uuid": "r"}},
            "payload": {"output": {"type": "sentence-end", "original_text": "x", "sentence": {"words": []}}},
        }
        kind = chance.randrange(6)
        if kind == 0:
            self._is_broken = True
            self._writer.write(frame(TEXT, chance.choice((b"x", b"[]", b"1", b"{}", b'{"header":[]}', b"[" * 50_000))))
        elif kind == 1:
            self._is_broken = True
            await self._event("result-generated", counted)
        elif kind == 2:
            await self._event(
                chance.choice(("task-started", "result-generated", "x", "")), {"output": odd.value(chance)}
            )
        elif kind == 3:
            # Before the task, it may be the late word of another; in the task, it breaks the protocol.
            self._is_broken = bool(self._text) or self._is_broken
            await self._event(chance.choice(("result-generated", "task-failed")), task_id="0" * 32)
        elif kind == 4:
            self._writer.write(frame(TEXT, odd.json_bytes(odd.spoil(good, chance))))
        else:
            words = [odd.value(chance) for _ in range(5)]
            output = {"type": odd.value(chance), "sentence": {"words": words}, "original_text": odd.value(chance)}
            await self._event("result-generated", {"output": output})

    async def _be_odd(self) -> None:
        """What no WebSocket does."""
        self._is_broken = True
        chance = self._chance
        match chance.randrange(14):
            case 0:
                self._writer.write(frame(TEXT, b"\xff\xfe{}"))
            case 1:
                self._writer.write(frame(TEXT, b"{}", reserved=chance.randrange(1, 8)))
            case 2:
                self._writer.write(frame(TEXT, b"{}", masked=True))
            case 3:
                self._writer.write(frame(chance.choice((3, 7, 11, 15)), b"x"))
            case 4:
                self._writer.write(frame(BINARY, bytes(5 * 1024 * 1024)))
            case 5:
                self._writer.write(frame(CONTINUATION, b"x"))
            case 6:
                self._writer.write(frame(TEXT, b'{"he', fin=False) + frame(TEXT, b"x"))
            case 7:
                code = chance.choice(CLOSE_CODES)
                self._writer.write(frame(CLOSE, code.to_bytes(2, "big") + chance.choice((b"", b"x" * 123, b"\xff"))))
                raise Left
            case 8:
                self._writer.write(frame(CLOSE, chance.choice((b"", b"\x03"))))
                await asyncio.sleep(0.1)
                raise Left
            case 9:
                raise Left
            case 10:
                self._writer.write_eof()
                await asyncio.sleep(LONG_SECONDS)
                raise Left
            case 11:
                await asyncio.sleep(LONG_SECONDS)
                raise Left
            case 12:
                await self._go_on(frame(BINARY, bytes(60_000)))
            case _:
                await self._go_on(chance.choice((frame(PING, b"x" * 100), frame(CONTINUATION, b"", fin=False))) * 50)

    async def _go_on(self, piece: bytes) -> None:
        """Say the same again and again, for longer than anybody should listen."""
        if len(piece) > 50_000:
            for _ in range(1500):
                self._writer.write(piece)
                await self._writer.drain()
            return
        self._writer.write(frame(BINARY, b"x", fin=False))
        for _ in range(200):
            self._writer.write(piece)
            await self._writer.drain()
            await asyncio.sleep(LONG_SECONDS / 200)


def _switching(key: str, more: str = "") -> bytes:
    return (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {key}\r\n{more}\r\n"
    ).encode()
