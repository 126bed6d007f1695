"""A provider of speech that does what a test tells it to, right or wrong (PROTOCOL §1).

A script is what the provider does on one connection; `Provider.expect` lists one script, or refusal, per connection.
When its script is over, the provider stays on the line until the client hangs up.
"""

import asyncio
import json
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

PATIENCE = 5.0
AUDIO = b"RIFF-audio"

Message = dict[str, Any]


async def happened(event: asyncio.Event) -> None:
    """Wait for something that must happen soon, or fail."""
    async with asyncio.timeout(PATIENCE):
        await event.wait()


class HungUp(Exception):
    """The client has closed the connection that the script wanted to hear something on."""


class Call:
    """One connection, seen from the provider's side. Methods are named for what the provider does."""

    def __init__(self, connection: ServerConnection) -> None:
        self.connection = connection
        self.task_id = ""
        self.messages: list[Message] = []
        self._inbox: asyncio.Queue[Message | None] = asyncio.Queue()
        self._ended = asyncio.Event()

    async def listen(self) -> None:
        """Record what the client sends, to the end of the connection."""
        try:
            async for text in self.connection:
                message: Message = json.loads(text)
                self.messages.append(message)
                self._inbox.put_nowait(message)
        except ConnectionClosed:
            pass
        finally:
            self._inbox.put_nowait(None)
            self._ended.set()

    async def hear(self, action: str) -> Message:
        """The client's next message, which must be of this action."""
        message = await asyncio.wait_for(self._inbox.get(), PATIENCE)
        if message is None:
            raise HungUp
        assert message["header"]["action"] == action
        return message

    async def hear_run_task(self) -> None:
        """Take note of the new task's id."""
        self.task_id = (await self.hear("run-task"))["header"]["task_id"]

    async def hear_text(self) -> str:
        """The client's whole text."""
        message = await self.hear("continue-task")
        await self.hear("finish-task")
        return str(message["payload"]["input"]["text"])

    async def start(self) -> None:
        """Take on a task."""
        await self.hear_run_task()
        await self.event("task-started")

    async def start_and_hear_text(self) -> None:
        """Everything before the first audio."""
        await self.start()
        await self.hear_text()

    async def event(self, name: str, payload: Message | None = None, **header: Any) -> None:
        """Send an event of the running task; `header` adds to its header or replaces parts of it."""
        full_header = {"task_id": self.task_id, "event": name, "attributes": {}} | header
        await self.send(json.dumps({"header": full_header, "payload": payload or {}}))

    async def audio(self, frame: bytes = AUDIO) -> None:
        """Send one frame of audio, after the event that announces it."""
        await self.event("result-generated", {"output": {"type": "sentence-synthesis"}})
        await self.send(frame)

    async def count(self, characters: Any) -> None:
        """End a sentence with the count so far."""
        await self.event("result-generated", {"output": {"type": "sentence-end"}, "usage": {"characters": characters}})

    async def finish(self, characters: int = 4, request_id: str = "req-1") -> None:
        """End the task well."""
        usage = {"usage": {"characters": characters}}
        await self.event("task-finished", usage, attributes={"request_uuid": request_id})

    async def fail(self, code: str, message: str = "") -> None:
        """End the task badly, which ends the connection too."""
        await self.event("task-failed", error_code=code, error_message=message)
        await self.hang_up()

    async def send(self, frame: str | bytes) -> None:
        """Send anything."""
        await self.connection.send(frame)

    async def send_raw(self, data: bytes) -> None:
        """Send bytes that need not be a frame."""
        self.connection.transport.write(data)

    async def hang_up(self) -> None:
        """Close as the protocol wants it."""
        await self.connection.close()

    async def drop(self) -> None:
        """Cut the line without a close frame."""
        self.connection.transport.abort()

    async def ended(self) -> int | None:
        """Wait until the connection is over; the close code that the client sent."""
        await happened(self._ended)
        await asyncio.wait_for(self.connection.wait_closed(), PATIENCE)
        return self.connection.close_code


