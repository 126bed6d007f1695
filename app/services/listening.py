"""The way from a synthesis to a client who listens while it is spoken."""

import asyncio
from collections.abc import AsyncIterator, Callable

import anyio

from app.errors import AppError


class Audience:
    """Whom a synthesis is spoken to. This one is empty: the plain call only wants the stored audio."""

    dismissed = False

    @property
    def has_abandoned(self) -> bool:
        """Whether nobody wants the speech any more."""
        return False

    def welcome(self, record_id: int) -> None:
        """Tell which record the synthesis has."""

    def on_leave(self, call: Callable[[], object]) -> None:
        """Have `call` made when the audience leaves; at once when it already has."""

    async def hear(self, chunk: bytes) -> None:
        """Pass a chunk on; without effect once the audience has left."""

    def end(self, failure: AppError | None = None) -> None:
        """Say that no more comes: all was said, or `failure` cut it off. The first word counts."""

    def end_within(self, seconds: float, failure: AppError | None = None) -> None:
        """Say the same after a while, unless it is said before: once the audio is kept."""


class Listener(Audience):
    """A client of a streamed synthesis: chunks pass one by one, and the speaker learns when nobody listens any more.

    At most one chunk waits; a slow client slows the speaker down, and through it the provider. `is_awaited` says that
    somebody will ask for the whole again: the speech goes on although the listener leaves.
    """

    def __init__(self, *, is_awaited: bool = False) -> None:
        self._inlet, self._outlet = anyio.create_memory_object_stream[bytes](1)
        self._is_awaited = is_awaited
        self._began = asyncio.Event()
        self._ended = False
        self._failure: AppError | None = None
        self._on_leave: Callable[[], object] | None = None
        self.left = False
        self.dismissed = False
        self.record_id: int | None = None

    @property
    def has_abandoned(self) -> bool:
        return self.left and not self._is_awaited

    def welcome(self, record_id: int) -> None:
        self.record_id = record_id
        self._began.set()

    async def welcomed(self) -> None:
        """Wait until there is a record. Raises why there is none."""
        await self._began.wait()
        if self.record_id is None and self._failure is not None:
            raise self._failure

    def on_leave(self, call: Callable[[], object]) -> None:
        self._on_leave = call
        if self.has_abandoned or self.dismissed:
            call()

    async def hear(self, chunk: bytes) -> None:
        try:
            await self._inlet.send(chunk)
        except anyio.BrokenResourceError:
            self.leave()

    def end(self, failure: AppError | None = None) -> None:
        if not self._ended:
            self._ended = True
            self._failure = failure
            self._inlet.close()
            self._began.set()

    def end_within(self, seconds: float, failure: AppError | None = None) -> None:
        asyncio.get_running_loop().call_later(seconds, self.end, failure)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the audio as it comes. Raises what cut it off; ends early after `leave()`."""
        try:
            async for chunk in self._outlet:
                yield chunk
        except anyio.ClosedResourceError:
            return
        if self._failure is not None and not self.left:
            raise self._failure

    def leave(self) -> None:
        """Stop listening. Harmless at any time, also after the end."""
        if self.left:
            return
        self.left = True
        self._outlet.close()
        if self._on_leave is not None and (self.has_abandoned or self.dismissed):
            self._on_leave()

    def dismiss(self) -> None:
        """Make the client leave: it is this process that ends."""
        self.dismissed = not self.left
        self.leave()
