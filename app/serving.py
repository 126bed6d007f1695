"""How the server treats WebSockets, whoever starts it."""

from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol


class DrainedWebSocket(WebSocketsSansIOProtocol):
    """A WebSocket that the application closes itself when the process is to end: what is said completely is spoken.

    The server's own way is to break it off at once. It still does when the application takes longer than the server
    waits for requests.
    """

    def shutdown(self) -> None:
        """Refuse what is only about to be opened."""
        self.stop_keepalive()
        if not self.handshake_complete or self.close_sent:
            super().shutdown()


WEBSOCKETS: dict[str, Any] = {
    "ws": DrainedWebSocket,
    "ws_max_size": 4 * 1024 * 1024,  # more than ever may wait to be spoken, so that its sender is told
    "ws_per_message_deflate": False,  # audio does not shrink
    "ws_ping_timeout": None,  # who listens at playing speed answers late; silence is timed where it matters
}
"""Options of uvicorn."""
