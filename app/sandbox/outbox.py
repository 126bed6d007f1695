"""The one writer of a socket."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

Send = Callable[[str | bytes], Awaitable[None]]

_SPEECH_WAITING: Final = 2
_ANSWERS_WAITING: Final = 64


class PeerGone(Exception):
    """What a `Send` raises when nobody reads any more."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """Messages that belong together: they are written one after the other, or not at all."""

    messages: tuple[str | bytes, ...]
    on_sent: Callable[[], None] | None = None
    is_answer: bool = False


class Outbox:
    """A short queue in front of the socket: a slow reader slows the speech down (backpressure).

    Speech waits for room (`put`). Answers to the client don't (`post`), so that the reader of the socket never blocks;
    before it takes another message of the client it awaits `room_for_answers`.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._waiting: deque[Delivery] = deque()
        self._writing = False
        self._gone = False
        self._arrived = asyncio.Event()
        self._departed = asyncio.Event()

    async def put(self, *messages: str | bytes, on_sent: Callable[[], None] | None = None) -> None:
        """Queue a delivery once the queue is short enough."""
        await self._until(lambda: len(self._waiting) < _SPEECH_WAITING)
        self._add(Delivery(messages, on_sent))

    def post(self, *messages: str | bytes) -> None:
        """Queue a delivery at once."""
        self._add(Delivery(messages, is_answer=True))

    def discard(self) -> None:
        """Forget the speech that was not begun yet; answers stay."""
        self._waiting = deque(delivery for delivery in self._waiting if delivery.is_answer)
        self._departed.set()

    async def room_for_answers(self) -> None:
        """Return when few enough deliveries are waiting to take another message of the client."""
        await self._until(lambda: len(self._waiting) < _ANSWERS_WAITING)

    async def drain(self) -> None:
        """Return when everything queued has been written."""
        await self._until(lambda: not self._waiting and not self._writing)

    async def write(self) -> None:
        """Write deliveries until the peer is gone or this is cancelled."""
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            delivery = self._waiting.popleft()
            self._writing = True
            self._departed.set()
            try:
                for message in delivery.messages:
                    await self._send(message)
            except PeerGone:
                self._gone = True
                self._waiting.clear()
                self._departed.set()
                return
            if delivery.on_sent is not None:
                delivery.on_sent()
            self._writing = False
            self._departed.set()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not (self._gone or condition()):
            self._departed.clear()
            await self._departed.wait()

    def _add(self, delivery: Delivery) -> None:
        if not self._gone:
            self._waiting.append(delivery)
            self._arrived.set()
