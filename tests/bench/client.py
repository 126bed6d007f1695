"""HTTP as cheap as it gets, so that the processor is left to what is measured: a kept connection per caller."""

import asyncio
import json
from typing import Any, cast

from httptools import HttpResponseParser

from tests.bench.heard import Heard

SYNTHESIZE = "/api/audio/tts/synthesize"
SYNTHESIZE_LONG = "/api/audio/tts/synthesize-long"


class Refused(Exception):
    """An answer that is no success."""


class Answer:
    """What came back; the body of a stream is measured and not kept."""

    def __init__(self, heard: Heard, *, is_stream: bool) -> None:
        self.heard, self.status, self.body = heard, 0, bytearray()
        self._is_stream = is_stream

    def take(self, piece: bytes) -> None:
        """Some of the body."""
        self.heard.hear(piece)
        if not self._is_stream or self.status != 200:
            self.body += piece

    def require_success(self) -> "Answer":
        """Raises Refused."""
        if self.status != 200 or not self.heard.is_whole:
            raise Refused(f"{self.status}: {bytes(self.body[:300]).decode(errors='replace')}")
        return self

    @property
    def data(self) -> Any:
        """The data of an envelope."""
        return json.loads(self.body)["data"]


class Caller(asyncio.Protocol):
    """Somebody who asks one server, one thing after the other."""

    def __init__(self, port: int, token: str = "") -> None:
        self._port, self._token = port, token
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._parser: Any = None
        self._over = asyncio.Event()

    async def ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        is_stream: bool = False,
        keeps: bool = False,
    ) -> Answer:
        """Ask, and wait for the whole answer; `keeps` the pieces of its body with their moments.

        A connection that breaks gives an answer that is not whole. Raises OSError where none can be made.
        """
        if self._transport is None:
            await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", self._port)
        assert self._transport is not None
        sent = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n"
        if self._token:
            head += f"Authorization: Bearer {self._token}\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n"
        answer = self._answer = Answer(Heard(pieces=[] if keeps else None), is_stream=is_stream)
        self._over.clear()
        self._transport.write(head.encode() + b"\r\n" + sent)
        try:
            await self._over.wait()
        finally:
            self._answer = None
            if not answer.heard.is_whole:
                self.hang_up()
        return answer

    async def get(self, path: str) -> Answer:
        """Ask for something. Raises Refused."""
        return (await self.ask("GET", path)).require_success()

    @property
    def is_free(self) -> bool:
        """Whether no answer is being waited for."""
        return self._answer is None

    def hang_up(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    # ---- What the loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The server is there."""
        self._transport, self._parser = cast(asyncio.Transport, transport), HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        """The server says something."""
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """The server has gone."""
        self._transport = None
        if self._answer is not None and self._answer.heard.ended_at is None:
            self._answer.heard.end(is_whole=False)
        self._over.set()

    # ---- What the parser calls

    def on_headers_complete(self) -> None:
        """The body begins."""
        if self._answer is not None:
            self._answer.status = self._parser.get_status_code()

    def on_body(self, piece: bytes) -> None:
        """Some of the body."""
        if self._answer is not None:
            self._answer.take(piece)

    def on_message_complete(self) -> None:
        """The whole answer is there."""
        if self._answer is not None:
            self._answer.heard.end(is_whole=True)
        self._over.set()


def order(text: str, **more: Any) -> dict[str, Any]:
    """The body of a synthesis."""
    return {"model": "cosyvoice-v3-flash", "voice": "longanyang", "text": text, "format": "mp3", **more}
