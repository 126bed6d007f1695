"""Work that is of use only while its client is there."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from app.completion import end_by_cancelling
from app.errors import Abandoned

Result = TypeVar("Result")


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Do the work, or stop it when the client hangs up: raises Abandoned then. The body must have been read before."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_leave(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Abandoned
    finally:
        await end_by_cancelling(leaving)
        await end_by_cancelling(working)


async def _leave(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
