"""HTTP as cheap as it gets, so that the load leaves the processor to those who bear it: a connection for each call."""

import asyncio
import hashlib
import json
import time
from dataclasses import dataclass, field
from typing import Any

LARGEST_LINE = 256 * 1024


@dataclass
class Answer:
    """What came back: `status` is 0 where nothing did, and what broke off is not `is_whole`. `heard_at` is a moment."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    size: int = 0
    digest: str = ""
    heard_at: float = 0.0
    is_whole: bool = False

    @property
    def data(self) -> Any:
        """The data of an envelope."""
        return json.loads(self.body)["data"]

    @property
    def error(self) -> str:
        """The name of the error, empty where there is none."""
        is_told = self.status >= 400 and self.headers.get("content-type", "").startswith("application/json")
        return str(json.loads(self.body)["error"]) if is_told and self.is_whole else ""


class Listening:
    """How many answers are being listened to, now and at most."""

    def __init__(self) -> None:
        self.now = 0
        self.most = 0

    def begin(self) -> None:
        """One more."""
        self.now += 1
        self.most = max(self.most, self.now)

    def end(self) -> None:
        """One less."""
        self.now -= 1


async def call(
    port: int,
    method: str,
    path: str,
    headers: dict[str, str],
    body: dict[str, Any] | None = None,
    listening: Listening | None = None,
) -> Answer:
    """Ask a server of the loopback. With `listening`, audio is measured and not kept. Never raises for a connection."""
    answer = Answer()
    sent = b"" if body is None else json.dumps(body).encode()
    head = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Connection: close"]
    head += [f"{name}: {value}" for name, value in headers.items()]
    if body is not None:
        head += ["Content-Type: application/json", f"Content-Length: {len(sent)}"]
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=LARGEST_LINE)
        try:
            writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + sent)
            await _read(reader, answer, listening)
        finally:
            writer.close()
    except (OSError, EOFError, ValueError):
        answer.is_whole = False
    return answer


async def _read(reader: asyncio.StreamReader, answer: Answer, listening: Listening | None) -> None:
    status, *fields = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    for line in fields:
        name, _, value = line.partition(": ")
        answer.headers[name.lower()] = value
    answer.status = int(status.split(" ")[1])
    keeps = listening is None or answer.status != 200
    digest, kept = hashlib.sha256(), bytearray()

    def take(piece: bytes) -> None:
        if not answer.size:
            answer.heard_at = time.time()
        answer.size += len(piece)
        digest.update(piece)
        if keeps:
            kept.extend(piece)

    if listening is not None:
        listening.begin()
    try:
        if answer.headers.get("transfer-encoding") == "chunked":
            while size := int(await reader.readuntil(b"\r\n"), 16):
                take((await reader.readexactly(size + 2))[:-2])
            await reader.readexactly(2)
        else:
            left = int(answer.headers.get("content-length", 0))
            while left:
                piece = await reader.read(min(left, LARGEST_LINE))
                if not piece:
                    return
                left -= len(piece)
                take(piece)
        answer.is_whole = True
    finally:
        if listening is not None:
            listening.end()
        answer.body, answer.digest = bytes(kept), digest.hexdigest()
