"""Measuring points: what a call to somebody else tells the request's timing, the metrics and the trace."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import structlog

from app import metrics, timing, tracing
from app.errors import AppError

Service = Literal["speech", "recognition", "transcription", "voice", "upload"]
OK, CANCELLED, BROKEN = "ok", "CANCELLED", "INTERNAL_ERROR"

_service: ContextVar[Service] = ContextVar("provider_service")


@dataclass(slots=True)
class ProviderCall:
    """A call under way. Who knows its outcome better than the error that leaves the block says so."""

    outcome: str | None = None


@contextmanager
def provider_call(service: Service, model: str | None = None) -> Iterator[ProviderCall]:
    """Inside the block, the provider is called, however often that takes; counted by how it ends."""
    call, outcome = ProviderCall(), OK
    token = _service.set(service)
    try:
        with tracing.span(f"provider {service}", model=metrics.model_label(model)):
            yield call
    except BaseException as error:
        outcome = _outcome(error)
        raise
    finally:
        _service.reset(token)
        metrics.PROVIDER_CALLS.labels(service, metrics.model_label(model), call.outcome or outcome).inc()


@contextmanager
def provider_try() -> Iterator[None]:
    """Inside the block of a call, one try of it is made over HTTP."""
    began_at = time.perf_counter()
    try:
        with timing.measure("provider"):
            yield
    finally:
        if service := _service.get(None):
            metrics.PROVIDER_CALL_SECONDS.labels(service).observe(time.perf_counter() - began_at)


@contextmanager
def provider_retry() -> Iterator[None]:
    """Inside the block of a call, a while passes until it is made again."""
    if service := _service.get(None):
        metrics.PROVIDER_RETRIES.labels(service).inc()
    with timing.measure("provider"):
        yield


@contextmanager
def storage_call(verb: str) -> Iterator[None]:
    """Inside the block, the store is waited for."""
    with timing.measure("storage"), tracing.span(f"storage {verb}"):
        yield


@contextmanager
def job(kind: str, record_id: int) -> Iterator[None]:
    """Inside the block, a background job is worked on."""
    with (
        metrics.JOBS_RUNNING.labels(kind).track_inprogress(),
        tracing.span(f"job {kind}", is_root=True, record_id=record_id),
        structlog.contextvars.bound_contextvars(**tracing.current_trace()),
    ):
        yield


def _outcome(error: BaseException) -> str:
    if isinstance(error, AppError):
        return error.code
    return CANCELLED if isinstance(error, asyncio.CancelledError | GeneratorExit) else BROKEN
