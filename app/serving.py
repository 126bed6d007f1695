"""How the server treats WebSockets, whoever starts it."""

from typing import Any

WEBSOCKETS: dict[str, Any] = {
    "ws_max_size": 4 * 1024 * 1024,  # more than ever may wait to be spoken, so that its sender is told
    "ws_per_message_deflate": False,  # audio does not shrink
    "ws_ping_timeout": None,  # who listens at playing speed answers late; silence is timed where it matters
}
"""Options of uvicorn."""
