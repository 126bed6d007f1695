"""Traces, if there is a collector to send them to: what belongs to which request, and to which of its callers.

Without a collector nothing of OpenTelemetry's SDK is loaded, and a span costs nothing.
"""

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.trace import Span, StatusCode, Tracer

from app.errors import AppError

if TYPE_CHECKING:
    from app.otlp import Exporter

_tracer: Tracer | None = None


_ASKED_BY_MONITORS = {"/health/live", "/health/ready", "/metrics"}


class Traces:
    """The spans of an application, on their way to the collector at `endpoint`, if there is one.

    Those of a share of the requests are sent, 0 to 1; callers that say in `traceparent` whether they trace a request
    are followed.
    """

    def __init__(self, endpoint: str | None, sample_ratio: float) -> None:
        self._exporter: Exporter | None = None
        if endpoint is not None:
            from app import otlp  # here, so that nobody else pays for loading it

            global _tracer
            self._exporter = otlp.Exporter(endpoint, sample_ratio)
            _tracer = self._exporter.provider.get_tracer("ai-voice-backend")

    @property
    def telemetry(self) -> Any:
        """What the framework is to tell of each request: a span, and nothing else."""
        nothing: dict[str, Any] = {
            "tracing": False,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
        }
        if self._exporter is None:
            return nothing
        provider = self._exporter.provider
        return {**nothing, "tracing": True, "tracer_provider": provider, "exclude": _is_of_monitor}

    async def __aenter__(self) -> None:
        """Nothing needs to be opened."""

    async def __aexit__(self, *_: object) -> None:
        """Send what is left, in two seconds at most."""
        if self._exporter is not None:
            await self._exporter.close()


def _is_of_monitor(scope: MutableMapping[str, Any]) -> bool:
    return scope["path"] in _ASKED_BY_MONITORS


@contextmanager
def span(name: str, *, is_root: bool = False, **attributes: str | int) -> Iterator[Span]:
    """Inside the block, something goes on that is worth telling apart; a part of a trace, or by itself if it `is_root`.

    Attributes are names of things, never what somebody said or may use as a key.
    """
    if _tracer is None or not (is_root or trace.get_current_span().get_span_context().is_valid):
        yield trace.INVALID_SPAN
        return
    with _tracer.start_as_current_span(
        name, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as begun:
        try:
            yield begun
        except BaseException as error:
            begun.set_attribute("error.type", error.code if isinstance(error, AppError) else type(error).__qualname__)
            begun.set_status(StatusCode.ERROR)
            raise


def current_trace() -> dict[str, str]:
    """The `trace_id` that log lines name; nothing outside a trace."""
    if _tracer is None:
        return {}
    context = trace.get_current_span().get_span_context()
    return {"trace_id": f"{context.trace_id:032x}"} if context.is_valid else {}
