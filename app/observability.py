"""Structured logs, the request id, and metrics: what an operator sees of every request."""

import logging
import re
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any, NamedTuple

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Without local variables: those hold keys, tokens and the text being spoken.
_tracebacks = structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False))
METRICS_CONTENT_TYPE = CONTENT_TYPE_LATEST
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

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


class HeldAudio(NamedTuple):
    """What lies on this machine because the store has not taken it yet."""

    files: int = 0
    bytes: int = 0
    oldest_seconds: float = 0.0
    put_off: int = 0
    """How many uploads this process has put off so far."""


class Metrics:
    """Counters of one application."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "http_requests", "Requests answered", ["method", "route", "status"], registry=self._registry
        )
        self.duration = Histogram(
            "http_request_duration_seconds", "Time to the end of the answer", ["route"], registry=self._registry
        )

    def watch_held_audio(self, look: Callable[[], HeldAudio]) -> None:
        """Have audio that the store has not taken yet counted whenever somebody asks. To be called once."""
        self._registry.register(_HeldAudioCollector(look))

    def render(self) -> bytes:
        """The metrics in Prometheus' text format. It may touch the disk: call it in a thread."""
        return generate_latest(self._registry)


class _HeldAudioCollector(Collector):
    def __init__(self, look: Callable[[], HeldAudio]) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        held = self._look()
        yield GaugeMetricFamily("held_audio_files", "Files that the store has not taken yet", held.files)
        yield GaugeMetricFamily("held_audio_bytes", "Their size in bytes", held.bytes)
        yield GaugeMetricFamily("held_audio_oldest_seconds", "Age of the oldest of them", held.oldest_seconds)
        yield CounterMetricFamily("held_audio_uploads_put_off", "Uploads that were put off", held.put_off)


class RequestContext:
    """The outermost layer: names each request, logs it and counts it."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        started = time.perf_counter()
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] in {"http.response.start", "websocket.accept"}:
                status = message.get("status", 101)
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_named)
            finally:
                self._observe(scope, status, time.perf_counter() - started)

    def _observe(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope.get("method", "WEBSOCKET")
        self._metrics.requests.labels(method, route, status).inc()
        self._metrics.duration.labels(route).observe(seconds)
        log.info("request", method=method, route=route, status=status, duration_ms=round(seconds * 1000, 1))


def _request_id(scope: Scope) -> str:
    """The caller's id when it is harmless, a new one otherwise."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given = value.decode("latin-1")
            return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    return uuid.uuid4().hex
