"""The largest request body that is read at all."""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import PayloadTooLarge
from app.routers.failures import error_response


class BodyLimit:
    """Refuses a declared size unread, and stops reading a body that turns out larger than allowed."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await error_response(PayloadTooLarge(self._message()))(scope, receive, send)
            return
        read = 0

        async def receive_counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_bytes:
                raise HTTPException(PayloadTooLarge.status, self._message())
            return message

        await self._app(scope, receive_counted, send)

    def _message(self) -> str:
        return f"请求体过大，不能超过 {self._max_bytes} 字节"
