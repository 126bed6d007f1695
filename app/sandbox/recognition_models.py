"""The recognition models and the languages they know (PROTOCOL.md §4.1, §5)."""

from __future__ import annotations

from typing import Final

FLASH: Final = frozenset({"qwen3-asr-flash", "qwen3-asr-flash-2025-09-08", "qwen3-asr-flash-2026-02-10"})
AUDIO: Final = "qwen-audio-asr"
FILETRANS: Final = "qwen3-asr-flash-filetrans"
PARAFORMER: Final = "paraformer-v2"

SYNCHRONOUS: Final = FLASH | {AUDIO}
ASYNCHRONOUS: Final = frozenset({FILETRANS, PARAFORMER})
EVERY: Final = SYNCHRONOUS | ASYNCHRONOUS

PARAFORMER_LANGUAGES: Final = frozenset(("zh", "en", "ja", "yue", "ko", "de", "fr", "ru"))
LANGUAGES: Final = PARAFORMER_LANGUAGES | frozenset(
    ("pt", "ar", "it", "es", "hi", "id", "th", "tr", "uk", "vi", "cs", "da", "fil", "fi", "is", "ms", "no", "pl", "sv")
)

LONGEST_CONTEXT_TOKENS: Final = 10_000
