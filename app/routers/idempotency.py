"""Requests that their clients name, so that asking again is not ordering again."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, BinaryIO

from anyio import to_thread
from fastapi import Header
from fastapi.responses import Response
from pydantic import BaseModel

from app.errors import AppError
from app.services.calls import IdempotencyKey
from app.services.delivery import AudioFile, AudioUrl

REPLAYED = "Idempotency-Replayed"
CHUNK_BYTES = 256 * 1024

IdempotencyHeader = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description=(
            "本次请求的唯一标识（1 到 255 个可见 ASCII 字符，如 UUID），24 小时内有效。网络中断或超时后用相同的值重发"
            "同样的请求，得到同一个结果（响应头 `Idempotency-Replayed: true`），不会重复计费；用于不同的请求时返回 409"
        ),
        pattern=r"^[\x20-\x7e]{1,255}$",
    ),
]


def name_request(key: str | None, route: str, asked: BaseModel, audio: str = "") -> IdempotencyKey | None:
    """The client's name for what he asks of a route, if he gives it one; `audio` is a digest of what he sent."""
    if key is None:
        return None
    content = "\n".join((route, audio, asked.model_dump_json()))
    return IdempotencyKey(key, hashlib.sha256(content.encode()).hexdigest())


async def name_upload(
    key: str | None, route: str, asked: BaseModel, audio: AudioUrl | AudioFile
) -> IdempotencyKey | None:
    """The same for a request that may carry audio, of which the content counts and not the name."""
    if key is None or isinstance(audio, AudioUrl):
        return name_request(key, route, asked)
    try:
        return name_request(key, route, asked, await to_thread.run_sync(_digest, audio.source))
    except BaseException:
        audio.close()
        raise


def tell_repeat(response: Response, is_repeat: bool) -> None:
    """Mark an answer that was given before."""
    if is_repeat:
        response.headers[REPLAYED] = "true"


@contextmanager
def telling_repeat(is_repeat: bool) -> Iterator[None]:
    """Mark a failure of the block as one of a request that was made before."""
    try:
        yield
    except AppError as error:
        error.is_repeat = is_repeat
        raise


def _digest(source: BinaryIO) -> str:
    digest = hashlib.sha256()
    source.seek(0)
    while chunk := source.read(CHUNK_BYTES):
        digest.update(chunk)
    source.seek(0)
    return digest.hexdigest()
