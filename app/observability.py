"""Structured logs and the request context: what an operator sees of every request."""

import logging
import re
import sys
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import structlog

from app import metrics, timing, tracing
from app.timing import RequestTiming

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Without local variables: those hold keys, tokens and the text being spoken.
_tracebacks = structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False))
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_REFUSED_HANDSHAKE = 403
_SWITCHED = 101
MAX_ID_DIGITS = 19

log = structlog.get_logger(__name__)


def configure_logs(level: str) -> None:
    """Write one JSON object per line to standard error, each with the id of the request it belongs to."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _tracebacks,
                structlog.processors.JSONRenderer(ensure_ascii=False),
            ],
        )
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # It tells the addresses of WebSockets, which may hold a login token, and at DEBUG all that passes through them.
    server = logging.getLogger("uvicorn.error")
    server.setLevel(max(logging.INFO, logging.getLevelName(level)))
    server.addFilter(_tells_no_address)
    for chatty in ("httpx", "websockets", "oss2", "urllib3", "aiosqlite", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _tells_no_address(record: logging.LogRecord) -> bool:
    return '"WebSocket ' not in str(record.msg)


class RequestContext:
    """The outermost layer: names each request, times it, logs it and counts it."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        kind = _Socket if scope["type"] == "websocket" else _Exchange
        names = {"request_id": request_id, **tracing.current_trace()}
        with structlog.contextvars.bound_contextvars(**names), timing.timed_request() as request:
            answer = kind(scope, receive, send, request_id, request)
            try:
                await self._app(scope, answer.receive, answer.send)
            finally:
                answer.finish()


class _Exchange:
    """An HTTP request and its answer, as they pass by."""

    stream_kind = "http"

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str, request: RequestTiming) -> None:
        self.receive = receive
        self._scope = scope
        self._send = send
        self._request_id = request_id.encode()
        self._timing = request
        self._status = 0
        self._is_open = False
        self._has_length = True

    async def send(self, message: Message) -> None:
        """Name the answer when it starts, and see when it goes on."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._has_length = self._label(message)
        elif message["type"] == "http.response.body":
            if message.get("body"):
                self._timing.note_first_byte()
            if message.get("more_body") and not self._has_length and not self._is_open:
                self._open()
                self._note_stream()
        await self._send(message)

    def finish(self) -> None:
        """Nothing more comes: write down what became of it."""
        if self._is_open:
            metrics.OPEN_STREAMS.labels(self.stream_kind).dec()
        seconds, first = self._timing.seconds, self._timing.first_byte_seconds
        method = self._scope.get("method", "WEBSOCKET")
        metrics.REQUESTS.labels(metrics.method_label(method), self._route, self._status).inc()
        metrics.REQUEST_SECONDS.labels(self._route).observe(seconds)
        named = str(self._scope.get("path_params", {}).get("record_id", ""))
        is_id = named.isdecimal() and len(named) <= MAX_ID_DIGITS
        facts = {"record_id": int(named) if is_id else None, **self._timing.facts}
        log.info(
            "request",
            method=method,
            route=self._route,
            status=self._status,
            duration_ms=timing.to_ms(seconds),
            **({} if first is None else {"first_byte_ms": timing.to_ms(first)}),
            **self._timing.waits_ms(),
            **{name: fact for name, fact in facts.items() if fact is not None},
        )

    @property
    def _route(self) -> str:
        return getattr(self._scope.get("route"), "path", "unmatched")

    def _open(self) -> None:
        self._is_open = True
        metrics.OPEN_STREAMS.labels(self.stream_kind).inc()

    def _note_stream(self) -> None:
        self._timing.note_first_byte()
        metrics.FIRST_BYTE_SECONDS.labels(self._route).observe(self._timing.first_byte_seconds or 0.0)

    def _label(self, message: Message) -> bool:
        """Add our headers; says whether the answer tells its length."""
        headers = [*message.get("headers", []), (b"x-request-id", self._request_id)]
        headers.append((b"server-timing", self._timing.server_timing().encode()))
        names = dict(headers)
        # Who may read the answer may read its timing.
        if (origin := names.get(b"access-control-allow-origin")) is not None:
            headers.append((b"timing-allow-origin", origin))
        message["headers"] = headers
        return b"content-length" in names


class _Socket(_Exchange):
    """A WebSocket, as its messages pass by."""

    stream_kind = "websocket"

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str, request: RequestTiming) -> None:
        super().__init__(scope, self._hear, send, request_id, request)
        self._hears = receive
        self._has_spoken = False

    async def _hear(self) -> Message:
        message = await self._hears()
        if message["type"] == "websocket.disconnect":
            self._note_close(message.get("code"))
        return message

    async def send(self, message: Message) -> None:
        """Name the handshake's answer, and see what is sent."""
        match message["type"]:
            case "websocket.accept":
                self._status = _SWITCHED
                message["headers"] = [*message.get("headers", []), (b"x-request-id", self._request_id)]
                self._open()
            case "websocket.http.response.start":
                self._status = message["status"]
                self._label(message)
            case "websocket.send":
                if message.get("bytes") and not self._has_spoken:
                    self._has_spoken = True
                    self._note_stream()
            case "websocket.close":
                if self._status:
                    self._note_close(message.get("code", 1000))
                else:
                    self._status = _REFUSED_HANDSHAKE
        await self._send(message)

    def _note_close(self, code: int | None) -> None:
        self._timing.facts.setdefault("close_code", code)


def _request_id(scope: Scope) -> str:
    """The caller's id when it is harmless, a new one otherwise."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given = value.decode("latin-1")
            return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    return uuid.uuid4().hex
