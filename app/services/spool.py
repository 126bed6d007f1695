"""Audio on its way through this process: in memory while it is short, then on disk, written off the event loop."""

import tempfile
from typing import BinaryIO, Self, cast

from anyio import to_thread

SPOOL_MEMORY_BYTES = 128 * 1024


class Spool:
    """A temporary file of bounded memory. `size` is what was written so far."""

    def __init__(self) -> None:
        file = tempfile.SpooledTemporaryFile(max_size=SPOOL_MEMORY_BYTES)  # noqa: SIM115 - closed on exit
        self.file = cast(BinaryIO, file)
        self.size = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.file.close()

    async def write(self, chunk: bytes) -> None:
        """Append a chunk."""
        self.size += len(chunk)
        if self.size > SPOOL_MEMORY_BYTES:
            await to_thread.run_sync(self.file.write, chunk)
        else:
            self.file.write(chunk)

    def read(self) -> bytes:
        """All that was written; it may touch the disk: call it in a thread."""
        self.file.seek(0)
        return self.file.read()
