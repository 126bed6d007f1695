"""A text laid over the time it was spoken in: words, their punctuation and the sentences they make (PROTOCOL.md §5)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from app.sandbox.characters import HAN
from app.sandbox.hearing import Speech

_SYLLABLE: Final = rf"(?:{HAN.pattern}|[\u3041-\u3096\u30a1-\u30fa\u30fc\u0e01-\u0e5b])"
_LETTER: Final = rf"(?:(?!{_SYLLABLE})[^\W_])"
_WORD: Final = re.compile(rf"{_SYLLABLE}|{_LETTER}+(?:['’.\-@&/:]{_LETTER}+)*")
_STOPS: Final = frozenset("。！？!?.…\n")
_COMMAS: Final = frozenset("，,；;、")


@dataclass(frozen=True, slots=True)
class Word:
    """One word: a Han character, or letters between blanks. Times are in milliseconds."""

    text: str
    punctuation: str
    begin_ms: int
    end_ms: int

    def as_json(self) -> dict[str, object]:
        return {
            "begin_time": self.begin_ms,
            "end_time": self.end_ms,
            "text": self.text,
            "punctuation": self.punctuation,
        }


@dataclass(frozen=True, slots=True)
class Sentence:
    """Some words and the stretch of text they come from."""

    text: str
    words: tuple[Word, ...]

    @property
    def begin_ms(self) -> int:
        return self.words[0].begin_ms

    @property
    def end_ms(self) -> int:
        return self.words[-1].end_ms


def spread(text: str, speech: Speech, *, at_commas: bool) -> list[Sentence]:
    """`text` spread evenly over `speech`, cut at full stops and, if told so, at commas."""
    matches = list(_WORD.finditer(text))
    if not matches:
        return (
            [Sentence(text.strip(), (Word(text.strip(), "", speech.begin_ms, speech.end_ms),))] if text.strip() else []
        )
    starts = [0, *(match.start() for match in matches[1:])]
    ends = [*starts[1:], len(text)]
    letters = sum(len(match[0]) for match in matches)
    ends_of_sentence = _STOPS | _COMMAS if at_commas else _STOPS
    sentences: list[Sentence] = []
    words: list[Word] = []
    sentence_start = spoken = 0
    for match, start, end in zip(matches, starts, ends, strict=True):
        begin = speech.begin_ms + (speech.end_ms - speech.begin_ms) * spoken // letters
        spoken += len(match[0])
        punctuation = "".join(text[match.end() : end].split())
        word_end = speech.begin_ms + (speech.end_ms - speech.begin_ms) * spoken // letters
        words.append(Word(text[start : match.end()].strip(), punctuation, begin, word_end))
        if end == len(text) or ends_of_sentence & set(text[match.end() : end]):
            sentences.append(Sentence(text[sentence_start:end].strip(), tuple(words)))
            words, sentence_start = [], end
    return sentences


def count_tokens(text: str) -> int:
    """About as many tokens as a model would make of `text`: one per word and one per mark."""
    words = list(_WORD.finditer(text))
    marks = len("".join(_WORD.sub("", text).split()))
    return len(words) + marks


def language_of(text: str) -> str:
    """The language a recogniser names for a text of this script."""
    return "zh" if HAN.search(text) else "en"
