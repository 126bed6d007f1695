"""A provider of HTTP services that does what a test tells it to, right or wrong (PROTOCOL §0).

`HttpProvider.expect` lists one act per request. Connections stay open until an act or the client closes them.
"""

import asyncio
import functools
import json
import socket
import ssl
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from app.dashscope import Credential, HttpClient

API_KEY = "sk-test-0123456789abcdef"
PATIENCE = 5.0
PIECE = 64 * 1024
_load_certificates = functools.cache(ssl.create_default_context)  # takes longer than most tests


@dataclass(frozen=True)
class HttpRequest:
    """What a client asked for; `body` is empty where the provider does not keep bodies."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    connection: int

    def header(self, name: str) -> str | None:
        """The one header of this name."""
        values = [value for each, value in self.headers if each == name.lower()]
        assert len(values) <= 1, values
        return values[0] if values else None

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


@dataclass(eq=False)
class Line:
    """One connection, seen from the provider's side."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    number: int

    async def send(self, data: bytes) -> None:
        """Send anything."""
        self.writer.write(data)
        await self.writer.drain()

    async def hang_up(self) -> None:
        """Close in order."""
        self.writer.close()

    async def reset(self) -> None:
        """Cut the line."""
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()

    async def keep_silent(self) -> None:
        """Say nothing until the client hangs up."""
        await self.reader.read()


Act = Callable[[Line], Awaitable[None]]


class HttpProvider:
    """An HTTP server on a free port that plays its acts, one per request, and writes down what it saw."""

    def __init__(self) -> None:
        self.requests: list[HttpRequest] = []
        self.connections = 0
        self.keeps_bodies = True
        self.url = ""
        self._acts: deque[Act] = deque()
        self._failures: list[Exception] = []
        self._lines: set[Line] = set()
        self._all_closed = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def run(cls) -> AsyncIterator["HttpProvider"]:
        """Serve until the block ends, to clients who retry soon; then fail if something unexpected was asked for."""
        provider = cls()
        conversations: set[asyncio.Task[None]] = set()

        async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            conversations.add(task)
            await provider._converse(reader, writer)

        server = await asyncio.start_server(converse, "127.0.0.1")
        async with server:
            provider.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            with patch("app.dashscope.failures.RETRY_BASE_SECONDS", 0.002):
                yield provider
            for conversation in conversations:
                conversation.cancel()
            await asyncio.gather(*conversations, return_exceptions=True)
        for failure in provider._failures:
            raise failure

    def expect(self, *acts: Act) -> None:
        """Say what happens on the next requests, in order."""
        self._acts.extend(acts)

    @property
    def credential(self) -> Credential:
        """A user's key that is used here."""
        return Credential(API_KEY, "ws://unused.test", f"{self.url}/api/v1")

    @asynccontextmanager
    async def client(self, *, silence_seconds: float = PATIENCE) -> AsyncIterator[HttpClient]:
        """A client that is closed before the provider stops."""
        with patch("ssl.create_default_context", _load_certificates):
            client = HttpClient(handshake_seconds=PATIENCE, silence_seconds=silence_seconds)
        yield client
        await client.close()

    async def all_closed(self) -> None:
        """Wait until no connection is open."""
        async with asyncio.timeout(PATIENCE):
            while self._lines:
                self._all_closed.clear()
                await self._all_closed.wait()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        line = Line(reader, writer, self.connections)
        self._lines.add(line)
        try:
            while not writer.is_closing():
                request = await self._hear(line)
                self.requests.append(request)
                assert self._acts, f"the test did not expect {request.method} {request.target}"
                await self._acts.popleft()(line)
        except (EOFError, ConnectionError):
            pass
        except Exception as failure:
            self._failures.append(failure)
        finally:
            writer.close()
            self._lines.discard(line)
            self._all_closed.set()

    async def _hear(self, line: Line) -> HttpRequest:
        head = (await line.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *rest = head.removesuffix("\r\n\r\n").split("\r\n")
        method, target, _ = first.split(" ")
        headers = [(name.lower(), value.strip()) for name, _, value in (each.partition(":") for each in rest)]
        lengths = [value for name, value in headers if name == "content-length"]
        missing = int(lengths[0]) if lengths else 0
        body = bytearray()
        while missing:
            piece = await line.reader.read(min(missing, PIECE))
            if not piece:
                raise EOFError
            missing -= len(piece)
            if self.keeps_bodies:
                body += piece
        return HttpRequest(method, target, headers, bytes(body), line.number)


def answers(body: object = b"", status: int = 200, **headers: str) -> Act:
    """A whole answer: bytes as they are, anything else as JSON."""
    return lambda line: line.send(written(body, status, **headers))


def refuses(code: str, message: str = "", status: int = 400) -> Act:
    """An error in the native envelope."""
    return answers({"code": code, "message": message, "request_id": "req-refused"}, status)


throttles = refuses("Throttling.RateQuota", "Requests rate limit exceeded, please try again later.", 429)


def sends(data: bytes) -> Act:
    """Bytes that need not be an answer."""
    return lambda line: line.send(data)


def in_turn(*acts: Act) -> Act:
    """Several acts on one request."""

    async def act(line: Line) -> None:
        for each in acts:
            await each(line)

    return act


def written(body: object, status: int = 200, **headers: str) -> bytes:
    """An answer as it travels; `content_type="…"` names a header."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"content_length": str(len(content)), "content_type": "application/json", **headers}
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{name.replace('_', '-')}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content
