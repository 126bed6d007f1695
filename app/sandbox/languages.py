"""Choosing a language for a stretch of text: by its script first, then by hint, then by voice.

A sentence with Han characters is read as Mandarin (or Cantonese by a Cantonese voice); espeak's Mandarin reads Latin
words among them in English. Kana, hangul, Cyrillic, Thai and Arabic get their own language, run by run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from app.sandbox.characters import HAN

_SCRIPTS: Final = (
    ("ja", re.compile("[\u3041-\u3096\u309d-\u30ff\uff66-\uff9f]")),
    ("ko", re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]")),
    ("ru", re.compile("[\u0400-\u04ff]")),
    ("th", re.compile("[\u0e01-\u0e5b]")),
    ("ar", re.compile("[\u0600-\u06ff]")),
)
_LATIN: Final = re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]")
_ESPEAK_NAMES: Final = {"zh": "cmn", "en-gb": "en", "en": "en-us", "fil": "id"}
_NOT_LATIN: Final = frozenset({"zh", "yue", "ja", "ko", "ru", "th", "ar"})


def split_by_language(text: str, languages: Sequence[str], hint: str | None) -> list[tuple[str, str]]:
    """`text` as (espeak language, run) pairs in order; `languages` are the voice's, most native first."""
    chinese = "yue" if languages[0] == "yue" else "zh"
    has_han = HAN.search(text) is not None
    latin = _latin_language(languages, hint)
    default = chinese if has_han else (hint or languages[0])
    runs: list[tuple[str, str]] = []
    current: str | None = None
    start = 0
    for position, character in enumerate(text):
        language = _language_of(character, chinese, chinese if has_han else latin)
        if language is None or language == current:
            continue
        if current is not None:
            runs.append((current, text[start:position]))
            start = position
        current = language
    runs.append((current or default, text[start:]))
    return [(_ESPEAK_NAMES.get(language, language), run) for language, run in runs]


def _latin_language(languages: Sequence[str], hint: str | None) -> str:
    candidates = [*([hint] if hint else []), *languages]
    return next((language for language in candidates if language not in _NOT_LATIN), "en")


def _language_of(character: str, chinese: str, latin: str) -> str | None:
    if HAN.match(character):
        return chinese
    if _LATIN.match(character):
        return latin
    return next((language for language, pattern in _SCRIPTS if pattern.match(character)), None)
