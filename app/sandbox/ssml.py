"""Reading SSML (PROTOCOL.md §1.9): `<speak>` elements side by side, pauses, substitutes, rate, pitch and volume.

Effects, background music, phonemes and say-as are accepted and have no sound of their own here; a soundEvent becomes a
short pause, because the sandbox fetches nothing.
"""

from __future__ import annotations

import re
from typing import Final
from xml.parsers import expat

from app.sandbox.failures import TEXT_INVALID, TaskFailed, invalid_parameter
from app.sandbox.script import Line
from app.sandbox.sentences import SentenceCutter

_TAGS: Final = frozenset({"speak", "break", "sub", "phoneme", "soundEvent", "say-as", "s", "p", "w"})
_TIME: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s)")
_LONGEST_PAUSE: Final = 10_000
_SHORTEST_PAUSE: Final = 50
_SOUND_EVENT_PAUSE: Final = 300
_SPEAK: Final = re.compile(r"<\s*speak\b")


def looks_like_ssml(text: str) -> bool:
    """Whether the text means to be SSML; `enable_ssml` alone doesn't say so, since the SDK always sets it (§1.4)."""
    return _SPEAK.search(text) is not None


def read_ssml(text: str) -> list[Line]:
    """The lines of an SSML document; malformed markup fails as invalid text."""
    reader = _Reader()
    parser = expat.ParserCreate()
    parser.StartElementHandler = reader.open
    parser.EndElementHandler = reader.close
    parser.CharacterDataHandler = reader.text
    parser.StartDoctypeDeclHandler = reader.refuse_doctype
    try:
        parser.Parse(f"<sandbox>{text}</sandbox>", True)
    except expat.ExpatError as error:
        raise TaskFailed(TEXT_INVALID) from error
    return reader.lines


class _Reader:
    """Collects the text of each `<speak>` and cuts it into lines when the element ends."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self._attributes: dict[str, str] | None = None
        self._text: list[str] = []
        self._length = 0
        self._pauses: list[tuple[int, int]] = []
        self._substitutes = 0

    def refuse_doctype(self, *_: object) -> None:
        raise TaskFailed(TEXT_INVALID)

    def open(self, tag: str, attributes: dict[str, str]) -> None:
        if tag == "sandbox":
            return
        if tag not in _TAGS or (tag == "speak") == (self._attributes is not None):
            raise TaskFailed(TEXT_INVALID)
        if tag == "speak":
            self._attributes = attributes
            self._text, self._length, self._pauses = [], 0, []
        elif tag == "break":
            self._pause(_milliseconds(attributes.get("time", "1s")))
        elif tag == "soundEvent":
            self._pause(_SOUND_EVENT_PAUSE)
        elif tag == "sub":
            self._add(attributes.get("alias", ""))
            self._substitutes += 1

    def close(self, tag: str) -> None:
        if tag == "sub":
            self._substitutes -= 1
        elif tag == "speak":
            self._finish_passage()

    def text(self, data: str) -> None:
        if self._attributes is None:
            if data.strip():
                raise TaskFailed(TEXT_INVALID)
        elif not self._substitutes:
            self._add(data)

    def _add(self, data: str) -> None:
        self._text.append(data)
        self._length += len(data)

    def _pause(self, milliseconds: int) -> None:
        if self._pauses and self._pauses[-1][0] == self._length:
            milliseconds = min(_LONGEST_PAUSE, self._pauses.pop()[1] + milliseconds)
        self._pauses.append((self._length, milliseconds))

    def _finish_passage(self) -> None:
        attributes, self._attributes = self._attributes or {}, None
        rate = _number(attributes, "rate", 0.5, 2.0)
        pitch = _number(attributes, "pitch", 0.5, 2.0)
        volume = _number(attributes, "volume", 0, 100)
        cutter = SentenceCutter()
        cutter.add("".join(self._text))
        cutter.flush()
        start = 0
        sentences = list(iter(cutter.take, None))
        if not sentences:
            return
        sentences[-1] += cutter.take_silent_rest()
        for position, sentence in enumerate(sentences):
            end = start + len(sentence)
            last = position == len(sentences) - 1
            pauses = tuple((at - start, ms) for at, ms in self._pauses if start <= at < end or (last and at == end))
            self.lines.append(Line(sentence, pauses, rate, pitch, None if volume is None else round(volume)))
            start = end


def _number(attributes: dict[str, str], name: str, lowest: float, highest: float) -> float | None:
    if name not in attributes:
        return None
    try:
        value = float(attributes[name])
    except ValueError as error:
        raise invalid_parameter(name) from error
    if not lowest <= value <= highest:
        raise invalid_parameter(name)
    return value


def _milliseconds(time: str) -> int:
    match = _TIME.fullmatch(time.strip())
    if match is None:
        raise TaskFailed(TEXT_INVALID)
    milliseconds = float(match[1]) * (1000 if match[2] == "s" else 1)
    return round(min(max(milliseconds, _SHORTEST_PAUSE), _LONGEST_PAUSE))
