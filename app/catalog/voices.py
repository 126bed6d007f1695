"""System voices: who they are, where they speak, and how they are found (PROTOCOL §1.9)."""

import unicodedata
from dataclasses import dataclass
from functools import cache

from pydantic import BaseModel, ConfigDict, TypeAdapter

from app.catalog.data import read_data
from app.catalog.languages import language_names, wanted_language
from app.catalog.regions import DEFAULT_REGION, speaking_models


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


@dataclass(frozen=True, slots=True)
class _Entry:
    """A voice with what it is found by."""

    voice: SystemVoice
    languages: frozenset[str]
    features: frozenset[str]
    text: str


def system_voices(
    region: str, *, model: str = "", category: str = "", language: str = "", feature: str = "", q: str = ""
) -> tuple[SystemVoice, ...]:
    """The voices of a region that pass every filter given, with the models that they have there, in the page's order.

    `model` and `category` are exact; `language` is a code or a name, see `wanted_language`; `feature` names a field of
    `VoiceFeatures`; every blank-separated word of `q` is found somewhere in the voice. Raises KeyError for a region
    that does not exist.
    """
    language, feature, words = wanted_language(language), _fold(feature), _fold(q).split()
    return tuple(
        entry.voice
        for entry in _entries(region).values()
        if (not model or model in entry.voice.models)
        and (not category or category == entry.voice.category)
        and (not language or language in entry.languages)
        and (not feature or feature in entry.features)
        and all(word in entry.text for word in words)
    )


def find_voice(voice_id: str, region: str = DEFAULT_REGION) -> SystemVoice | None:
    """The system voice of this id with the models that it has in a region, if it speaks there at all."""
    entry = _entries(region).get(voice_id)
    return entry.voice if entry else None


@cache
def _entries(region: str) -> dict[str, _Entry]:
    every_voice = TypeAdapter(tuple[SystemVoice, ...]).validate_json(read_data("system_voices.json"))
    here = ((voice, speaking_models(region, voice.voice_id, voice.models)) for voice in every_voice)
    return {voice.voice_id: _enter(voice.model_copy(update={"models": models})) for voice, models in here if models}


def _enter(voice: SystemVoice) -> _Entry:
    words = (voice.voice_id, voice.name, voice.trait, voice.age or "", voice.category, *voice.languages)
    return _Entry(
        voice=voice,
        languages=frozenset().union(*map(language_names, voice.languages)),
        features=frozenset(name for name, has in voice.features if has),
        text=_fold("\n".join(words)),
    )


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().strip()
