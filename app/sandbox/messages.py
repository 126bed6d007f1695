"""The JSON text frames of the CosyVoice socket, read and written (PROTOCOL.md §1.3, §1.5)."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from app.sandbox.failures import InvalidFrame
from app.sandbox.word_times import Word


@dataclass(frozen=True, slots=True)
class ClientMessage:
    """One frame of the client. What it lacks is empty here: judging it is the reader's business."""

    action: str
    task_id: str
    streaming: str
    payload: Mapping[str, Any]


def read_message(frame: str) -> ClientMessage:
    """Take a text frame apart (§1.3). Anything but a JSON object is an `InvalidFrame`."""
    try:
        document = orjson.loads(frame)
    except orjson.JSONDecodeError as error:
        raise InvalidFrame from error
    if not isinstance(document, dict):
        raise InvalidFrame
    header = document.get("header")
    payload = document.get("payload")
    fields = header if isinstance(header, dict) else {}
    return ClientMessage(
        action=_string(fields, "action"),
        task_id=_string(fields, "task_id"),
        streaming=_string(fields, "streaming"),
        payload=payload if isinstance(payload, dict) else {},
    )


def _string(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    return value if isinstance(value, str) else ""


def task_started(task_id: str) -> str:
    """`task-started` (§1.5)."""
    return _event(task_id, "task-started", {})


def sentence_begin(task_id: str, index: int, text: str | None) -> str:
    """`result-generated` of type sentence-begin (§1.5), without `original_text` if that is None."""
    output = {"type": "sentence-begin", **_original(text), "sentence": {"index": index, "words": []}}
    return _event(task_id, "result-generated", {"output": output})


def sentence_synthesis(task_id: str, index: int) -> str:
    """`result-generated` that announces exactly one binary frame (§1.5)."""
    output = {"type": "sentence-synthesis", "sentence": {"index": index, "words": []}}
    return _event(task_id, "result-generated", {"output": output})


def sentence_end(task_id: str, index: int, text: str | None, words: Sequence[Word], characters: int) -> str:
    """`result-generated` of type sentence-end, with the characters of the task so far (§1.5)."""
    output = {"type": "sentence-end", **_original(text), "sentence": {"index": index, "words": words}}
    return _event(task_id, "result-generated", {"output": output, "usage": {"characters": characters}})


def task_finished(task_id: str, characters: int, words: Sequence[Word] | None = None) -> str:
    """`task-finished` with the total, the `request_uuid` attribute, and in one edition all words (§1.5)."""
    payload: dict[str, Any] = {"usage": {"characters": characters}}
    if words is not None:
        payload["output"] = {"sentence": {"words": words}}
    return _event(task_id, "task-finished", payload, {"request_uuid": str(uuid.uuid4())})


def task_failed(task_id: str, code: str, message: str) -> str:
    """`task-failed`: code and message live in the header, the payload is empty (§1.5)."""
    header = {
        "task_id": task_id,
        "event": "task-failed",
        "error_code": code,
        "error_message": message,
        "attributes": {},
    }
    return orjson.dumps({"header": header, "payload": {}}).decode()


def garbage(_: str) -> str:
    """No JSON."""
    return '{"header":{"task_id":'


def foreign(task_id: str) -> str:
    """An event that the protocol does not know."""
    return _event(task_id, "task-progressed", {"output": {"type": "progress"}})


def headless(_: str) -> str:
    """An event without its header."""
    return orjson.dumps({"payload": {"output": {"type": "sentence-begin"}}}).decode()


def misshapen(task_id: str) -> str:
    """An event whose values have other types than documented (§1.5)."""
    payload = {"output": {"type": ["sentence-end"], "sentence": "0"}, "usage": {"characters": "many"}}
    return _event(task_id, "result-generated", payload)


MALFORMED: Final[Mapping[str, Callable[[str], str]]] = {
    "garbage": garbage,
    "foreign": foreign,
    "headless": headless,
    "misshapen": misshapen,
}
"""What no service should send, by name; made for a task id."""


def _original(text: str | None) -> dict[str, str]:
    return {} if text is None else {"original_text": text}


def _event(task_id: str, event: str, payload: dict[str, Any], attributes: dict[str, str] | None = None) -> str:
    header = {"task_id": task_id, "event": event, "attributes": attributes or {}}
    return orjson.dumps({"header": header, "payload": payload}).decode()
