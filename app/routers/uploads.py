"""Requests that carry audio: JSON with Base64 or a URL, or a form with a file, on one route."""

import binascii
import tempfile
from typing import BinaryIO, TypeVar, cast

from anyio import CapacityLimiter, to_thread
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from app.errors import Abandoned, InvalidAudio, InvalidRequest
from app.routers.fields import Text
from app.services.delivery import AudioFile, AudioUrl
from app.services.spool import SPOOL_MEMORY_BYTES, Spool

MAX_FORM_FIELDS = 20
MAX_NAME_CHARS = 255
BASE64_CHUNK_CHARS = 1024 * 1024


class AudioUrlField(BaseModel):
    """Where the audio is; in a form, it may also come as `file`."""

    audio_url: Text | None = Field(
        default=None,
        description="音频文件URL，必须公网可访问（与上传 file 二选一）",
        examples=["https://your-bucket.oss-cn-beijing.aliyuncs.com/audio/sample.mp3"],
    )


class AudioFields(AudioUrlField):
    """Where the audio is, which may also be in the request itself."""

    audio_url: Text | None = Field(
        default=None,
        description="音频文件URL，必须公网可访问（与 audio_base64、file 三选一）",
        examples=["https://your-bucket.oss-cn-beijing.aliyuncs.com/audio/input.mp3"],
    )
    audio_base64: str | None = Field(
        default=None, description="Base64编码的音频数据，可带 `data:` 前缀（与 audio_url、file 三选一）", repr=False
    )


Fields = TypeVar("Fields", bound=AudioUrlField)


async def read_upload(
    request: Request, fields: type[Fields], decoding: CapacityLimiter
) -> tuple[Fields, AudioUrl | AudioFile]:
    """Read the fields of a request and its one source of audio, which the caller closes.

    Bodies are spooled while they come; only as many as `decoding` allows are taken into memory at once. Raises
    InvalidRequest or RequestValidationError for what does not fit, InvalidAudio for what is no Base64, and Abandoned
    when the client leaves meanwhile.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if content_type == "multipart/form-data":
            return await _read_form(request, fields)
        if content_type == "application/json":
            async with Spool() as body:
                async for chunk in request.stream():
                    await body.write(chunk)
                return await to_thread.run_sync(_read_json, body.file, fields, limiter=decoding)
    except ClientDisconnect:
        raise Abandoned from None
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_input=False)) from None
    raise InvalidRequest("Content-Type 必须是 application/json 或 multipart/form-data")


async def _read_form(request: Request, fields: type[Fields]) -> tuple[Fields, AudioUrl | AudioFile]:
    try:
        form = await request.form(max_files=1, max_fields=MAX_FORM_FIELDS)
    except HTTPException:
        raise InvalidRequest("表单无法解析：最多一个文件，文件以外的字段不能超过 1 MB") from None
    try:
        file = form.get("file")
        if isinstance(file, str):
            raise InvalidRequest("file 必须是上传的文件")
        given = {name: value for name, value in form.items() if isinstance(value, str) and value}
        values = fields.model_validate(given, strict=False)
        audio = _only_source(values, file)
    except BaseException:
        await form.close()
        raise
    if not isinstance(audio, AudioFile):
        await form.close()  # of a file under another name
    return values, audio


def _read_json(body: BinaryIO, fields: type[Fields]) -> tuple[Fields, AudioUrl | AudioFile]:
    body.seek(0)
    values = fields.model_validate_json(body.read())
    return values, _only_source(values, None)


def _only_source(values: AudioUrlField, file: UploadFile | None) -> AudioUrl | AudioFile:
    encoded = None
    if isinstance(values, AudioFields):
        encoded, values.audio_base64 = values.audio_base64, None
    if [bool(values.audio_url), bool(encoded), file is not None].count(True) != 1:
        sources = "audio_url、audio_base64、file" if isinstance(values, AudioFields) else "audio_url、file"
        raise InvalidRequest(f"{sources} 必须且只能提供一个")
    if file is not None:
        return AudioFile(file.file, _plain_name(file.filename or "file"))
    if values.audio_url:
        return AudioUrl(values.audio_url, "audio_url")
    return AudioFile(_decode(encoded or ""), None)


def _decode(encoded: str) -> BinaryIO:
    """Decode Base64, with or without the beginning of a data URI, line breaks allowed. Raises InvalidAudio."""
    start = 0
    if encoded[:5].lower() == "data:":
        start = encoded.find(",") + 1
        if not encoded[:start].lower().endswith(";base64,"):
            raise InvalidAudio("audio_base64 的 data URI 必须是 data:<类型>;base64,<数据> 的形式")
    file = tempfile.SpooledTemporaryFile(max_size=SPOOL_MEMORY_BYTES)  # noqa: SIM115 - the caller closes it
    try:
        rest = ""
        for offset in range(start, len(encoded), BASE64_CHUNK_CHARS):
            piece = rest + "".join(encoded[offset : offset + BASE64_CHUNK_CHARS].split())
            whole = len(piece) - len(piece) % 4
            file.write(binascii.a2b_base64(piece[:whole], strict_mode=True))
            rest = piece[whole:]
        if rest:
            raise ValueError("an incomplete group")
    except ValueError:
        file.close()
        raise InvalidAudio("audio_base64 不是合法的 Base64 编码") from None
    return cast(BinaryIO, file)


def _plain_name(name: str) -> str:
    """A file's name as the history shows it; nothing is ever stored under it."""
    base = name.replace("\\", "/").rpartition("/")[2]
    return "".join(each if each.isprintable() else "_" for each in base)[-MAX_NAME_CHARS:] or "file"
