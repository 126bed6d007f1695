"""A provider of speech that costs next to no processor: it replays a recording (PROTOCOL §1).

`python -m tests.bench.stand_in --port N`. A text such as `12 frames every 200 ms after 100 ms` says how it is spoken;
any other is spoken as fast as `--speed` says. Pieces of pcm begin with the moment at which they were sent, in
nanoseconds of CLOCK_MONOTONIC, which all processes share. `GET /tasks` tells when each task was spoken.
"""

import argparse
import asyncio
import json
import math
import re
import struct
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, cast

import uvloop
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol

from tests.bench.recording import PIECE_BYTES, mp3_pieces, pcm_pieces

STARTED_AFTER_SECONDS = 0.002
SECONDS_PER_CHARACTER = 0.05  # of audio; a Han character counts two
FIRST_AUDIO_SECONDS = 0.2
REMEMBERED_TASKS = 5000
STAMP = struct.Struct("<Q")
_PACE = re.compile(r"(\d+) frames every (\d+) ms after (\d+) ms")


@dataclass(frozen=True, slots=True)
class Pace:
    """How a text is spoken: so many pieces, the first so long after the text, and one every so often."""

    pieces: int
    every_seconds: float
    first_seconds: float

    def as_text(self) -> str:
        """The text that is spoken so."""
        return f"{self.pieces} frames every {self.every_seconds * 1000:.0f} ms after {self.first_seconds * 1000:.0f} ms"

    @property
    def seconds(self) -> float:
        """From the text to the last piece."""
        return self.first_seconds + (self.pieces - 1) * self.every_seconds


def read_pace(text: str, bytes_per_second: int, speed: float) -> Pace:
    """The pace that a text asks for, or that of speech which comes `speed` times as fast as it plays."""
    if asked := _PACE.match(text):
        pieces, every_ms, first_ms = map(int, asked.groups())
        return Pace(pieces, every_ms / 1000, first_ms / 1000)
    size = count_characters(text) * SECONDS_PER_CHARACTER * bytes_per_second
    return Pace(max(1, math.ceil(size / PIECE_BYTES)), PIECE_BYTES / bytes_per_second / speed, FIRST_AUDIO_SECONDS)


def count_characters(text: str) -> int:
    """What the provider bills (PROTOCOL §1.8)."""
    return sum(2 if "\u4e00" <= character <= "\u9fff" else 1 for character in text)


@dataclass(slots=True)
class Spoken:
    """A task that is over: moments of CLOCK_MONOTONIC in seconds, and how long it had to take from its start."""

    started_at: float
    text_at: float
    last_audio_at: float
    due_seconds: float
    characters: int


class Recordings:
    """What is replayed, as WebSocket frames; made once."""

    def __init__(self, speed: float) -> None:
        self.speed = speed
        self.mp3 = [_frame(Opcode.BINARY, piece) for piece in mp3_pieces()]
        self.pcm = [_frame(Opcode.BINARY, piece) for piece in pcm_pieces()]
        self.spoken: deque[Spoken] = deque(maxlen=REMEMBERED_TASKS)


