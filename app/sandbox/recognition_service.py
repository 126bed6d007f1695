"""Synchronous recognition: qwen3-asr-flash and qwen-audio-asr (PROTOCOL.md §4.1, §4.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import orjson
from starlette.requests import Request
from starlette.responses import Response

from app.sandbox.audio_sources import LONGEST_DATA_URI, Asker, AudioSources, AudioTooLarge, AudioUnavailable
from app.sandbox.envelope import ServiceError, rate_exceeded, refused_url
from app.sandbox.hearing import Heard, NotDecodable
from app.sandbox.options import SandboxOptions
from app.sandbox.rate_window import RateWindow
from app.sandbox.recognition_models import AUDIO
from app.sandbox.recognition_order import RecognitionOrder, read_recognition
from app.sandbox.request_log import SeenRequest
from app.sandbox.service_door import Answer, read_document
from app.sandbox.transcript import count_tokens, language_of

SHORTEST_SECONDS: Final = 1
LONGEST_SECONDS: Final = 300
_TOKENS_PER_SECOND: Final = 25
_LONGEST_INPUT_TOKENS: Final = 6144


class RecognitionService:
    """Answers with what was said, or streams it."""

    def __init__(self, options: SandboxOptions, sources: AudioSources) -> None:
        self._sources = sources
        self._window = RateWindow(options.recognitions_per_minute, 60.0)

    async def recognise(self, request: Request, seen: SeenRequest) -> Answer:
        """`POST /api/v1/services/aigc/multimodal-generation/generation`."""
        if "x-dashscope-async" in request.headers:
            raise ServiceError(403, "AccessDenied", "current user api does not support asynchronous calls.")
        order = read_recognition(await read_document(request, seen))
        if not self._window.take((seen.api_key, order.model)):
            raise rate_exceeded()
        heard = await self._listen(request, seen, order)
        seen.counted = 0 if order.model == AUDIO else _seconds(heard)
        if is_enabled(request, "x-dashscope-sse"):
            return _stream(order, heard, seen.request_id)
        return _answer(order, heard, heard.text)

    async def _listen(self, request: Request, seen: SeenRequest, order: RecognitionOrder) -> Heard:
        asker = Asker(
            api_key=seen.api_key,
            model=order.model,
            host=request.headers.get("host", ""),
            resolves_oss=is_enabled(request, "x-dashscope-ossresourceresolve"),
        )
        try:
            heard = await self._sources.listen(order.audio, asker, seen, largest=LONGEST_DATA_URI)
        except AudioUnavailable as error:
            raise _unavailable(error, seen) from error
        except AudioTooLarge:
            raise ServiceError(400, "BadRequest.TooLarge", "Payload Too Large.") from None
        except NotDecodable:
            raise ServiceError(400, "Audio.DecoderError", "Decoder audio file failed.") from None
        if not SHORTEST_SECONDS <= heard.seconds <= LONGEST_SECONDS:
            message = f"Audio length must be between {SHORTEST_SECONDS}s and {LONGEST_SECONDS}s."
            raise ServiceError(400, "InvalidFile.AudioLengthError", message)
        if order.model == AUDIO and _audio_tokens(heard) > _LONGEST_INPUT_TOKENS:
            message = f"Range of input length should be [1, {_LONGEST_INPUT_TOKENS}]"
            raise ServiceError(400, "InvalidParameter", message)
        return heard


def is_enabled(request: Request, header: str) -> bool:
    """Whether one of DashScope's switching headers says `enable` (§0.2)."""
    return request.headers.get(header, "").strip().lower() == "enable"


def _unavailable(error: AudioUnavailable, seen: SeenRequest) -> ServiceError:
    if error.reason == "data_too_long":
        message = f"Exceeded limit on max bytes per data-uri item : {LONGEST_DATA_URI}"
        return ServiceError(400, "InvalidParameter", message)
    if error.reason == "empty":
        return ServiceError(400, "InvalidParameter", "The audio is empty")
    if error.reason in ("not_a_url", "unresolved"):
        return refused_url()
    if seen.audio_source == "oss":
        message = "Unable to download the media resource during the data inspection process."
        return ServiceError(400, "InvalidParameter.DataInspection", message)
    return ServiceError(400, "InvalidFile.DownloadFailed", "The audio file cannot be downloaded.")


def _answer(order: RecognitionOrder, heard: Heard, said: str, finish_reason: str = "stop") -> dict[str, Any]:
    """The document of §4.1, of §4.2 for qwen-audio-asr. `said` is the part of the text to tell."""
    message: dict[str, Any] = {"role": "assistant", "content": [{"text": said}]}
    if order.model != AUDIO:
        language = order.language or language_of(heard.text)
        message["annotations"] = [{"language": language, "type": "audio_info", "emotion": "neutral"}]
        if not heard.text:
            message["content"] = []
    return {
        "output": {"choices": [{"finish_reason": finish_reason, "message": message}]},
        "usage": _usage(order, heard),
    }


def _usage(order: RecognitionOrder, heard: Heard) -> dict[str, Any]:
    output_tokens = count_tokens(heard.text)
    if order.model == AUDIO:
        audio_tokens = _audio_tokens(heard)
        return {"input_tokens": audio_tokens, "output_tokens": output_tokens, "audio_tokens": audio_tokens}
    return {
        "input_tokens_details": {"text_tokens": count_tokens(order.context)},
        "output_tokens_details": {"text_tokens": output_tokens},
        "seconds": _seconds(heard),
    }


def _seconds(heard: Heard) -> int:
    return math.ceil(heard.seconds)


def _audio_tokens(heard: Heard) -> int:
    return math.ceil(max(1.0, heard.seconds) * _TOKENS_PER_SECOND)


def _stream(order: RecognitionOrder, heard: Heard, request_id: str) -> Response:
    """The answer in two halves and an end (§0.4); each repeats what came before unless `incremental_output` (§14.8)."""
    half = len(heard.text) // 2
    cuts = [(0, half), (half, len(heard.text)), (len(heard.text), len(heard.text))]

    def events() -> Iterator[str]:
        for number, (start, end) in enumerate(cuts, 1):
            said = heard.text[start if order.incremental else 0 : end]
            reason = "stop" if number == len(cuts) else "null"
            data = orjson.dumps({**_answer(order, heard, said, reason), "request_id": request_id}).decode()
            yield f"id:{number}\nevent:result\n:HTTP_STATUS/200\ndata:{data}\n\n"

    return Response("".join(events()), media_type="text/event-stream;charset=UTF-8")
