"""Short audio to text in one call (PROTOCOL §4)."""

import base64
import math
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import orjson
from anyio import to_thread

from app.dashscope.answers import count, read_first, read_object, read_text
from app.dashscope.credential import Credential
from app.dashscope.http import HttpClient, StreamedBody
from app.dashscope.uploads import RESOLVE_UPLOADS
from app.errors import UpstreamError
from app.probes import provider_call

PATH = "/services/aigc/multimodal-generation/generation"
MAX_DATA_URI_BYTES = 10_485_760  # of the encoded form (§4.1)
AUDIO_TOKENS_PER_SECOND = 25  # of qwen-audio-asr, which counts no seconds (§4.2)
_CHUNK_BYTES = 3 * 64 * 1024  # a multiple of 3, so that encoded chunks join


@dataclass(frozen=True, slots=True)
class RecognitionOrder:
    """What is to be recognised, and how. `context` and the options are for models that take them."""

    model: str
    language: str | None = None
    enable_itn: bool = False
    context: str | None = None


@dataclass(frozen=True, slots=True)
class InlineAudio:
    """Audio that travels inside the request."""

    source: BinaryIO
    size: int
    content_type: str

    @property
    def prefix(self) -> str:
        """What comes before the encoded bytes."""
        return f"data:{self.content_type};base64,"

    @property
    def encoded_size(self) -> int:
        """The length of the data URI."""
        return len(self.prefix) + 4 * math.ceil(self.size / 3)


@dataclass(frozen=True, slots=True)
class Recognition:
    """What was heard. `seconds` is None when the provider did not count."""

    text: str
    language: str | None
    emotion: str | None
    input_tokens: int
    output_tokens: int
    seconds: int | None
    request_id: str | None


class RecognitionClient:
    """Asks the synchronous recognisers."""

    def __init__(self, http: HttpClient) -> None:
        self._http = http

    async def recognize(self, credential: Credential, order: RecognitionOrder, audio: InlineAudio | str) -> Recognition:
        """Recognise audio inside the request, or at a URL that the provider can read (`https://`, `oss://`).

        Raises the AppError that a refusal means.
        """
        with provider_call("recognition", order.model):
            return read_recognition(await self._ask(credential, order, audio))

    async def _ask(self, credential: Credential, order: RecognitionOrder, audio: InlineAudio | str) -> dict[str, Any]:
        if isinstance(audio, str):
            headers = RESOLVE_UPLOADS if audio.startswith("oss://") else None
            return await self._http.post(credential, PATH, _compose(order, audio), headers)
        mark = uuid.uuid4().hex
        before, after = orjson.dumps(_compose(order, audio.prefix + mark)).split(mark.encode())
        length = len(before) + 4 * math.ceil(audio.size / 3) + len(after)
        body = StreamedBody(length, lambda: _with_audio(before, audio.source, after))
        return await self._http.post(credential, PATH, body)


def read_recognition(answer: dict[str, Any]) -> Recognition:
    """Read an answer; silence has no content, and counts come in several shapes (§4.1, §4.2).

    Raises UpstreamError for what holds neither a choice nor a count, so that no work was done.
    """
    choices = read_object(answer.get("output")).get("choices")
    message = read_object(read_first(choices).get("message"))
    content = message.get("content")
    pieces = content if isinstance(content, list) else [{"text": content}]
    notes = read_first(message.get("annotations"))
    usage = read_object(answer.get("usage"))
    audio_tokens = count(usage.get("audio_tokens"))
    seconds = count(usage.get("seconds"))
    if seconds is None and audio_tokens is not None:
        seconds = max(1, math.ceil(audio_tokens / AUDIO_TOKENS_PER_SECOND))
    if seconds is None and not isinstance(choices, list):
        raise UpstreamError("百炼平台没有返回识别结果，请稍后重试")
    return Recognition(
        text="".join(read_text(piece.get("text")) or "" for piece in pieces if isinstance(piece, dict)),
        language=read_text(notes.get("language")),
        emotion=read_text(notes.get("emotion")),
        input_tokens=_tokens(usage, "input"),
        output_tokens=_tokens(usage, "output"),
        seconds=seconds,
        request_id=read_text(answer.get("request_id")),
    )


def _compose(order: RecognitionOrder, audio: str) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": "user", "content": [{"audio": audio}]}]
    if order.context:
        messages.insert(0, {"role": "system", "content": [{"text": order.context}]})
    body: dict[str, Any] = {"model": order.model, "input": {"messages": messages}}
    if order.model != "qwen-audio-asr":  # takes no options (§4.2)
        options: dict[str, Any] = {"enable_itn": order.enable_itn}
        if order.language:
            options["language"] = order.language
        body["parameters"] = {"asr_options": options}
    return body


async def _with_audio(before: bytes, source: BinaryIO, after: bytes) -> AsyncIterator[bytes]:
    yield before
    await to_thread.run_sync(source.seek, 0)
    while chunk := await to_thread.run_sync(source.read, _CHUNK_BYTES):
        yield base64.b64encode(chunk)
    yield after


def _tokens(usage: dict[str, Any], side: str) -> int:
    detailed = count(read_object(usage.get(f"{side}_tokens_details")).get("text_tokens"))
    return detailed if detailed is not None else count(usage.get(f"{side}_tokens")) or 0