Script = Callable[[Call], Awaitable[None]]


@dataclass(frozen=True)
class Refusal:
    """An HTTP answer in place of a connection; without a status, no answer at all."""

    status: int | None
    body: str = ""
    location: str | None = None
    retry_after: tuple[str, ...] = ()


class Provider:
    """A WebSocket server on a free port that plays its scripts, one per connection, and writes down what it saw."""

    def __init__(self) -> None:
        self.handshakes: list[Headers] = []
        self.calls: list[Call] = []
        self.url = ""
        self.port = 0
        self._acts: deque[Script | Refusal] = deque()
        self._scripts: dict[ServerConnection, Script] = {}
        self._failures: list[Exception] = []
        self._over = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def run(cls) -> AsyncIterator["Provider"]:
        """Serve until the block ends; then fail if a script failed or an unexpected connection came."""
        provider = cls()
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with serve(
            provider._converse,
            sock=listener,
            process_request=provider._greet,
            compression=None,
            ping_interval=None,
            close_timeout=0.5,
            max_queue=None,
        ):
            provider.port = listener.getsockname()[1]
            provider.url = f"ws://127.0.0.1:{provider.port}/api-ws/v1/inference"
            yield provider
            provider._over.set()
        for failure in provider._failures:
            raise failure

    def expect(self, *acts: Script | Refusal) -> None:
        """Say what happens on the next connections, in order."""
        self._acts.extend(acts)

    @property
    def messages(self) -> list[Message]:
        """Everything that clients sent on all connections."""
        return [message for call in self.calls for message in call.messages]

    @property
    def actions(self) -> list[str]:
        """The actions of all messages."""
        return [message["header"]["action"] for message in self.messages]

    @property
    def texts(self) -> list[str]:
        """Every text that a client sent: each would be paid for."""
        sent = [message for message in self.messages if message["header"]["action"] == "continue-task"]
        return [message["payload"]["input"]["text"] for message in sent]

    async def all_ended(self) -> None:
        """Wait until no connection is open: nothing is on its way any more."""
        for call in self.calls:
            await call.ended()

    async def _greet(self, connection: ServerConnection, request: Request) -> Response | None:
        self.handshakes.append(request.headers)
        if not self._acts:
            self._failures.append(AssertionError("a connection came that the test did not expect"))
            return connection.respond(400, "")
        act = self._acts.popleft()
        if not isinstance(act, Refusal):
            self._scripts[connection] = act
            return None
        if act.status is None:
            await self._over.wait()
        response = connection.respond(act.status or 503, act.body)
        if act.location:
            response.headers["Location"] = act.location
        for value in act.retry_after:
            response.headers["Retry-After"] = value
        return response

    async def _converse(self, connection: ServerConnection) -> None:
        call = Call(connection)
        self.calls.append(call)
        listening = asyncio.create_task(call.listen())
        try:
            await self._scripts.pop(connection)(call)
        except (HungUp, ConnectionClosed):
            pass
        except Exception as failure:
            self._failures.append(failure)
            await call.hang_up()
        await listening


def speaks(*frames: bytes, characters: int = 4, request_id: str = "req-1") -> Script:
    """One task from start to end, as the protocol has it."""

    async def script(call: Call) -> None:
        await call.start_and_hear_text()
        for frame in frames or (AUDIO,):
            await call.audio(frame)
        await call.finish(characters, request_id)

    return script


def throttles(call: Call) -> Awaitable[None]:
    """Refuse a task because too many came at once."""
    return in_turn(Call.hear_run_task, fails("Throttling.RateQuota", "Requests rate limit exceeded"))(call)


def fails(code: str, message: str = "") -> Script:
    """End the task badly."""
    return lambda call: call.fail(code, message)


def sends(frame: str | bytes) -> Script:
    """One frame of anything."""
    return lambda call: call.send(frame)


def in_turn(*scripts: Script) -> Script:
    """Several scripts on the same connection."""

    async def script(call: Call) -> None:
        for each in scripts:
            await each(call)

    return script
