"""Audio that is sent while it is spoken."""

import asyncio

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.errors import AppError
from app.services.listening import Listener

log = structlog.get_logger(__name__)

# A client that takes no byte for this long is treated like one that hung up.
STALLED_CLIENT_SECONDS = 60.0


class AudioResponse(Response):
    """Passes chunks on as they come.

    A failure before the first chunk becomes the usual JSON error; one after it breaks the connection off, so that no
    client takes half a sentence for a whole one.
    """

    def __init__(self, listener: Listener, media_type: str) -> None:
        self._listener = listener
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the audio, and tell the speaker when the client is gone."""
        hangup = asyncio.create_task(self._leave_on_hangup(receive))
        started = False
        try:
            async for chunk in self._listener.chunks():
                if not started:
                    self.headers["X-Record-Id"] = str(self._listener.record_id)
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    started = True
                async with asyncio.timeout(STALLED_CLIENT_SECONDS):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            if not self._listener.left:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (AppError, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError):
                self._listener.dismiss()
            if not started:
                raise
            # Returning without the closing chunk makes the server break the connection off.
            log.warning("stream_broken_off", error=type(error).__name__)
        finally:
            hangup.cancel()
            self._listener.leave()

    async def _leave_on_hangup(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._listener.leave()
