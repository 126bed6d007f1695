"""Which request bodies are read at all."""

from collections.abc import Mapping

from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import AppError, AudioTooLarge, InvalidRequest, PayloadTooLarge
from app.routers.failures import error_response


class BodyLimit:
    """Refuses a declared size unread, and stops reading a body that turns out larger than allowed.

    Forms in other encodings than UTF-8 are refused too: the fields would be decoded by whatever codec the client
    names, and one of Python's takes minutes for a megabyte. `uploads` gives the paths that take audio with their larger
    limits; one that ends with a slash stands for all below it. `texts` gives those of paths that take long texts.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, uploads: Mapping[str, int], texts: Mapping[str, int]) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._uploads = uploads
        self._texts = texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if not _is_in_utf8(scope):
            refusal = InvalidRequest("表单的 charset 必须是 utf-8")
            await error_response(refusal)(scope, receive, send)
            return
        upload_bytes = self._upload_limit(scope["path"])
        max_bytes = upload_bytes or self._texts.get(scope["path"], self._max_bytes)
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > max_bytes:
            await error_response(_refusal(upload_bytes, max_bytes))(scope, receive, send)
            return
        read, is_answered = 0, False

        async def send_watched(message: Message) -> None:
            nonlocal is_answered
            is_answered = True
            await send(message)

        async def receive_counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > max_bytes and is_answered:
                return {"type": "http.disconnect"}  # who goes on sending into an answer does not listen
            if read > max_bytes:
                refusal = _refusal(upload_bytes, max_bytes)
                # FastAPI lets nothing else through while it reads a body.
                raise refusal if upload_bytes else HTTPException(refusal.status, refusal.message)
            return message

        await self._app(scope, receive_counted, send_watched)

    def _upload_limit(self, path: str) -> int | None:
        below = f"{path.rpartition('/')[0]}/"
        return self._uploads.get(path) or self._uploads.get(below)


def _refusal(upload_bytes: int | None, max_bytes: int) -> AppError:
    if upload_bytes:
        return AudioTooLarge(f"音频文件过大，整个请求不能超过 {upload_bytes // 1024 // 1024} MB")
    return PayloadTooLarge(f"请求体过大，不能超过 {max_bytes} 字节")


def _is_in_utf8(scope: Scope) -> bool:
    types = [value for name, value in scope["headers"] if name == b"content-type"]
    parsed = [parse_options_header(value) for value in types]
    return all(options.get(b"charset", b"utf-8").lower() in {b"utf-8", b"utf8"} for _, options in parsed)
