"""How the server treats its connections when it is to end, whoever starts it."""

from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

# How long after it connected somebody may take to say what for, when the process is to end.
FIRST_REQUEST_SECONDS = 1.0


class DrainedHttp(HttpToolsProtocol):
    """A connection that is not closed on somebody who has just made it, and whose request is on its way.

    A proxy could not tell whether that request was heard, and would have to give it up.
    """

    def shutdown(self) -> None:
        """Come to an end, after the first request if there was none yet."""
        if cast("object | None", self.cycle) is None:
            self.loop.call_later(FIRST_REQUEST_SECONDS, super().shutdown)
        else:
            super().shutdown()


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


SERVER: dict[str, Any] = {
    "http": DrainedHttp,
    "ws": DrainedWebSocket,
    "ws_max_size": 4 * 1024 * 1024,  # more than ever may wait to be spoken, so that its sender is told
    "ws_per_message_deflate": False,  # audio does not shrink
    "ws_ping_timeout": None,  # who listens at playing speed answers late; silence is timed where it matters
}
"""Options of uvicorn."""
