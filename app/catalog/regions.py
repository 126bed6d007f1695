"""What the provider's regions have: system voices by model, and models that speak with clones (PROTOCOL §1.9, §3)."""

from functools import cache

from pydantic import BaseModel, ConfigDict, TypeAdapter

from app.catalog.data import read_data

DEFAULT_REGION = "beijing"


class Region(BaseModel):
    """A region of the provider. One that has every system voice for all of its models lists none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cloning_models: tuple[str, ...]
    system_voices: dict[str, frozenset[str]] | None


@cache
def regions() -> dict[str, Region]:
    """Every region by the name that API keys are stored with."""
    return TypeAdapter(dict[str, Region]).validate_json(read_data("regions.json"))


def cloning_models(region: str) -> tuple[str, ...]:
    """The models for which a region makes clones and speaks with them. Raises KeyError for an unknown region."""
    return regions()[region].cloning_models


def speaking_models(region: str, voice_id: str, models: tuple[str, ...]) -> tuple[str, ...]:
    """Those of a system voice's models that it speaks with in a region. Raises KeyError for an unknown region."""
    voices = regions()[region].system_voices
    return models if voices is None else tuple(model for model in models if voice_id in voices.get(model, ()))
