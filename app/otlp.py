"""The way of spans to a collector: OTLP over HTTP, in batches, by a thread that nobody waits for."""

import asyncio
import logging
import threading
import time
import uuid

import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

log = structlog.get_logger(__name__)

SEND_SECONDS = 5.0
FLUSH_SECONDS = 2.0
WARNING_PAUSE_SECONDS = 60.0
REDACTED = "REDACTED"
_MEDIA = "/media/"


class Exporter:
    """Sends the spans of this process until it is closed."""

    def __init__(self, endpoint: str, sample_ratio: float) -> None:
        """Send to `endpoint`/v1/traces; one that is away costs spans and a warning, never a request."""
        self.provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
            resource=Resource.create({"service.name": "ai-voice-backend", "service.instance.id": uuid.uuid4().hex}),
            shutdown_on_exit=False,
        )
        self.provider.add_span_processor(_Redaction())
        logging.getLogger(OTLPSpanExporter.__module__).addFilter(_one_warning)
        sender = OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces", timeout=SEND_SECONDS)
        self.provider.add_span_processor(BatchSpanProcessor(sender))

    async def close(self) -> None:
        """Send what is left; gives up after two seconds."""
        flushing = threading.Thread(target=self.provider.shutdown, name="last-spans", daemon=True)
        flushing.start()
        give_up_at = asyncio.get_running_loop().time() + FLUSH_SECONDS
        while flushing.is_alive():
            if asyncio.get_running_loop().time() > give_up_at:
                log.warning("last_spans_not_sent")
                return
            await asyncio.sleep(0.02)


class _OneWarning(logging.Filter):
    """Lets one line a minute through, as a warning: a collector that is away is told of at each try of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self._quiet_until = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING or time.monotonic() < self._quiet_until:
            return False
        self._quiet_until = time.monotonic() + WARNING_PAUSE_SECONDS
        record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
        record.msg, record.args = "spans_not_sent: %s", (record.getMessage(),)
        return True


_one_warning = _OneWarning()


class _Redaction(SpanProcessor):
    """Takes out of spans what lets others in: queries hold login tokens and signatures, paths of media play audio."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        attributes = span.attributes or {}
        if "url.query" in attributes:
            span.set_attribute("url.query", REDACTED)
        if str(attributes.get("url.path", "")).startswith(_MEDIA):
            span.set_attribute("url.path", _MEDIA + REDACTED)
