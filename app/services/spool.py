"""Audio on its way through this process: in memory while it is short, then on disk, written off the event loop."""

import tempfile
from collections.abc import Callable
from typing import BinaryIO, Self, TypeVar, cast

from anyio import to_thread

from app.playtime import Playtime

SPOOL_MEMORY_BYTES = 128 * 1024
Result = TypeVar("Result")


class Spool:
    """A temporary file of bounded memory. `size` is what was written so far, which `playtime` counts if it is given."""

    def __init__(self, playtime: Playtime | None = None) -> None:
        file = tempfile.SpooledTemporaryFile(max_size=SPOOL_MEMORY_BYTES)  # noqa: SIM115 - closed on exit
        self.file = cast(BinaryIO, file)
        self.size = 0
        self.playtime = playtime

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.file.close()

    async def write(self, chunk: bytes) -> None:
        """Append a chunk."""
        self.size += len(chunk)
        if self.playtime is not None:
            self.playtime.feed(chunk)
        if self.size > SPOOL_MEMORY_BYTES:
            await to_thread.run_sync(self.file.write, chunk)
        else:
            self.file.write(chunk)

    async def look(self, at: Callable[[BinaryIO], Result]) -> Result:
        """Do something short with the file: in a thread if that touches the disk."""
        return at(self.file) if self.size <= SPOOL_MEMORY_BYTES else await to_thread.run_sync(at, self.file)

    def read(self) -> bytes:
        """All that was written; it may touch the disk: call it in a thread."""
        self.file.seek(0)
        return self.file.read()
