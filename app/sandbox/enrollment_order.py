"""A request to the enrollment service, checked (PROTOCOL.md §3).

Where the protocol is silent the sandbox is strict, as in `speech_order`: a known field of a wrong type or out of its
range is refused. Unknown fields are ignored, and so are options that the target model does not support.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, cast, get_args

from app.sandbox.audio_sources import is_audio_url
from app.sandbox.characters import is_speakable
from app.sandbox.envelope import ServiceError, refused_parameter, wrong_url
from app.sandbox.recognition_order import read_part, read_switch
from app.sandbox.voice_catalog import MODELS

ENROLLMENT: Final = "voice-enrollment"
LARGEST_PAGE: Final = 1000
"""The protocol names none (§14.10); an account has no more voices than this."""

DESIGNED_MODELS: Final = MODELS - {"cosyvoice-v1", "cosyvoice-v2"}

PreviewFormat = Literal["pcm", "wav", "mp3"]

_PREFIX: Final = re.compile(r"[0-9A-Za-z]{1,10}")
_LONGEST_VOICE_PROMPT: Final = 500
_LONGEST_PREVIEW_TEXT: Final = 200
_PREVIEW_RATES: Final = (16000, 24000, 48000)


@dataclass(frozen=True, slots=True)
class CreateVoice:
    target_model: str
    prefix: str
    url: str


@dataclass(frozen=True, slots=True)
class DesignVoice:
    target_model: str
    prefix: str
    voice_prompt: str
    preview_text: str
    sample_rate: int
    response_format: PreviewFormat


@dataclass(frozen=True, slots=True)
class ListVoices:
    prefix: str | None
    page_index: int
    page_size: int


@dataclass(frozen=True, slots=True)
class QueryVoice:
    voice_id: str


@dataclass(frozen=True, slots=True)
class UpdateVoice:
    voice_id: str
    url: str


@dataclass(frozen=True, slots=True)
class DeleteVoice:
    voice_id: str


EnrollmentOrder = CreateVoice | DesignVoice | ListVoices | QueryVoice | UpdateVoice | DeleteVoice


def read_enrollment(document: Mapping[str, Any]) -> EnrollmentOrder:
    """The order in a request's body; a `ServiceError` says what is wrong with it."""
    model = document.get("model")
    if not model:
        raise ServiceError(400, "BadRequest.EmptyModel", 'Required parameter "model" missing from request.')
    if model != ENROLLMENT:
        raise wrong_url()
    asked = read_part(document, "input")
    match asked.get("action"):
        case "create_voice" if "voice_prompt" in asked or "preview_text" in asked:
            return _design(asked, read_part(document, "parameters"))
        case "create_voice":
            return _create(asked)
        case "list_voice":
            return ListVoices(
                prefix=None if asked.get("prefix") is None else read_prefix(asked),
                page_index=_whole(asked, "page_index", 0, None, 0),
                page_size=_whole(asked, "page_size", 1, LARGEST_PAGE, 10),
            )
        case "query_voice":
            return QueryVoice(_text(asked, "voice_id"))
        case "update_voice":
            return UpdateVoice(_text(asked, "voice_id"), _url(asked))
        case "delete_voice":
            return DeleteVoice(_text(asked, "voice_id"))
        case _:
            raise refused_parameter("action")


def read_prefix(asked: Mapping[str, Any]) -> str:
    """Digits and ASCII letters, at most ten: no underscore (§3)."""
    prefix = asked.get("prefix")
    if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
        raise refused_parameter("prefix")
    return prefix


def read_target_model(asked: Mapping[str, Any], known: frozenset[str] = MODELS) -> str:
    target_model = _text(asked, "target_model")
    if target_model not in known:
        raise ServiceError(400, "InvalidParameter", "Model not exist.")
    return target_model


def _create(asked: Mapping[str, Any]) -> CreateVoice:
    order = CreateVoice(read_target_model(asked), read_prefix(asked), _url(asked))
    _check_language_hints(asked)
    seconds = asked.get("max_prompt_audio_length", 10.0)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 3.0 <= seconds <= 30.0:
        raise refused_parameter("max_prompt_audio_length")
    read_switch(asked, "enable_preprocess")
    return order


def _design(asked: Mapping[str, Any], parameters: Mapping[str, Any]) -> DesignVoice:
    if "url" in asked:
        raise refused_parameter("url")
    _check_language_hints(asked)
    preview_text = _text(asked, "preview_text", _LONGEST_PREVIEW_TEXT)
    if not is_speakable(preview_text):
        raise refused_parameter("preview_text")
    sample_rate = _whole(parameters, "sample_rate", min(_PREVIEW_RATES), max(_PREVIEW_RATES), 24000)
    if sample_rate not in _PREVIEW_RATES:
        raise refused_parameter("sample_rate")
    response_format = parameters.get("response_format", "wav")
    if response_format not in get_args(PreviewFormat):
        raise refused_parameter("response_format")
    return DesignVoice(
        target_model=read_target_model(asked, DESIGNED_MODELS),
        prefix=read_prefix(asked),
        voice_prompt=_text(asked, "voice_prompt", _LONGEST_VOICE_PROMPT),
        preview_text=preview_text,
        sample_rate=sample_rate,
        response_format=cast(PreviewFormat, response_format),
    )


def _check_language_hints(asked: Mapping[str, Any]) -> None:
    """A list of codes. A wrong code is ignored, and the language is found out (§3)."""
    hints = asked.get("language_hints", [])
    if not isinstance(hints, list) or not all(isinstance(hint, str) for hint in hints):
        raise refused_parameter("language_hints")


def _text(asked: Mapping[str, Any], name: str, longest: int | None = None) -> str:
    value = asked.get(name)
    if not isinstance(value, str) or not value or (longest is not None and len(value) > longest):
        raise refused_parameter(name)
    return value


def _url(asked: Mapping[str, Any]) -> str:
    url = _text(asked, "url")
    if not is_audio_url(url):
        raise refused_parameter("url")
    return url


def _whole(asked: Mapping[str, Any], name: str, lowest: int, highest: int | None, default: int) -> int:
    value = asked.get(name, default)
    if type(value) is not int or value < lowest or (highest is not None and value > highest):
        raise refused_parameter(name)
    return value
