"""Which voice may speak through which model (PROTOCOL.md §1.9).

`voices.json` holds the system voices. The others are those that the caller's account has enrolled (§3).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson

from app.sandbox.failures import VOICE_MISSING, VOICE_REFUSED, TaskFailed

MODELS: Final = frozenset(
    {
        "cosyvoice-v3.5-plus",
        "cosyvoice-v3.5-flash",
        "cosyvoice-v3-plus",
        "cosyvoice-v3-flash",
        "cosyvoice-v2",
        "cosyvoice-v1",
    }
)


@dataclass(frozen=True, slots=True)
class Voice:
    """A voice as one model sees it. An enrolled one has a height of its own: its fundamental frequency in Hz."""

    voice_id: str
    languages: tuple[str, ...] = ("zh", "en")
    gender: str = ""
    cloned: bool = False
    ssml: bool = False
    instruct: bool = False
    timestamp: bool = False
    height: float | None = None


EnrolledSpeaker = Callable[[str, str], Voice | None]
"""The caller's own voice for a model and an id, None if it may not speak."""


def find_voice(model: str, voice_id: object, enrolled: EnrolledSpeaker) -> Voice:
    """The voice, or the failure that the pair deserves: 418, or `Request voice is invalid!` for none (§1.9)."""
    if not isinstance(voice_id, str) or not voice_id:
        raise TaskFailed(VOICE_MISSING)
    system = _system_voices().get(voice_id)
    if system is not None:
        voice, models = system
        if model not in models:
            raise TaskFailed(VOICE_REFUSED)
        return voice
    own = enrolled(model, voice_id)
    if own is None:
        raise TaskFailed(VOICE_REFUSED)
    return own


@functools.cache
def _system_voices() -> dict[str, tuple[Voice, frozenset[str]]]:
    entries = orjson.loads((Path(__file__).parent / "voices.json").read_bytes())
    return {
        voice_id: (
            Voice(
                voice_id,
                languages=tuple(entry["languages"]),
                gender=entry["gender"],
                ssml=entry["ssml"],
                instruct=entry["instruct"],
                timestamp=entry["timestamp"],
            ),
            frozenset(entry["models"]),
        )
        for voice_id, entry in entries.items()
    }
