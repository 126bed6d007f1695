"""Locally stored audio, for players: whole or by ranges. Included only when storage is local."""

from pathlib import PurePosixPath
from typing import Annotated, cast

from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse

from app.audio import CONTENT_TYPES
from app.errors import ObjectNotFound
from app.routers.envelope import error_answers
from app.storage import LocalStorage, is_private

# A key is never written twice with other content, so a player may keep what it has.
HEADERS = {"Cache-Control": "public, max-age=31536000, immutable", "X-Content-Type-Options": "nosniff"}
CONTENT_TYPES_BY_SUFFIX = {
    **{f".{format}": content_type for format, content_type in CONTENT_TYPES.items()},
    ".srt": "application/x-subrip; charset=utf-8",
    ".vtt": "text/vtt; charset=utf-8",
}

router = APIRouter()


async def local_storage(request: Request) -> LocalStorage:
    """The application's storage, which is local wherever this router is included."""
    return cast(LocalStorage, request.app.state.services.storage)


@router.head("/media/{key:path}", include_in_schema=False)
@router.get(
    "/media/{key:path}",
    summary="播放音频文件",
    description="返回本地存储的音频，支持 Range 断点续传与拖动播放。文件内容不会改变，可长期缓存。",
    response_class=FileResponse,
    responses={
        200: {"content": {content_type: {} for content_type in CONTENT_TYPES.values()}},
        206: {"description": "所请求的字节范围"},
        416: {"description": "请求的字节范围超出文件大小"},
        **error_answers(404),
    },
    tags=["媒体文件"],
)
def media(key: str, storage: Annotated[LocalStorage, Depends(local_storage)]) -> FileResponse:
    """Serve a stored file. Raises ObjectNotFound for an unknown or private key and for every way out of the folder."""
    if is_private(key):
        raise ObjectNotFound
    path = storage.path(key)
    content_type = CONTENT_TYPES_BY_SUFFIX.get(PurePosixPath(key).suffix, "application/octet-stream")
    return FileResponse(path, media_type=content_type, headers=HEADERS)
