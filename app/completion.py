"""Work that must reach its end although its caller is cancelled, and work that must end when it is cancelled."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


async def run_to_end(work: Coroutine[Any, Any, Result]) -> Result:
    """Run work in a task of its own and wait for it, however often the caller is cancelled.

    The cancellation is raised once the work is done; what the work raises comes first.
    """
    task = asyncio.ensure_future(work)
    cancellation: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancellation = error
        except BaseException:
            break
    result = task.result()
    if cancellation is not None:
        raise cancellation
    return result


async def end_by_cancelling(task: asyncio.Task[Any]) -> None:
    """Cancel a task, and wait until it is done; some libraries swallow a cancellation on Python 3.11."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=1)
