"""Work that keeps a core busy: in a thread while it is short, in a process of its own when it would stall us."""

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

from anyio import to_process, to_thread

# A megabyte of JSON takes about 0.1 s to read, during which no other thread may run.
LARGE_BYTES = 512 * 1024

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


async def compute(size: int, function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
    """Call a pure function on data of about `size` bytes without stalling the event loop."""
    if size < LARGE_BYTES:
        return await to_thread.run_sync(function, *arguments)
    return await to_process.run_sync(function, *arguments, cancellable=True)
