"""Cutting the connection under an HTTP request, as only a switched-on fault does."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request


def hang_up(request: Request) -> None:
    """Close the connection under the request; ASGI has no word for it, uvicorn's transport does."""
    cycle: Any = getattr(request.receive, "__self__", None)
    cycle.transport.close()


async def wait_until_gone(request: Request) -> None:
    """Return when the connection of a request is no more; what still comes of its body is dropped."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
