"""The sandbox's mouth: espeak-ng where it is installed, a clear tone where it is not.

espeak-ng is one state per process, so every use takes one lock. Both speakers block: call them in a thread.
"""

from __future__ import annotations

import array
import ctypes
import functools
import logging
import math
import threading
import zlib
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from app.sandbox.characters import count_characters, is_speakable
from app.sandbox.fundamental import height_of_samples
from app.sandbox.languages import split_by_language
from app.sandbox.pitch import shift_pitch

SPEECH_RATE: Final = 22050
"""Samples per second of what a speaker returns: 16-bit mono in native (little-endian) order."""

_log = logging.getLogger("app.sandbox")

_NORMAL_WORDS_PER_MINUTE: Final = 200
_SLOWEST, _FASTEST = 80, 450
_AUDIBLE_PEAK: Final = 200
_PEAK_WINDOW: Final = SPEECH_RATE // 100
_MALE_VARIANTS: Final = ("", "+m1", "+m2", "+m3", "+m7", "+m8")
_FEMALE_VARIANTS: Final = ("+f1", "+f2", "+f3", "+f4", "+f5")
_TONE_SECONDS_PER_CHARACTER: Final = 0.1
_USUAL_PITCH: Final = 50
_USUAL_HEIGHT: Final = 150.0


@dataclass(frozen=True, slots=True)
class Manner:
    """How something is said: by whom, in which language, how fast, high and loud. A `height` in Hz is an enrolled
    voice's own; `pitch` raises it like any other."""

    voice_id: str
    gender: str
    languages: tuple[str, ...]
    hint: str | None
    rate: float
    pitch: float
    volume: int
    height: float | None = None


class Speaker(Protocol):
    """Turns text into 16-bit mono samples at `SPEECH_RATE`."""

    def speak(self, text: str, manner: Manner) -> bytes: ...


class ToneSpeaker:
    """A sine tone, as long as the text would take to say. Its height follows the voice and the pitch."""

    def speak(self, text: str, manner: Manner) -> bytes:
        seconds = max(0.2, _TONE_SECONDS_PER_CHARACTER * count_characters(text)) / manner.rate
        frequency = (manner.height or 330 + _fingerprint(manner.voice_id) % 220) * manner.pitch
        loudness = 300 * manner.volume
        samples = round(seconds * SPEECH_RATE)
        fade = SPEECH_RATE // 100
        return array.array(
            "h",
            (
                round(
                    loudness
                    * min(1.0, n / fade, (samples - n) / fade)
                    * math.sin(2 * math.pi * frequency * n / SPEECH_RATE)
                )
                for n in range(samples)
            ),
        ).tobytes()


class EspeakSpeaker:
    """espeak-ng by ctypes. Text that it can't pronounce, emoji for example, is given a tone instead of silence."""

    def __init__(self, library: ctypes.CDLL, data_path: str) -> None:
        self._library = library
        self._lock = threading.Lock()
        self._samples = bytearray()
        self._tone = ToneSpeaker()
        self._heights: dict[str, float] = {}
        callback_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        self._callback: Any = callback_type(self._collect)
        retrieve_audio = 2
        rate = library.espeak_Initialize(retrieve_audio, 0, data_path.encode(), 0)
        if rate != SPEECH_RATE:
            raise OSError(f"espeak-ng speaks at {rate} Hz instead of {SPEECH_RATE}")
        library.espeak_SetSynthCallback(self._callback)

    def speak(self, text: str, manner: Manner) -> bytes:
        speech = b"".join(
            self._run_at_height(language, run, manner)
            for language, run in split_by_language(text, manner.languages, manner.hint)
            if is_speakable(run)
        )
        if manner.volume and is_speakable(text) and not _is_audible(speech):
            return self._tone.speak(text, manner)
        return speech

    def _run_at_height(self, language: str, text: str, manner: Manner) -> bytes:
        factor = manner.pitch
        if manner.height is not None:
            factor *= manner.height / self._natural_height(language, manner)
        return shift_pitch(self._run(language, text, manner), SPEECH_RATE, factor)

    def _natural_height(self, language: str, manner: Manner) -> float:
        """How high an enrolled voice would speak if its sample didn't matter; measured once per voice of espeak-ng."""
        name = language + _variant(manner)
        if name not in self._heights:
            counted = self._run(language, "1 2 3 4 5 6 7 8 9", replace(manner, rate=1.0, volume=50))
            self._heights[name] = height_of_samples(counted, SPEECH_RATE) or _USUAL_HEIGHT
        return self._heights[name]

    def _run(self, language: str, text: str, manner: Manner) -> bytes:
        words_per_minute = min(max(round(_NORMAL_WORDS_PER_MINUTE * manner.rate), _SLOWEST), _FASTEST)
        encoded = text.replace("\0", " ").encode() + b"\0"
        with self._lock:
            self._choose_voice(language, _variant(manner))
            for parameter, value in (
                (1, words_per_minute),
                (2, manner.volume),
                (3, _USUAL_PITCH if manner.height else 40 + _fingerprint(manner.voice_id) // 8 % 21),
            ):
                self._library.espeak_SetParameter(parameter, value, 0)
            self._samples = bytearray()
            utf8 = 1
            self._library.espeak_Synth(encoded, len(encoded), 0, 1, 0, utf8, None, None)
            return bytes(self._samples)

    def _choose_voice(self, language: str, variant: str) -> None:
        for name in (language + variant, language, "en"):
            if self._library.espeak_SetVoiceByName(name.encode()) == 0:
                return

    def _collect(self, samples: int | None, count: int, _events: object) -> int:
        if samples and count > 0:
            self._samples += ctypes.string_at(samples, count * 2)
        return 0


def find_speaker() -> Speaker:
    """espeak-ng if its extra is installed, else the tone, and a line in the log."""
    try:
        import espeakng_loader  # type: ignore[import-untyped,import-not-found,unused-ignore]

        library = ctypes.CDLL(espeakng_loader.get_library_path())
        return EspeakSpeaker(library, espeakng_loader.get_data_path())
    except (ImportError, OSError, RuntimeError) as error:
        _log.warning("sandbox speaks in tones: espeak-ng is not available (%s)", type(error).__name__)
        return ToneSpeaker()


_loading: Final = threading.Lock()
_loaded: Final[list[Speaker]] = []


def load_speaker() -> Speaker:
    """The process's one speaker. Whoever asks while it is made waits: a second espeak-ng would break the first."""
    with _loading:
        if not _loaded:
            _loaded.append(find_speaker())
        return _loaded[0]


@functools.lru_cache(maxsize=32)
def speak(text: str, manner: Manner) -> bytes:
    """The samples of `text`, remembered for a little while: load tests say the same sentence again and again."""
    return load_speaker().speak(text, manner)


def silence(milliseconds: int) -> bytes:
    """Samples of silence."""
    return bytes(2 * round(SPEECH_RATE * milliseconds / 1000))


def _variant(manner: Manner) -> str:
    variants = _MALE_VARIANTS if manner.gender == "male" else _FEMALE_VARIANTS
    return variants[_fingerprint(manner.voice_id) % len(variants)]


def _fingerprint(voice_id: str) -> int:
    return zlib.crc32(voice_id.encode())


def _is_audible(speech: bytes) -> bool:
    """Whether any sample is loud enough; most speech shows that within a few milliseconds."""
    samples = memoryview(speech).cast("h")
    pieces = (samples[start : start + _PEAK_WINDOW] for start in range(0, len(samples), _PEAK_WINDOW))
    return any(max(piece) >= _AUDIBLE_PEAK or min(piece) <= -_AUDIBLE_PEAK for piece in pieces)
