"""A submission for asynchronous transcription, checked (PROTOCOL.md §5.1, §5.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from app.sandbox.envelope import ServiceError, refused_parameter
from app.sandbox.recognition_models import (
    ASYNCHRONOUS,
    FILETRANS,
    LONGEST_CONTEXT_TOKENS,
    PARAFORMER,
    PARAFORMER_LANGUAGES,
    SYNCHRONOUS,
)
from app.sandbox.recognition_order import read_language, read_model, read_part, read_switch
from app.sandbox.transcript import count_tokens

_MOST_FILES: Final = 100
_PARAFORMER_SWITCHES: Final = ("disfluency_removal_enabled", "timestamp_alignment_enabled", "diarization_enabled")
_PARAFORMER_PARAMETERS: Final = frozenset(
    (
        *_PARAFORMER_SWITCHES,
        "vocabulary_id",
        "channel_id",
        "special_word_filter",
        "language_hints",
        "speaker_count",
    )
)


@dataclass(frozen=True, slots=True)
class TranscriptionOrder:
    """What is to be transcribed and how. `channels` are the tracks, each billed by itself."""

    model: str
    urls: tuple[str, ...]
    channels: tuple[int, ...]
    language: str | None = None
    words: bool = True
    speakers: bool = False


def read_transcription(document: Mapping[str, Any]) -> TranscriptionOrder:
    """The order in a submission's body; a `ServiceError` says what is wrong with it."""
    model = read_model(document, ASYNCHRONOUS, SYNCHRONOUS)
    asked = read_part(document, "input")
    parameters = read_part(document, "parameters")
    return _paraformer(asked, parameters) if model == PARAFORMER else _filetrans(asked, parameters)


def _filetrans(asked: Mapping[str, Any], parameters: Mapping[str, Any]) -> TranscriptionOrder:
    url = asked.get("file_url")
    if not isinstance(url, str) or not url:
        raise ServiceError(400, "InvalidParameter", "input must contain file_url")
    read_switch(parameters, "enable_itn")
    corpus = parameters.get("corpus", {})
    context = corpus.get("text", "") if isinstance(corpus, dict) else None
    if not isinstance(context, str) or count_tokens(context) > LONGEST_CONTEXT_TOKENS:
        raise refused_parameter("corpus")
    return TranscriptionOrder(
        model=FILETRANS,
        urls=(url,),
        channels=_channels(parameters),
        language=read_language(parameters),
        words=read_switch(parameters, "enable_words"),
    )


def _paraformer(asked: Mapping[str, Any], parameters: Mapping[str, Any]) -> TranscriptionOrder:
    urls = asked.get("file_urls")
    if not isinstance(urls, list) or not urls or not all(isinstance(url, str) and url for url in urls):
        raise ServiceError(400, "InvalidParameter", "input must contain file_urls")
    if len(urls) > _MOST_FILES:
        raise refused_parameter("file_urls")
    if not parameters.keys() <= _PARAFORMER_PARAMETERS:
        message = "Invalid backend response received (missing status name)"
        raise ServiceError(400, "InvalidParameter", message)
    for name in _PARAFORMER_SWITCHES:
        read_switch(parameters, name)
    hints = parameters.get("language_hints", [])
    if not isinstance(hints, list) or not all(isinstance(hint, str) and hint in PARAFORMER_LANGUAGES for hint in hints):
        raise refused_parameter("language_hints")
    if not isinstance(parameters.get("vocabulary_id", ""), str):
        raise refused_parameter("vocabulary_id")
    speakers = parameters.get("speaker_count", 2)
    if type(speakers) is not int or not 2 <= speakers <= 100:
        raise refused_parameter("speaker_count")
    _check_word_filter(parameters.get("special_word_filter", "{}"))
    return TranscriptionOrder(
        model=PARAFORMER,
        urls=tuple(urls),
        channels=_channels(parameters),
        speakers=read_switch(parameters, "diarization_enabled"),
    )


def _channels(parameters: Mapping[str, Any]) -> tuple[int, ...]:
    channels = parameters.get("channel_id", [0])
    if (
        not isinstance(channels, list)
        or not channels
        or not all(type(channel) is int and channel >= 0 for channel in channels)
        or len(set(channels)) < len(channels)
    ):
        raise refused_parameter("channel_id")
    return tuple(channels)


def _check_word_filter(value: object) -> None:
    """It must be a JSON string, not an object (§5.2)."""
    try:
        understood = isinstance(value, str) and isinstance(orjson.loads(value), dict)
    except orjson.JSONDecodeError:
        understood = False
    if not understood:
        raise refused_parameter("special_word_filter")
