"""Speech models and the system voices that speak with them (PROTOCOL §1.9)."""

import re
from functools import cache

from pydantic import BaseModel, ConfigDict, TypeAdapter

from app.catalog.data import read_data

# `{model}-{prefix}-{uid}`, with `vd-` before the prefix of a designed voice (PROTOCOL §3).
_CLONED_VOICE = re.compile(r"cosyvoice-v[0-9.]+(?:-[A-Za-z0-9_]+){2,5}")
MAX_VOICE_ID_CHARS = 128


class SpeechModel(BaseModel):
    """A model that turns text into speech."""

    model_config = ConfigDict(frozen=True)

    model_id: str
    model_name: str
    description: str
    features: tuple[str, ...]
    takes_instruction: bool


class VoiceFeatures(BaseModel):
    """What a system voice can do beyond plain text."""

    model_config = ConfigDict(frozen=True)

    ssml: bool
    instruct: bool
    timestamp: bool


class SystemVoice(BaseModel):
    """A voice that the provider ships; it speaks with `models` only."""

    model_config = ConfigDict(frozen=True)

    voice_id: str
    name: str
    trait: str
    age: str | None
    category: str
    languages: tuple[str, ...]
    models: tuple[str, ...]
    features: VoiceFeatures


@cache
def speech_models() -> tuple[SpeechModel, ...]:
    """Every speech model, in the order in which they are shown."""
    return TypeAdapter(tuple[SpeechModel, ...]).validate_json(read_data("speech_models.json"))


def find_speech_model(model_id: str) -> SpeechModel | None:
    """The speech model of this id, if there is one."""
    return next((model for model in speech_models() if model.model_id == model_id), None)


def find_voice(voice_id: str) -> SystemVoice | None:
    """The system voice of this id, if there is one."""
    return _voices_by_id().get(voice_id)


def looks_cloned(voice_id: str) -> bool:
    """Whether an id has the shape that the provider gives to cloned and designed voices (PROTOCOL §3)."""
    return len(voice_id) <= MAX_VOICE_ID_CHARS and _CLONED_VOICE.fullmatch(voice_id) is not None


def was_cloned_for(voice_id: str, model_id: str) -> bool:
    """Whether a cloned voice's id says that it speaks with this model (PROTOCOL §3)."""
    return voice_id.startswith(f"{model_id}-")


@cache
def _voices_by_id() -> dict[str, SystemVoice]:
    voices = TypeAdapter(tuple[SystemVoice, ...]).validate_json(read_data("system_voices.json"))
    return {voice.voice_id: voice for voice in voices}
