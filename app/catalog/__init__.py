"""What can be asked for and what it costs: models, prices and system voices, from the data files beside this one."""

from app.catalog.prices import PriceList, count_characters, load_prices
from app.catalog.recognition import Language, RecognitionModel, find_recognition_model, recognition_models
from app.catalog.speech import (
    SpeechModel,
    SystemVoice,
    VoiceFeatures,
    find_speech_model,
    find_voice,
    looks_cloned,
    speech_models,
    was_cloned_for,
)

__all__ = [
    "Language",
    "PriceList",
    "RecognitionModel",
    "SpeechModel",
    "SystemVoice",
    "VoiceFeatures",
    "count_characters",
    "find_recognition_model",
    "find_speech_model",
    "find_voice",
    "load_prices",
    "looks_cloned",
    "recognition_models",
    "speech_models",
    "was_cloned_for",
]
