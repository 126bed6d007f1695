"""Audio that lies on this machine, for players: whole or by ranges. What is in the store is played from there."""

from pathlib import PurePosixPath
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse, RedirectResponse, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from app.audio import CONTENT_TYPES
from app.errors import ObjectNotFound
from app.routers.envelope import error_answers
from app.storage import Storage, is_key, is_private

# Players of any page may play it; a browser that is led here shows a player of its own, and runs nothing.
PLAYABLE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": (
        "sandbox; default-src 'none'; media-src 'self'; style-src 'unsafe-inline'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "cross-origin",
}
# A key is never written twice with other content, so a player may keep what it has.
HEADERS = {**PLAYABLE_HEADERS, "Cache-Control": "public, max-age=31536000, immutable"}
# What is held may not be for everybody who asks a cache later, when the right to it has ended.
HELD_HEADERS = {**HEADERS, "Cache-Control": "private, max-age=3600"}
REDIRECT_HEADERS = {**PLAYABLE_HEADERS, "Cache-Control": "no-store"}
CONTENT_TYPES_BY_SUFFIX = {
    **{f".{format}": content_type for format, content_type in CONTENT_TYPES.items()},
    ".srt": "application/x-subrip; charset=utf-8",
    ".vtt": "text/vtt; charset=utf-8",
}

router = APIRouter()


async def _storage(request: Request) -> Storage:
    storage: Storage = request.app.state.services.storage
    return storage


@router.head("/media/{key:path}", include_in_schema=False)
@router.get(
    "/media/{key:path}",
    summary="播放音频文件",
    description=(
        "返回保存在本机的音频，支持 Range 断点续传与拖动播放。文件内容不会改变，可长期缓存。"
        "使用 OSS 时，OSS 不可用期间生成的音频暂由此地址播放，上传后转到 OSS 地址。"
    ),
    response_class=FileResponse,
    responses={
        200: {"content": {content_type: {} for content_type in CONTENT_TYPES.values()}},
        206: {"description": "所请求的字节范围"},
        307: {"description": "音频已在 OSS，转到 OSS 地址"},
        416: {"description": "请求的字节范围超出文件大小"},
        **error_answers(400, 404),
    },
    tags=["媒体文件"],
)
def media(key: str, request: Request, storage: Annotated[Storage, Depends(_storage)]) -> Response:
    """Serve a file of this machine, or tell where in the store the object is.

    Raises ObjectNotFound for an unknown or private key, for every way out of the folder, and for a missing signature.
    """
    if not is_key(key) or is_private(key) or not storage.admits(key, request.url.query):
        raise ObjectNotFound
    try:
        path = storage.path(key)
    except ObjectNotFound:
        if not storage.fetchable:
            raise
        return RedirectResponse(storage.url(key), headers=REDIRECT_HEADERS)
    name = PurePosixPath(key)
    content_type = CONTENT_TYPES_BY_SUFFIX.get(name.suffix)
    return _Playable(
        path,
        media_type=content_type or "application/octet-stream",
        headers=HELD_HEADERS if storage.fetchable else HEADERS,
        filename=None if content_type else name.name,  # to be saved, not shown
    )


class _Playable(FileResponse):
    """A file whose bad ranges are refused as everything else is.

    Raises HTTPException where Starlette would answer in plain text.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        refusal: Message | None = None

        async def send_unless_refused(message: Message) -> None:
            nonlocal refusal
            if message["type"] == "http.response.start" and message["status"] >= 400:
                refusal = message
            if refusal is None:
                await send(message)

        await super().__call__(scope, receive, send_unless_refused)
        if refusal is not None:
            told = Headers(raw=refusal["headers"])
            length = {"Content-Range": told["Content-Range"]} if "Content-Range" in told else {}
            raise HTTPException(refusal["status"], headers=length)
