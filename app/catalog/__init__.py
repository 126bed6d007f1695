"""What can be asked for and what it costs: models, prices and system voices, from the data files beside this one."""

from app.catalog.prices import PriceList, count_characters, load_prices
from app.catalog.speech import SpeechModel, SystemVoice, VoiceFeatures, find_speech_model, find_voice, speech_models

__all__ = [
    "PriceList",
    "SpeechModel",
    "SystemVoice",
    "VoiceFeatures",
    "count_characters",
    "find_speech_model",
    "find_voice",
    "load_prices",
    "speech_models",
]
