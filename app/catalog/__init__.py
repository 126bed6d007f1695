"""What can be asked for, where, and what it costs: models, voices and prices, from the data files beside this one."""

from app.catalog.prices import PriceList, count_characters, load_prices
from app.catalog.recognition import Language, RecognitionModel, find_recognition_model, recognition_models
from app.catalog.regions import DEFAULT_REGION, cloning_models
from app.catalog.speech import (
    SpeechModel,
    find_speech_model,
    looks_cloned,
    read_voice_id,
    speech_models,
    was_cloned_for,
)
from app.catalog.voices import SystemVoice, VoiceFeatures, find_voice, system_voices

__all__ = [
    "DEFAULT_REGION",
    "Language",
    "PriceList",
    "RecognitionModel",
    "SpeechModel",
    "SystemVoice",
    "VoiceFeatures",
    "cloning_models",
    "count_characters",
    "find_recognition_model",
    "find_speech_model",
    "find_voice",
    "load_prices",
    "looks_cloned",
    "read_voice_id",
    "recognition_models",
    "speech_models",
    "system_voices",
    "was_cloned_for",
]