class Task:
    """A text that is being spoken on a connection."""

    def __init__(self, line: "Line", message: dict[str, Any], recordings: Recordings) -> None:
        asked = message["payload"]["parameters"]
        self._line, self._recordings = line, recordings
        self._id = message["header"]["task_id"]
        self._is_pcm = asked["format"] == "pcm"
        self._bytes_per_second = asked["sample_rate"] * 2 if self._is_pcm else 4000
        self._announcement = self._event(
            "result-generated", {"output": {"type": "sentence-synthesis", "sentence": {"index": 0, "words": []}}}
        )
        self._pace: Pace | None = None
        self._characters = self._sent = 0
        self._started_at = self._text_at = self._last_at = 0.0
        self._is_all_text_there = False
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(STARTED_AFTER_SECONDS, self._start)

    def say(self, text: str) -> None:
        """Begin to speak."""
        self._text_at = time.monotonic()
        self._characters = count_characters(text)
        self._pace = read_pace(text, self._bytes_per_second, self._recordings.speed)
        begin = {"type": "sentence-begin", "original_text": text, "sentence": {"index": 0, "words": []}}
        self._line.send(self._event("result-generated", {"output": begin}))
        self._await_piece(self._pace)

    def finish(self, *, cancels: bool) -> None:
        """Hear that no more text comes; the task ends once all was spoken, or at once."""
        self._is_all_text_there = True
        if cancels:
            self.drop()
        if cancels or self._is_spoken:
            self._end()

    def drop(self) -> None:
        """Say no more."""
        self._timer.cancel()

    @property
    def _is_spoken(self) -> bool:
        return self._pace is not None and self._sent == self._pace.pieces

    def _start(self) -> None:
        self._started_at = time.monotonic()
        self._line.send(self._event("task-started", {}))

    def _await_piece(self, pace: Pace) -> None:
        due_at = self._text_at + pace.first_seconds + self._sent * pace.every_seconds
        self._timer = self._loop.call_later(max(0.0, due_at - time.monotonic()), self._send_piece, pace)

    def _send_piece(self, pace: Pace) -> None:
        pieces = self._recordings.pcm if self._is_pcm else self._recordings.mp3
        head, body = pieces[self._sent % len(pieces)]
        if self._is_pcm:
            stamp = STAMP.pack(time.monotonic_ns())
            self._line.send(self._announcement, head, stamp, body[STAMP.size :])
        else:
            self._line.send(self._announcement, head, body)
        self._sent += 1
        if not self._is_spoken:
            self._await_piece(pace)
            return
        self._last_at = time.monotonic()
        if self._is_all_text_there:
            self._end()

    def _end(self) -> None:
        if self._is_spoken and self._pace is not None:
            due_seconds = STARTED_AFTER_SECONDS + self._pace.seconds
            self._recordings.spoken.append(
                Spoken(self._started_at, self._text_at, self._last_at, due_seconds, self._characters)
            )
        usage = {"usage": {"characters": self._characters}}
        end = {"output": {"type": "sentence-end", "sentence": {"index": 0, "words": []}}, **usage}
        self._line.send(self._event("result-generated", end), self._event("task-finished", usage))
        self._line.task = None

    def _event(self, name: str, payload: dict[str, Any]) -> bytes:
        header = {"task_id": self._id, "event": name, "attributes": {}}
        return b"".join(_frame(Opcode.TEXT, json.dumps({"header": header, "payload": payload}).encode()))


class Line(asyncio.Protocol):
    """One connection. What comes in is read by `websockets`; what goes out is ready-made."""

    def __init__(self, recordings: Recordings) -> None:
        self.task: Task | None = None
        self._recordings = recordings
        self._protocol = ServerProtocol()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a call."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Speak to nobody any more."""
        self._transport = None
        if self.task is not None:
            self.task.drop()

    def data_received(self, data: bytes) -> None:
        """Answer the handshake, pings and messages."""
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            if isinstance(event, Request):
                self._protocol.send_response(self._respond(event))
            elif isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                self._hear(json.loads(bytes(event.data)))
        for piece in self._protocol.data_to_send():
            if self._transport is not None:
                self._transport.write(piece) if piece else self._transport.close()

    def send(self, *pieces: bytes) -> None:
        """Send what is already framed."""
        if self._transport is not None:
            self._transport.writelines(pieces)

    def _respond(self, request: Request) -> Any:
        if request.path == "/tasks":
            return self._protocol.reject(200, json.dumps([asdict(task) for task in self._recordings.spoken]))
        if not request.headers.get("Authorization", "").lower().startswith("bearer sk-"):
            return self._protocol.reject(401, '{"code":"InvalidApiKey","message":"No API-key provided."}')
        return self._protocol.accept(request)

    def _hear(self, message: dict[str, Any]) -> None:
        action, asked = message["header"]["action"], message["payload"]["input"]
        if action == "run-task":
            self.task = Task(self, message, self._recordings)
        elif self.task is not None and action == "continue-task" and "text" in asked:
            self.task.say(asked["text"])
        elif self.task is not None and action == "finish-task":
            self.task.finish(cancels=asked.get("directive") == "cancel")


def _frame(opcode: Opcode, payload: bytes) -> tuple[bytes, bytes]:
    """The head of an unmasked WebSocket frame, and what it holds."""
    first, size = 0x80 | opcode, len(payload)
    if size < 126:
        return bytes((first, size)), payload
    return (struct.pack("!BBH", first, 126, size) if size < 65_536 else struct.pack("!BBQ", first, 127, size)), payload


async def _serve(port: int, speed: float) -> None:
    recordings = Recordings(speed)
    server = await asyncio.get_running_loop().create_server(lambda: Line(recordings), "127.0.0.1", port, backlog=1024)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench.stand_in", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--speed", type=float, default=8.0, help="of speech, as fast as it plays is 1 (default 8)")
    options = parser.parse_args()
    uvloop.run(_serve(options.port, options.speed))
