"""What the sandbox said itself, so that it recognises its own voice.

An utterance is known by the sha256 of its whole audio, and of the samples alone where it is wav or pcm: a WAV whose
header was corrected, or one that was put around pcm, is the same utterance.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Final

_HEADER_BYTES: Final = 44
_CHUNK_HEADER_BYTES: Final = 8
_REMEMBERED: Final = 10_000


class Utterance:
    """One synthesis task as it grows: its text without markup and the fingerprints of its audio."""

    def __init__(self, audio_format: str) -> None:
        self._texts: list[str] = []
        self._whole = hashlib.sha256()
        self._samples = hashlib.sha256()
        self._header_left = _HEADER_BYTES if audio_format == "wav" else 0

    def say(self, text: str) -> None:
        """Take the next text."""
        self._texts.append(text)

    def hear(self, audio: bytes) -> None:
        """Take the next bytes of the stream."""
        self._whole.update(audio)
        skipped = min(self._header_left, len(audio))
        self._header_left -= skipped
        self._samples.update(memoryview(audio)[skipped:])

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def fingerprints(self) -> frozenset[bytes]:
        return frozenset((self._whole.digest(), self._samples.digest()))


class SpokenAudio:
    """The texts of the latest utterances by fingerprint."""

    def __init__(self) -> None:
        self._texts: OrderedDict[bytes, str] = OrderedDict()

    def remember(self, utterance: Utterance) -> None:
        text = utterance.text
        for fingerprint in utterance.fingerprints:
            self._texts[fingerprint] = text
            self._texts.move_to_end(fingerprint)
        while len(self._texts) > _REMEMBERED:
            self._texts.popitem(last=False)

    def text_of(self, audio: bytes) -> str | None:
        """The text that `audio` was made from, None if the sandbox never said it."""
        for candidate in (audio, _wav_samples(audio)):
            if candidate is not None and (text := self._texts.get(hashlib.sha256(candidate).digest())) is not None:
                return text
        return None


def _wav_samples(audio: bytes) -> memoryview | None:
    """The content of the data chunk; its size is not believed beyond the end of the file, as in a streamed WAV."""
    if audio[:4] != b"RIFF" or audio[8:12] != b"WAVE":
        return None
    position = 12
    while position + _CHUNK_HEADER_BYTES <= len(audio):
        name, size = audio[position : position + 4], int.from_bytes(audio[position + 4 : position + 8], "little")
        position += _CHUNK_HEADER_BYTES
        if name == b"data":
            return memoryview(audio)[position : position + (size or len(audio))]
        position += size + size % 2
    return None
