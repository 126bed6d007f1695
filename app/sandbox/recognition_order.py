"""A request for synchronous recognition, checked (PROTOCOL.md §4.1, §4.2).

Where the protocol is silent the sandbox is strict, as in `speech_order`: a message of another shape, or a known
parameter of a wrong type, is refused. Unknown parameters are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.sandbox.envelope import ServiceError, refused_parameter, unknown_model, wrong_url
from app.sandbox.recognition_models import (
    ASYNCHRONOUS,
    AUDIO,
    LANGUAGES,
    LONGEST_CONTEXT_TOKENS,
    SYNCHRONOUS,
)
from app.sandbox.transcript import count_tokens


@dataclass(frozen=True, slots=True)
class RecognitionOrder:
    """What is to be recognised. `incremental` is about streamed answers (§14.8)."""

    model: str
    audio: str
    context: str
    language: str | None
    incremental: bool


def read_model(document: Mapping[str, Any], served: frozenset[str], elsewhere: frozenset[str]) -> str:
    """The model of a request, if this endpoint serves it (§11)."""
    model = document.get("model")
    if not model:
        raise ServiceError(400, "BadRequest.EmptyModel", 'Required parameter "model" missing from request.')
    if not isinstance(model, str) or model not in served | elsewhere:
        raise unknown_model()
    if model in elsewhere:
        raise wrong_url()
    return model


def read_part(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """`input`, or `parameters`, which may be absent."""
    part = document.get(name)
    if part is None and name == "parameters":
        return {}
    if not part and name == "input":
        raise ServiceError(400, "BadRequest.EmptyInput", "Required input parameter missing from request.")
    if not isinstance(part, dict):
        raise refused_parameter(name)
    return part


def read_recognition(document: Mapping[str, Any]) -> RecognitionOrder:
    """The order in a request's body; a `ServiceError` says what is wrong with it."""
    model = read_model(document, SYNCHRONOUS, ASYNCHRONOUS)
    messages = read_part(document, "input").get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise refused_parameter("messages")
    context = ""
    if messages[0].get("role") == "system":
        if model == AUDIO:
            raise refused_parameter("messages")
        context = _only_item(messages[0], "text")
        messages = messages[1:]
        if count_tokens(context) > LONGEST_CONTEXT_TOKENS:
            message = f"Range of input length should be [1, {LONGEST_CONTEXT_TOKENS}]"
            raise ServiceError(400, "InvalidParameter", message)
    if len(messages) != 1 or messages[0].get("role") != "user":
        raise refused_parameter("messages")
    audio = _only_item(messages[0], "audio")
    if not audio:
        raise ServiceError(400, "InvalidParameter", "The audio is empty")
    parameters = read_part(document, "parameters")
    if model == AUDIO and "asr_options" in parameters:
        raise refused_parameter("asr_options")
    options = parameters.get("asr_options", {})
    if not isinstance(options, dict):
        raise refused_parameter("asr_options")
    for name in ("enable_itn", "enable_lid"):
        read_switch(options, name)
    return RecognitionOrder(
        model=model,
        audio=audio,
        context=context,
        language=read_language(options),
        incremental=read_switch(parameters, "incremental_output"),
    )


def read_language(options: Mapping[str, Any]) -> str | None:
    """The one language code, None when the service is to find out (§4.1)."""
    language = options.get("language")
    if language is not None and (not isinstance(language, str) or language not in LANGUAGES):
        raise refused_parameter("language")
    return language


def read_switch(options: Mapping[str, Any], name: str) -> bool:
    value = options.get(name, False)
    if not isinstance(value, bool):
        raise refused_parameter(name)
    return value


def _only_item(message: Mapping[str, Any], name: str) -> str:
    """The value of a message's only content item, which must be called `name`."""
    content = message.get("content")
    if not isinstance(content, list) or len(content) != 1 or not isinstance(content[0], dict):
        raise refused_parameter("messages.content")
    value = content[0].get(name)
    if len(content[0]) != 1 or not isinstance(value, str):
        raise refused_parameter(f"messages.content.{name}")
    return value
