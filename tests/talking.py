"""Live text to speech as a client has it: one WebSocket, text out, audio and messages in."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from tests.conftest import Account
from tests.databases import rows
from tests.servers import Sandbox, Server

MODEL, VOICE = "cosyvoice-v3-flash", "longanyang"
YUAN_PER_CHARACTER = 0.000014335
PATIENCE_SECONDS = 15.0
SENTENCE = "今天天气真好。"
LONG_TEXT = "今天天气真好，我们一起去公园散步吧。" * 12

Messages = list[dict[str, Any]]


@dataclass
class Heard:
    """What came before a message, and when each piece of it did."""

    message: dict[str, Any]
    audio: bytes
    arrivals: list[float]
    at: float = field(default_factory=time.monotonic)


@dataclass
class Refusal:
    """An error message, and the code of the close that followed it."""

    message: dict[str, Any]
    close_code: int | None
    audio: bytes

    @property
    def brief(self) -> tuple[int, str, int | None]:
        """Status, name and close code."""
        return self.message["code"], self.message["error"], self.close_code


class Talk:
    """A session from the client's side."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self._audio = bytearray()
        self._arrivals: list[float] = []

    async def send(self, **message: Any) -> None:
        """Send one message."""
        await self.socket.send(json.dumps(message))

    async def say(self, *texts: str) -> None:
        """Send texts, each as a message of its own."""
        for text in texts:
            await self.send(type="text", content=text)

    async def end(self) -> None:
        """Say that the utterance is complete."""
        await self.send(type="end")

    async def flush(self) -> None:
        """Have what was said so far spoken."""
        await self.send(type="flush")

    async def cancel(self) -> None:
        """Have the speaking stopped."""
        await self.send(type="cancel")

    async def hear(self, patience: float = PATIENCE_SECONDS) -> Heard:
        """Listen up to the next message."""
        async with asyncio.timeout(patience):
            while isinstance(frame := await self.socket.recv(), bytes):
                self._keep(frame)
        heard = Heard(json.loads(frame), bytes(self._audio), self._arrivals)
        self._audio, self._arrivals = bytearray(), []
        return heard

    async def hear_some(self, size: int = 1, patience: float = PATIENCE_SECONDS) -> None:
        """Listen until that many bytes of audio have come since the last message."""
        async with asyncio.timeout(patience):
            while len(self._audio) < size:
                frame = await self.socket.recv()
                assert isinstance(frame, bytes), frame
                self._keep(frame)

    async def hear_for(self, seconds: float) -> int:
        """How many bytes of audio come within this time; a message is none."""
        before = len(self._audio)
        try:
            await self.hear_some(1 << 40, seconds)
        except TimeoutError:
            return len(self._audio) - before
        raise AssertionError("unreachable: nobody hears that much")

    async def speak(self, *texts: str) -> Heard:
        """Have a whole utterance spoken."""
        await self.say(*texts)
        await self.end()
        return await self.hear()

    async def refusal(self, patience: float = PATIENCE_SECONDS) -> Refusal:
        """Listen up to an error, and to the close that has to follow it."""
        heard = await self.hear(patience)
        assert heard.message.keys() == {"type", "code", "error", "message"}, heard.message
        assert heard.message["type"] == "error"
        return Refusal(heard.message, await self.close_code(), heard.audio)

    async def close_code(self, patience: float = PATIENCE_SECONDS) -> int | None:
        """Wait until the server closes, saying nothing more, and give the code."""
        async with asyncio.timeout(patience):
            try:
                while True:
                    frame = await self.socket.recv()
                    assert isinstance(frame, bytes), frame
            except ConnectionClosed as closed:
                return closed.rcvd.code if closed.rcvd else None

    async def close_code_after_messages(self) -> int | None:
        """The code of the close, whatever is said before it."""
        while True:
            try:
                return await self.close_code()
            except AssertionError:
                continue

    def vanish(self) -> None:
        """Be gone without a word."""
        self.socket.transport.abort()

    def _keep(self, frame: bytes) -> None:
        self._audio += frame
        self._arrivals.append(time.monotonic())


def live_url(server: Server, **parameters: Any) -> str:
    """The address of a session, with the usual model and voice unless others are named; None leaves one out."""
    asked = {"model": MODEL, "voice": VOICE, **parameters}
    query = urlencode({name: value for name, value in asked.items() if value is not None})
    return f"{server.url.replace('http', 'ws', 1)}/api/audio/tts/stream?{query}"


def token_of(account: Account) -> str:
    """The login token of a user."""
    return str(account.client.headers["Authorization"]).removeprefix("Bearer ")


@asynccontextmanager
async def talking(
    server: Server,
    account: Account | None,
    *,
    headers: dict[str, str] | None = None,
    subprotocols: list[str] | None = None,
    max_queue: int = 16,
    **parameters: Any,
) -> AsyncIterator[Talk]:
    """Open a session of a user; without one, nobody is told to be there."""
    sent = {"Authorization": f"Bearer {token_of(account)}"} if account else {}
    async with connect(
        live_url(server, **parameters),
        additional_headers={**sent, **(headers or {})},
        subprotocols=[Subprotocol(each) for each in subprotocols] if subprotocols else None,
        compression=None,
        max_queue=max_queue,
        close_timeout=2,
        proxy=None,
    ) as socket:
        yield Talk(socket)


async def record(account: Account) -> dict[str, Any]:
    """The user's only record, once it has its end."""
    [item] = await records(account, 1)
    return item


async def records(account: Account, number: int) -> list[dict[str, Any]]:
    """The user's records, the oldest first, once there are that many and all have their ends."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    items: list[dict[str, Any]] = []
    while time.monotonic() < deadline:
        items = (await account.history(page_size=100))["items"]
        if len(items) >= number and all(item.get("status") != "running" for item in items):
            assert len(items) == number, items
            return items[::-1]
        await asyncio.sleep(0.05)
    raise AssertionError(f"{number} settled records were expected: {items}")


async def provider_calls(sandbox: Sandbox, account: Account, number: int = 1) -> list[dict[str, Any]]:
    """The user's tasks at the provider, once there are that many and all have their ends."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    calls: list[dict[str, Any]] = []
    while time.monotonic() < deadline:
        calls = await asyncio.to_thread(sandbox.calls, account.api_key)
        if len(calls) >= number and all(call["outcome"] for call in calls):
            assert len(calls) == number, calls
            return calls
        await asyncio.sleep(0.05)
    raise AssertionError(f"{number} finished tasks were expected: {calls}")


async def kept_audio(account: Account, item: dict[str, Any]) -> bytes:
    """The audio of a record, as a player gets it: without a token."""
    request = account.client.build_request("GET", item["output_url"])
    del request.headers["Authorization"]
    answer = await account.client.send(request)
    assert answer.status_code == 200, answer.text
    return answer.content


def cost(characters: int) -> str:
    """What so many characters cost, as clients see it."""
    return f"{characters * YUAN_PER_CHARACTER:.4f}" if characters else "0"


def bills(server: Server) -> list[tuple[int, int]]:
    """Quantity of each bill line, and whether it is an estimate; as they are on disk."""
    return rows(server, "SELECT quantity, estimated FROM bills ORDER BY record_id")


def statuses(server: Server) -> list[str]:
    """The status of every record, as it is on disk."""
    return [status for (status,) in rows(server, "SELECT status FROM records ORDER BY id")]
