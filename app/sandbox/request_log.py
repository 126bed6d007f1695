"""The HTTP requests that the services saw, for tests: `GET /_sandbox/requests`, `?api_key=` for one account."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal

_log = logging.getLogger("app.sandbox")

AudioSource = Literal["data", "oss", "url"]

_NOTED_HEADERS: Final = (
    "x-dashscope-async",
    "x-dashscope-ossresourceresolve",
    "x-dashscope-sse",
    "x-dashscope-workspace",
)


@dataclass(slots=True)
class SeenRequest:
    """One request and what became of it. `status` is None while it runs, and for ever if it is never answered.

    `counted` is what the work of the request itself is billed by, see `ledger`; None if it did no such work.
    """

    request_id: str
    method: str
    path: str
    query: str
    api_key: str
    headers: Mapping[str, str]
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat())
    model: str | None = None
    action: str | None = None
    input: Any = None
    parameters: Any = None
    audio_source: AudioSource | None = None
    audio_bytes: int | None = None
    task_id: str | None = None
    counted: int | None = None
    fault: str | None = None
    status: int | None = None
    error_code: str | None = None

    def note_body(self, body: Mapping[str, Any]) -> None:
        """Keep what was asked for, without audio."""
        model = body.get("model")
        self.model = model if isinstance(model, str) else None
        self.input, self.parameters = _without_audio(body.get("input")), _without_audio(body.get("parameters"))

    def end(self, status: int | None, error_code: str | None = None) -> None:
        """Settle the answer and log it: never the key, a text or a URL."""
        self.status, self.error_code = status, error_code
        _log.info(
            "sandbox request %s model=%.40r status=%s error=%s fault=%s request_id=%s",
            self.method,
            self.model,
            status,
            error_code,
            self.fault,
            self.request_id,
        )


def noted_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of DashScope that change what a request means (§0.2); names in lower case."""
    return {name: headers[name] for name in _NOTED_HEADERS if name in headers}


class RequestLog:
    """The latest requests in the order they came."""

    def __init__(self, kept: int) -> None:
        self._requests: deque[SeenRequest] = deque(maxlen=kept)

    def add(self, request: SeenRequest) -> None:
        self._requests.append(request)

    def __iter__(self) -> Iterator[SeenRequest]:
        return iter(self._requests)

    def clear(self) -> None:
        self._requests.clear()

    def as_json(self, api_key: str | None = None) -> list[dict[str, object]]:
        """All requests, or those of one account."""
        return [asdict(request) for request in self._requests if api_key in (None, request.api_key)]


def _without_audio(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_audio(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_audio(item) for item in value]
    if isinstance(value, str) and value[:5].lower() == "data:":
        return f"{value[:64].partition(',')[0]},({len(value)} characters)"
    return value
