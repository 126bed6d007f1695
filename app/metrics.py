"""What is counted, for Prometheus: by one process, or together by all those that one `serve` runs.

The series belong to the process, not to an application: several applications in one process count together.
"""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import NamedTuple

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from app.catalog import recognition_models, speech_models

CONTENT_TYPE = CONTENT_TYPE_LATEST
OTHER = "other"
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_GAUGE_FILE = re.compile(r"gauge_live[a-z]*_(\d+)\.db")
_METHODS = {"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "WEBSOCKET"}
_WAITS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_LAGS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


def _forget_gauges(folder: str, *, of_pid: int | None = None) -> None:
    """Drop what processes that are gone said of their present; or what one of this number said that lived before."""
    for file in Path(folder).glob("gauge_live*.db"):
        named = _GAUGE_FILE.fullmatch(file.name)
        if named and (int(named[1]) == of_pid if of_pid else not _lives(int(named[1]))):
            file.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if FOLDER in os.environ:
    _forget_gauges(os.environ[FOLDER], of_pid=os.getpid())

disable_created_metrics()  # type: ignore[no-untyped-call]
_registry = CollectorRegistry()


def _counter(name: str, meaning: str, *labels: str) -> Counter:
    return Counter(name, meaning, labels, registry=_registry)


def _histogram(name: str, meaning: str, *labels: str, buckets: tuple[float, ...] = _WAITS) -> Histogram:
    return Histogram(name, meaning, labels, registry=_registry, buckets=buckets)


def _gauge(name: str, meaning: str, *labels: str) -> Gauge:
    return Gauge(name, meaning, labels, registry=_registry, multiprocess_mode="livesum")


REQUESTS = _counter("http_requests", "Requests answered", "method", "route", "status")
REQUEST_SECONDS = _histogram("http_request_duration_seconds", "Time to the end of the answer", "route")
FIRST_BYTE_SECONDS = _histogram("http_first_byte_seconds", "Time to the first byte or frame of a stream", "route")
OPEN_STREAMS = _gauge("open_streams", "Answers that are being streamed, and WebSockets", "kind")
PROVIDER_CALLS = _counter("provider_calls", "Calls to the provider by how they ended", "service", "model", "outcome")
PROVIDER_CALL_SECONDS = _histogram(
    "provider_call_seconds", "Time of one try of a call, from when it is made", "service"
)
PROVIDER_FIRST_AUDIO_SECONDS = _histogram("provider_first_audio_seconds", "From a task's first text to its first audio")
PROVIDER_RETRIES = _counter("provider_retries", "Calls made again", "service")
PROVIDER_CONNECTIONS = _gauge("provider_connections", "WebSockets to the provider", "state")
DATABASE_CONNECTIONS = _gauge("database_connections", "Connections to the database", "state")
DATABASE_POOL_SIZE = _gauge("database_pool_size", "Connections to the database that are kept")
BILLED_AMOUNT = _counter("billed_amount", "Money billed to users", "model", "currency")
BILLED_UNITS = _counter("billed_units", "Characters and seconds billed to users", "model", "unit")
BILLED_ESTIMATES = _counter("billed_estimates", "Bills by estimate: the provider's count was lost", "model")
RECORDS_ENDED = _counter("records_ended", "Records by how they ended", "type", "status")
EVENT_LOOP_LAG_SECONDS = _histogram("event_loop_lag_seconds", "How late a timer rings, once a second", buckets=_LAGS)
JOBS_RUNNING = _gauge("jobs_running", "Background jobs that are being worked on", "kind")
HELD_AUDIO_PUT_OFF = _counter("held_audio_uploads_put_off", "Uploads that were put off")


class HeldAudio(NamedTuple):
    """What lies on this machine because the store has not taken it yet."""

    files: int = 0
    bytes: int = 0
    oldest_seconds: float = 0.0
    put_off: int = 0
    """How many uploads this process has put off so far."""


class JobsDue(NamedTuple):
    """Jobs of a kind that somebody should work on, and nobody does; `lag` is how long the first of them waits."""

    kind: str
    jobs: int
    lag: timedelta


class Backlog(NamedTuple):
    """What the database says is to be done. Orphans are records whose process has died."""

    due: tuple[JobsDue, ...]
    records_running: int
    records_orphaned: int
    orphans_lag: timedelta


@contextmanager
def gathered_from_processes() -> Iterator[None]:
    """Have the processes that are started inside the block, by spawning, count together: each shows the sum of all.

    What a process that has died counted stays counted.
    """
    with tempfile.TemporaryDirectory(prefix="metrics-") as folder:
        os.environ[FOLDER] = folder
        try:
            yield
        finally:
            del os.environ[FOLDER]


def method_label(method: str) -> str:
    """A method as a label: one of a few."""
    return method if method in _METHODS else OTHER


def model_label(model: str | None) -> str:
    """A model as a label: one of the catalogue, or `other`."""
    return model if model and model in _models() else OTHER


@cache
def _models() -> frozenset[str]:
    return frozenset(model.model_id for model in speech_models()) | {model.model_id for model in recognition_models()}


def render(held: HeldAudio, backlog: Backlog | None) -> bytes:
    """All series in Prometheus' text format. It may touch the disk: call it in a thread.

    `backlog` is None when the database does not answer; what only it knows is left out then.
    """
    if folder := os.environ.get(FOLDER):
        _forget_gauges(folder)
        counted = CollectorRegistry()
        MultiProcessCollector(counted, path=folder)  # type: ignore[no-untyped-call]
    else:
        counted = _registry
    found = CollectorRegistry()
    found.register(_Found([*_describe_held(held), *_describe_backlog(backlog)]))
    return generate_latest(counted) + generate_latest(found)


class _Found(Collector):
    """What was looked up for this answer."""

    def __init__(self, series: list[Metric]) -> None:
        self._series = series

    def collect(self) -> Iterable[Metric]:
        return self._series


def _describe_held(held: HeldAudio) -> Iterator[Metric]:
    yield GaugeMetricFamily("held_audio_files", "Files that the store has not taken yet", held.files)
    yield GaugeMetricFamily("held_audio_bytes", "Their size in bytes", held.bytes)
    yield GaugeMetricFamily("held_audio_oldest_seconds", "Age of the oldest of them", held.oldest_seconds)


def _describe_backlog(backlog: Backlog | None) -> Iterator[Metric]:
    yield GaugeMetricFamily("metrics_database_up", "Whether the database answered for this page", backlog is not None)
    if backlog is None:
        return
    due = GaugeMetricFamily("jobs_due", "Jobs that are due and that nobody works on", labels=["kind"])
    lag = GaugeMetricFamily("jobs_lag_seconds", "How long the first of them has been due", labels=["kind"])
    for each in backlog.due:
        due.add_metric([each.kind], each.jobs)
        lag.add_metric([each.kind], each.lag.total_seconds())
    yield due
    yield lag
    yield GaugeMetricFamily("records_running", "Records without an end", backlog.records_running)
    yield GaugeMetricFamily("records_orphaned", "Those whose process has died", backlog.records_orphaned)
    orphans_lag = backlog.orphans_lag.total_seconds()
    yield GaugeMetricFamily("records_orphaned_lag_seconds", "How long the first of them has had no owner", orphans_lag)
