"""What every place for objects can do: seven verbs, the same for OSS and for local files."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import BinaryIO, ClassVar, Protocol


class Store(Protocol):
    """A place for objects that are written once, under keys that satisfy `keys.is_key`."""

    fetchable: ClassVar[bool]
    """Whether others than our clients, such as the provider, can fetch what `url()` names."""

    async def put(self, key: str, source: BinaryIO, *, content_type: str) -> None:
        """Store a seekable file from position 0 to its end, visible whole or not at all; a private one to nobody.

        Putting twice is harmless. Once this returns or raises, also by cancellation, the source is the
        caller's again. Raises StorageError, and ValueError for an impossible key.
        """

    def url(self, key: str) -> str:
        """Give the address where a client plays the object, computed without asking the store.

        That of a private object ends soon, and leads nowhere where objects are not fetchable. Raises ValueError for
        an impossible key.
        """

    def key_of(self, url: str) -> str | None:
        """Give the key of an object that this URL is an address of; None for every other URL."""

    def open(self, key: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Open an object as a stream of chunks: `async with storage.open(key) as chunks`.

        Raises ObjectNotFound on entering, and StorageError on entering or while reading.
        """

    async def delete(self, key: str) -> None:
        """Remove an object; an absent one is fine. Raises StorageError, and ValueError for an impossible key."""

    async def get_ready(self) -> None:
        """Connect, if that was not done lately: what is put soon then need not wait for it. Raises nothing."""

    async def close(self) -> None:
        """Give back connections. Nothing may be called afterwards."""
