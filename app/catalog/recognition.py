"""Models that turn speech into text (PROTOCOL §4, §5)."""

from functools import cache
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from app.catalog.data import read_data

# What the provider's recognisers know by code (PROTOCOL §4.1).
Language = Literal[
    "zh", "yue", "en", "ja", "ko", "de", "fr", "ru", "es", "it", "pt", "ar", "th", "vi",
    "hi", "id", "tr", "uk", "cs", "da", "fil", "fi", "is", "ms", "no", "pl", "sv",
]  # fmt: skip


class RecognitionModel(BaseModel):
    """A recogniser. `languages` are those that it takes as a hint, where that is less than all."""

    model_config = ConfigDict(frozen=True)

    model_id: str
    model_name: str
    description: str
    call_type: Literal["sync", "async"]
    features: tuple[str, ...]
    takes_context: bool
    languages: tuple[Language, ...] | None


@cache
def recognition_models() -> tuple[RecognitionModel, ...]:
    """Every recognition model, in the order in which they are shown."""
    return TypeAdapter(tuple[RecognitionModel, ...]).validate_json(read_data("recognition_models.json"))


def find_recognition_model(model_id: str) -> RecognitionModel | None:
    """The recognition model of this id, if there is one."""
    return next((model for model in recognition_models() if model.model_id == model_id), None)
