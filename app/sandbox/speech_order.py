"""A run-task message, checked and turned into what is to be spoken how (PROTOCOL.md §1.3, §1.4).

Where the protocol is silent (§14.6) the sandbox is strict, to show a client's slip early: a known parameter with a
wrong type or out of its range fails with InvalidParameter. Unknown names are ignored, as §1.4 says of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from app.sandbox.failures import INPUT_MISSING, TaskFailed, invalid_parameter, missing_parameter
from app.sandbox.instructions import check_instruction
from app.sandbox.voice_catalog import MODELS, EnrolledSpeaker, Voice, find_voice

FORMATS: Final = ("pcm", "wav", "mp3", "opus")
SAMPLE_RATES: Final = (8000, 16000, 22050, 24000, 44100, 48000)
LANGUAGES: Final = frozenset(
    ("zh", "en", "fr", "de", "ja", "ko", "ru", "pt", "th", "id", "vi", "es", "it", "ms", "fil", "ar")
)
_DEFAULT_SAMPLE_RATE: Final = 22050


@dataclass(frozen=True, slots=True)
class SpeechOrder:
    """Everything a task is told before its text comes."""

    model: str
    voice: Voice
    format: str
    sample_rate: int
    bit_rate: int
    volume: int
    rate: float
    pitch: float
    ssml: bool
    word_timestamps: bool
    language: str | None
    replacements: tuple[tuple[str, str], ...]


def read_model(payload: Mapping[str, Any]) -> str:
    """Check the fixed fields of a run-task payload and the model's name (§1.3, §1.9, §1.10)."""
    for name, expected in (("task_group", "audio"), ("task", "tts"), ("function", "SpeechSynthesizer")):
        value = payload.get(name)
        if not value:
            raise missing_parameter(f"payload.{name}")
        if value != expected:
            raise invalid_parameter(f"payload.{name}")
    model = payload.get("model")
    if not model or not isinstance(model, str):
        raise missing_parameter("payload.model")
    if model not in MODELS:
        raise TaskFailed("Model can not be found.", "ModelNotFound")
    return model


def read_order(model: str, payload: Mapping[str, Any], enrolled: EnrolledSpeaker) -> SpeechOrder:
    """The order of a run-task payload whose model is known; `TaskFailed` says what is wrong with it (§1.4)."""
    if payload.get("input") is None:
        raise TaskFailed(INPUT_MISSING)
    if payload["input"] != {}:
        raise invalid_parameter("payload.input")
    parameters = payload.get("parameters")
    if not isinstance(parameters, dict):
        raise missing_parameter("payload.parameters")
    if parameters.get("text_type") is None:
        raise missing_parameter("payload.parameters.text_type")
    if parameters["text_type"] != "PlainText":
        raise invalid_parameter("text_type")

    voice = find_voice(model, parameters.get("voice"), enrolled)
    check_instruction(model, voice, _text(parameters, "instruction"))
    first_generation = model == "cosyvoice-v1"
    audio_format = _format(parameters)
    if first_generation and audio_format == "opus":
        raise invalid_parameter("format")
    _whole(parameters, "seed", 0, 65535, 0)
    for switch in ("enable_aigc_tag", "enable_markdown_filter"):
        _switch(parameters, switch)
    for name in ("aigc_propagator", "aigc_propagate_id"):
        _text(parameters, name)
    return SpeechOrder(
        model=model,
        voice=voice,
        format=audio_format,
        sample_rate=_sample_rate(parameters),
        bit_rate=_whole(parameters, "bit_rate", 6, 510, 32),
        volume=_whole(parameters, "volume", 0, 100, 50),
        rate=_fraction(parameters, "rate"),
        pitch=_fraction(parameters, "pitch"),
        ssml=_switch(parameters, "enable_ssml"),
        word_timestamps=_switch(parameters, "word_timestamp_enabled") and voice.timestamp,
        language=_language(parameters),
        replacements=() if model in ("cosyvoice-v1", "cosyvoice-v2") else _replacements(parameters),
    )


def _format(parameters: Mapping[str, Any]) -> str:
    value = parameters.get("format", "mp3")
    if value == "Default":
        return "mp3"
    if value not in FORMATS:
        raise invalid_parameter("format")
    return str(value)


def _sample_rate(parameters: Mapping[str, Any]) -> int:
    value = parameters.get("sample_rate", _DEFAULT_SAMPLE_RATE)
    if isinstance(value, bool) or not isinstance(value, int) or value not in (0, *SAMPLE_RATES):
        raise invalid_parameter("sample_rate")
    return value or _DEFAULT_SAMPLE_RATE


def _whole(parameters: Mapping[str, Any], name: str, lowest: int, highest: int, default: int) -> int:
    value = parameters.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise invalid_parameter(name)
    return value


def _fraction(parameters: Mapping[str, Any], name: str) -> float:
    value = parameters.get(name, 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.5 <= value <= 2.0:
        raise invalid_parameter(name)
    return float(value)


def _switch(parameters: Mapping[str, Any], name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise invalid_parameter(name)
    return value


def _text(parameters: Mapping[str, Any], name: str) -> str:
    value = parameters.get(name, "")
    if not isinstance(value, str):
        raise invalid_parameter(name)
    return value


def _language(parameters: Mapping[str, Any]) -> str | None:
    hints = parameters.get("language_hints", [])
    if not isinstance(hints, list):
        raise invalid_parameter("language_hints")
    if not hints:
        return None
    if hints[0] not in LANGUAGES:
        raise invalid_parameter("language_hints")
    return str(hints[0])


def _replacements(parameters: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    hot_fix = parameters.get("hot_fix", {})
    replacing = hot_fix.get("replace", []) if isinstance(hot_fix, dict) else None
    if not isinstance(replacing, list) or not all(isinstance(entry, dict) for entry in replacing):
        raise invalid_parameter("hot_fix")
    pairs = [pair for entry in replacing for pair in entry.items()]
    if not all(old and isinstance(new, str) for old, new in pairs):
        raise invalid_parameter("hot_fix")
    return tuple(pairs)
