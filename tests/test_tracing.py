"""Traces: what a collector gets, and what it must never get."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from app import otlp
from app.otlp import Exporter
from tests.conftest import PASSWORD, CreateAccount
from tests.servers import ENDED_GRACEFULLY, Sandbox, Server, run_backend
from tests.talking import talking, token_of

TEXT = "这句话只有说的人和听的人知道。"
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
PATIENCE_SECONDS = 15.0


class Told(NamedTuple):
    """A span that has arrived."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    service: str


class Collector:
    """Takes spans over OTLP/HTTP, and keeps what came as it came."""

    def __init__(self) -> None:
        collector = self

        class Door(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.bodies.append((self.path, body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self.bodies: list[tuple[str, bytes]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Door)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """Take no more."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def spans(self) -> list[Told]:
        """Everything that has arrived."""
        found = []
        for path, body in self.bodies:
            assert path == "/v1/traces"
            for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                service = next(
                    each.value.string_value for each in group.resource.attributes if each.key == "service.name"
                )
                for scope in group.scope_spans:
                    for span in scope.spans:
                        attributes = {
                            each.key: getattr(each.value, each.value.WhichOneof("value") or "string_value")
                            for each in span.attributes
                        }
                        ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                        found.append(Told(span.name, *ids, attributes, service))
        return found


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """Where the traces go."""
    running = Collector()
    yield running
    running.close()


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, sandbox: Sandbox, collector: Collector) -> Iterator[Server]:
    """A server that traces what its callers trace, and nothing else."""
    settings = {**sandbox.settings, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "TRACE_SAMPLE_RATIO": "0"}
    with run_backend(tmp_path_factory.mktemp("traced"), {**settings, "OTEL_BSP_SCHEDULE_DELAY": "100"}) as running:
        yield running


def caller(trace_id: str, flags: str = "01") -> dict[str, str]:
    """The header of a caller who traces."""
    return {"traceparent": f"00-{trace_id}-{PARENT_ID}-{flags}"}


async def arrived(collector: Collector, trace_id: str, name: str) -> list[Told]:
    """The spans of a trace, once one of this name is among them."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            spans = [span for span in collector.spans if span.trace_id == trace_id]
            if any(span.name == name for span in spans):
                return spans
            await asyncio.sleep(0.05)


async def test_a_callers_trace_goes_on_to_the_provider_and_the_store(
    traced: Server, collector: Collector, create_account: CreateAccount
) -> None:
    account = await create_account(traced)
    account.client.headers.update(caller(TRACE_ID))
    answer = await account.synthesize(TEXT)
    assert answer.status_code == 200, answer.text
    spans = await arrived(collector, TRACE_ID, "POST /api/audio/tts/synthesize")
    named = {span.name: span for span in spans}
    request = named["POST /api/audio/tts/synthesize"]
    assert (request.parent_id, request.service) == (PARENT_ID, "ai-voice-backend")
    assert request.attributes["http.response.status_code"] == 200
    assert named["provider speech"].parent_id == request.span_id
    assert named["provider speech"].attributes == {"model": "cosyvoice-v3-flash"}
    assert named["storage put"].parent_id == request.span_id
    lines = [json.loads(line) for line in traced.log.splitlines() if answer.headers["x-request-id"] in line]
    assert lines
    assert {line["trace_id"] for line in lines} == {TRACE_ID}


async def test_a_failure_is_told_by_its_name(
    traced: Server, collector: Collector, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    account = await create_account(traced)
    trace_id = "a" * 32
    account.client.headers.update(caller(trace_id))
    with sandbox.faults(break_tasks=1):
        answer = await account.synthesize(TEXT)
    spans = await arrived(collector, trace_id, "POST /api/audio/tts/synthesize")
    [call] = [span for span in spans if span.name == "provider speech"]
    assert call.attributes["error.type"] == answer.json()["error"]


async def test_whom_nobody_traces_is_not_traced(
    traced: Server, collector: Collector, create_account: CreateAccount
) -> None:
    account = await create_account(traced)
    await account.client.get("/api/user/me", headers=caller("b" * 32, flags="00"))
    await account.client.get("/api/user/me")
    await account.client.get("/health/live", headers=caller("c" * 32))
    await account.client.get("/api/user/me", headers=caller("d" * 32))
    await arrived(collector, "d" * 32, "GET /api/user/me")
    assert not {"b" * 32, "c" * 32} & {span.trace_id for span in collector.spans}
    assert not [span for span in collector.spans if not span.parent_id and not span.name.startswith("job ")]


async def test_no_token_text_key_or_address_of_audio_leaves(
    traced: Server, collector: Collector, create_account: CreateAccount
) -> None:
    account = await create_account(traced)
    trace_id = "e" * 32
    account.client.headers.update(caller(trace_id))
    spoken = (await account.synthesize(TEXT)).json()["data"]
    media = httpx.URL(spoken["audio_url"]).path
    token = token_of(account)
    async with talking(traced, None, token=token, headers=caller(trace_id)) as talk:
        await talk.say(TEXT)
        await talk.end()
        await talk.hear()
    await account.client.get(f"/api/audio/records/{spoken['record_id']}/events", params={"token": token})
    await account.client.get(media, params={"Expires": "1", "Signature": "secret-signature"})
    await account.client.post("/api/auth/login", json={"username": account.username, "password": PASSWORD})
    await account.client.get("/api/user/me")
    await arrived(collector, trace_id, "GET /api/user/me")
    names = {span.name for span in collector.spans if span.trace_id == trace_id}
    assert {"WS /api/audio/tts/stream", "GET /api/audio/records/{record_id}/events"} <= names
    queries = [span.attributes["url.query"] for span in collector.spans if "url.query" in span.attributes]
    assert set(queries) == {"REDACTED"}
    assert len(queries) >= 2
    sent = b"".join(body for _, body in collector.bodies)
    for secret in (token, TEXT, account.api_key, PASSWORD, media, "secret-signature"):
        assert secret.encode() not in sent


async def test_the_last_spans_are_sent_at_the_end(tmp_path: Path, collector: Collector) -> None:
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "60000"}
    with run_backend(tmp_path, settings) as server:
        trace_id = "f" * 32
        httpx.get(f"{server.url}/api/user/me", headers=caller(trace_id))
        assert server.stop() in ENDED_GRACEFULLY
    assert [span.name for span in collector.spans if span.trace_id == trace_id] == ["GET /api/user/me"]


@pytest.mark.parametrize("listens", [False, True])
async def test_a_collector_that_is_away_holds_nobody_up(
    listens: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otlp, "FLUSH_SECONDS", 0.5)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        if listens:  # and never answers
            mute.listen()
        exporter = Exporter(f"http://127.0.0.1:{mute.getsockname()[1]}", 1.0)
        began_at = time.monotonic()
        with exporter.provider.get_tracer("test").start_as_current_span("lost"):
            pass
        assert time.monotonic() - began_at < 0.5
        await exporter.close()
        assert time.monotonic() - began_at < 3
    assert len([record for record in caplog.records if record.getMessage().startswith("spans_not_sent")]) <= 1
    assert {record.levelname for record in caplog.records} <= {"WARNING"}


def test_only_who_has_a_collector_loads_what_it_takes(backend: Server, traced: Server) -> None:
    def loads_protobuf(server: Server) -> bool:
        return "/google/_upb/" in Path(f"/proc/{server.process.pid}/maps").read_text()

    assert loads_protobuf(traced)
    assert not loads_protobuf(backend)
