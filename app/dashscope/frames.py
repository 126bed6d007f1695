"""The CosyVoice WebSocket messages (PROTOCOL §1.3 to §1.5). Pure: text in, text out, no sockets."""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import orjson

from app.audio import AudioFormat

MAX_CHARACTERS = 10**9  # far beyond the 200,000 of a task (§1.8); what is larger is no count
MAX_TIME_MS = 10**9


class MalformedEvent(ValueError):
    """The provider sent something that is not an event of the protocol."""


@dataclass(frozen=True, slots=True)
class SpeechParameters:
    """What a synthesis sounds like. `rate` and `pitch` are the wire's names for speech and pitch rate (§1.4)."""

    model: str
    voice: str
    format: AudioFormat = "mp3"
    sample_rate: int = 22050
    volume: int = 50
    rate: float = 1.0
    pitch: float = 1.0
    instruction: str | None = None
    enable_ssml: bool = False
    word_timestamps: bool = False


class SpokenWord(NamedTuple):
    """A word of a voice that tells when it says each (§1.5)."""

    text: str
    begin_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class Event:
    """One text frame of the server. `characters` is cumulative for the task (§1.5).

    `output` is the kind of a result, `sentence-begin` and so on; `text` that of its sentence, which may be missing.
    """

    name: str
    task_id: str | None
    characters: int | None = None
    request_id: str | None = None
    error_code: str = ""
    error_message: str = ""
    output: str = ""
    text: str = ""
    words: tuple[SpokenWord, ...] = ()


def run_task(task_id: str, parameters: SpeechParameters) -> str:
    """Open a task; `input` must be there and empty (§1.3)."""
    wire: dict[str, Any] = {
        "text_type": "PlainText",
        "voice": parameters.voice,
        "format": parameters.format,
        "sample_rate": parameters.sample_rate,
        "volume": parameters.volume,
        "rate": parameters.rate,
        "pitch": parameters.pitch,
        "enable_ssml": parameters.enable_ssml,
    }
    if parameters.instruction:
        wire["instruction"] = parameters.instruction
    if parameters.word_timestamps:
        wire["word_timestamp_enabled"] = True
    payload = {
        "task_group": "audio",
        "task": "tts",
        "function": "SpeechSynthesizer",
        "model": parameters.model,
        "parameters": wire,
        "input": {},
    }
    return _message("run-task", task_id, payload)


def continue_task(task_id: str, text: str) -> str:
    """Hand over text to be spoken. Not before `task-started` (§1.2)."""
    return _message("continue-task", task_id, {"input": {"text": text}})


def flush_task(task_id: str) -> str:
    """Have the unfinished sentence spoken that is held back (§1.3)."""
    return _message("continue-task", task_id, {"input": {"flush": True}})


def finish_task(task_id: str) -> str:
    """Say that no more text comes: what is held back gets spoken (§1.2)."""
    return _message("finish-task", task_id, {"input": {}})


def cancel_task(task_id: str) -> str:
    """Stop speaking at once; the server answers `task-finished` and the socket stays usable (§1.3)."""
    return _message("finish-task", task_id, {"input": {"directive": "cancel"}})


def _message(action: str, task_id: str, payload: dict[str, Any]) -> str:
    header = {"action": action, "task_id": task_id, "streaming": "duplex"}
    return orjson.dumps({"header": header, "payload": payload}).decode()


def parse_event(text: str) -> Event:
    """Read a text frame of the server (§1.5). Raises MalformedEvent."""
    try:
        message = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise MalformedEvent("not JSON") from error
    header = _object(message, "header")
    name = header.get("event")
    if not isinstance(name, str):
        raise MalformedEvent("no event name")
    payload = _object(message, "payload")
    output = _optional_object(payload, "output")
    return Event(
        name=name,
        task_id=_text(header, "task_id") or None,
        characters=_characters(payload),
        request_id=_text(_object(header, "attributes"), "request_uuid") or None,
        error_code=_text(header, "error_code"),
        error_message=_text(header, "error_message"),
        output=_text(output, "type"),
        text=_text(output, "original_text"),
        words=_words(_optional_object(output, "sentence").get("words")),
    )


def _object(parent: Any, key: str) -> dict[str, Any]:
    if not isinstance(parent, dict):
        raise MalformedEvent("not an object")
    value = parent.get(key) or {}
    if not isinstance(value, dict):
        raise MalformedEvent(f"{key} is not an object")
    return value


def _optional_object(parent: dict[str, Any], key: str) -> dict[str, Any]:
    """What no sound depends on may be missing or odd."""
    value = parent.get(key)
    return value if isinstance(value, dict) else {}


def _words(listed: object) -> tuple[SpokenWord, ...]:
    found = (_word(each) for each in listed) if isinstance(listed, list) else ()
    return tuple(word for word in found if word is not None)


def _word(listed: object) -> SpokenWord | None:
    if not isinstance(listed, dict):
        return None
    text, begin, end = listed.get("text"), listed.get("begin_time"), listed.get("end_time")
    if not isinstance(text, str) or not _is_time(begin) or not _is_time(end):
        return None
    return SpokenWord(text, round(begin), round(end))


def _is_time(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_TIME_MS


def _text(parent: dict[str, Any], key: str) -> str:
    value = parent.get(key)
    return value if isinstance(value, str) else ""


def _characters(payload: dict[str, Any]) -> int | None:
    count = _object(payload, "usage").get("characters")
    if count is None:
        return None
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MAX_CHARACTERS:
        raise MalformedEvent("usage.characters is not a count")
    return count
