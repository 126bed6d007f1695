"""Cutting arriving text into sentences (PROTOCOL.md §1.2).

Complete sentences can be taken at once; the unfinished tail stays until more text, a flush or the finish completes it.
The cuts tile the text: no character is lost and none is counted twice.
"""

from __future__ import annotations

import re
from typing import Final

from app.sandbox.characters import is_speakable

LONGEST_SENTENCE: Final = 120
_SHORTEST_FORCED_CUT: Final = 40

# The official samples end a sentence at a full-width comma (§1.5). An ASCII full stop ends one only when a blank or a
# Han character follows, so that 3.14 and example.com stay whole.
_BOUNDARY: Final = re.compile(
    r"(?:[。！？；，…!?\n]+|\.+(?=[\s\u4e00-\u9fff]))"
    r"[”’」』）》】)\]\s]*"
)
_BREATH: Final = re.compile(r"[,、：: ]")


class SentenceCutter:
    """A buffer that text is added to and sentences are taken from."""

    def __init__(self) -> None:
        self._text = ""
        self._added: list[str] = []
        self._start = 0
        self._forced_to = 0

    def add(self, text: str) -> None:
        self._added.append(text)

    def flush(self) -> None:
        """Everything received so far is complete."""
        self._absorb()
        self._forced_to = len(self._text)

    def take(self) -> str | None:
        """The next complete sentence, or None while there is none.

        After a flush, a remainder that holds nothing speakable is left in the buffer: see `take_silent_rest`.
        """
        self._absorb()
        end = self._end_of_sentence()
        if end is None:
            return None
        sentence = self._text[self._start : end]
        self._start = end
        return sentence

    def take_silent_rest(self) -> str:
        """What is left once no more text will come: punctuation and blanks that are counted but not spoken."""
        self._absorb()
        rest = self._text[self._start :]
        self._start = len(self._text)
        return rest

    def holds_speech(self) -> bool:
        """Whether anything speakable is still in the buffer."""
        return any(map(is_speakable, (self._text[self._start :], *self._added)))

    def _absorb(self) -> None:
        """Append what was added, all at once: a long text may come in very many pieces."""
        if self._added:
            self._text = self._text[self._start :] + "".join(self._added)
            self._added.clear()
            self._forced_to = max(0, self._forced_to - self._start)
            self._start = 0

    def _end_of_sentence(self) -> int | None:
        position = self._start
        flushed = self._forced_to > self._start and is_speakable(self._text[self._start : self._forced_to])
        while boundary := _BOUNDARY.search(self._text, position, self._start + LONGEST_SENTENCE):
            if is_speakable(self._text[self._start : boundary.start()]):
                return min(boundary.end(), self._forced_to) if flushed else boundary.end()
            position = boundary.end()
        if flushed and self._forced_to - self._start <= LONGEST_SENTENCE:
            return self._forced_to
        if len(self._text) - self._start > LONGEST_SENTENCE and is_speakable(self._text[self._start :]):
            return self._forced_cut()
        return None

    def _forced_cut(self) -> int:
        window_end = self._start + LONGEST_SENTENCE
        breaths = list(_BREATH.finditer(self._text, self._start + _SHORTEST_FORCED_CUT, window_end))
        return breaths[-1].end() if breaths else window_end
