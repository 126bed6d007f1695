"""Models that turn text into speech, and the ids of voices that were cloned for them (PROTOCOL §1.9, §3)."""

import re
from functools import cache

from pydantic import BaseModel, ConfigDict, TypeAdapter

from app.catalog.data import read_data

# `{model}-{prefix}-{uid}`, with `vd-` before the prefix of a designed voice (PROTOCOL §3).
_CLONED_VOICE = re.compile(r"cosyvoice-v[0-9.]+(?:-[A-Za-z0-9_]+){2,5}")
_MODEL_AND_PREFIX = re.compile(
    r"(?P<model>cosyvoice-(?:v1|v2|v[0-9.]+(?:-(?:flash|plus))?))-(?:vd-)?(?P<prefix>[A-Za-z0-9_]+)-[A-Za-z0-9_-]+"
)
MAX_VOICE_ID_CHARS = 128


class SpeechModel(BaseModel):
    """A model that turns text into speech."""

    model_config = ConfigDict(frozen=True)

    model_id: str
    model_name: str
    description: str
    features: tuple[str, ...]
    takes_instruction: bool


@cache
def speech_models() -> tuple[SpeechModel, ...]:
    """Every speech model, in the order in which they are shown."""
    return TypeAdapter(tuple[SpeechModel, ...]).validate_json(read_data("speech_models.json"))


def find_speech_model(model_id: str) -> SpeechModel | None:
    """The speech model of this id, if there is one."""
    return next((model for model in speech_models() if model.model_id == model_id), None)


def looks_cloned(voice_id: str) -> bool:
    """Whether an id has the shape that the provider gives to cloned and designed voices (PROTOCOL §3)."""
    return len(voice_id) <= MAX_VOICE_ID_CHARS and _CLONED_VOICE.fullmatch(voice_id) is not None


def read_voice_id(voice_id: str) -> tuple[str, str] | None:
    """The model and the prefix that a cloned or designed voice's id tells (PROTOCOL §3); None for another shape."""
    parts = _MODEL_AND_PREFIX.fullmatch(voice_id)
    return (parts["model"], parts["prefix"]) if parts else None


def was_cloned_for(voice_id: str, model_id: str) -> bool:
    """Whether a cloned voice's id says that it speaks with this model (PROTOCOL §3)."""
    return voice_id.startswith(f"{model_id}-")
