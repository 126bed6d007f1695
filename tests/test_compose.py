"""What compose.yaml starts, and how nginx in front of it treats requests: the shipped files, with other ports."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_urlsafe
from typing import Any

import httpx
import pytest
import yaml
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from app.main import LONGEST_CHARACTER_BYTES, MAX_BODY_BYTES
from app.routers import recognition, voices
from app.serving import PROTECTIVE_HEADERS
from app.settings import Settings
from tests.cluster.proxy import OPERATIONS, Proxy, is_installed, run_proxy
from tests.servers import NO_AUTHORITIES, PROJECT, Server, free_port
from tests.skipping import skip_without

TEXT = (PROJECT / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PRODUCT = ("backend-1", "backend-2", "worker", "migrate")
SERVERS_OWN = {"FORWARDED_ALLOW_IPS"}
NGINX = (OPERATIONS / "nginx.conf").read_text()
SETTLING_SECONDS = 15


# ---- compose.yaml


@pytest.mark.parametrize("service", PRODUCT)
def test_what_compose_sets_are_settings(service: str) -> None:
    given = set(SERVICES[service]["environment"]) - SERVERS_OWN
    assert given <= {name.upper() for name in Settings.model_fields}
    assert SERVICES[service]["env_file"] == ".env"


def test_the_settings_of_compose_are_fit_for_production(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in SERVICES["backend-1"]["environment"].items():
        asked_for = "https://voice.example.com" if name == "PUBLIC_BASE_URL" else token_urlsafe(48)
        monkeypatch.setenv(name, re.sub(r"\$\{\w+:\?[^}]*\}", asked_for, value))
    monkeypatch.setenv("ENVIRONMENT", "production")
    settings = Settings()
    assert (settings.background_jobs, settings.auto_migrate, settings.uses_sqlite) == (False, False, False)
    assert settings.redis_url is not None


@pytest.mark.parametrize("name", ["POSTGRES_PASSWORD", "JWT_SECRET", "CREDENTIAL_KEYS", "PUBLIC_BASE_URL"])
def test_what_a_person_must_set_is_asked_for_in_words(name: str) -> None:
    uses = re.findall(rf"\$\{{{name}\b[^}}]*\}}", TEXT)
    assert uses
    assert all(use.startswith(f"${{{name}:?set {name} in .env") for use in uses)


def test_every_variable_is_explained_where_a_person_looks() -> None:
    head = TEXT[: TEXT.index("\nx-")]
    named = set(re.findall(r"\$\{([A-Z_]+)", TEXT)) - {"ENVIRONMENT"}
    assert {name for name in named if name not in head} == set()


def test_images_are_pinned() -> None:
    images = {name: service["image"] for name, service in SERVICES.items()}
    built = {name for name, service in SERVICES.items() if "build" in service}
    assert built == set(PRODUCT)
    others = [image for name, image in images.items() if name not in built]
    pinned = [re.fullmatch(r"[a-z/-]+:v?\d+(\.\d+)*(-alpine)?", image) for image in others]
    assert all(pinned), images


def test_only_nginx_is_reached_from_outside() -> None:
    public = [name for name, service in SERVICES.items() if "ports" in service and "profiles" not in service]
    assert public == ["nginx"]
    assert all(
        port.startswith("127.0.0.1:")
        for name, service in SERVICES.items()
        if name != "nginx"
        for port in service.get("ports", [])
    )
    assert SERVICES["postgres"]["networks"] == SERVICES["redis"]["networks"] == ["inside"]


@pytest.mark.parametrize("service", PRODUCT)
def test_the_product_runs_with_as_few_rights_as_it_can(service: str) -> None:
    ours = SERVICES[service]
    assert ours["read_only"] is True
    assert ours["cap_drop"] == ["ALL"]
    assert ours["security_opt"] == ["no-new-privileges:true"]
    assert ours["volumes"] == ["data:/data", "/tmp"]


def test_an_orderly_stop_is_waited_for() -> None:
    needed = Settings.model_fields["drain_seconds"].default + SETTLING_SECONDS
    for name in ("backend-1", "backend-2", "worker"):
        assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) > needed


def test_nginx_gets_the_files_that_are_tested_here() -> None:
    mounted = {volume.split(":")[1]: volume.split(":")[0] for volume in SERVICES["nginx"]["volumes"]}
    assert mounted == {
        "/etc/nginx/nginx.conf": "./app/operations/nginx.conf",
        "/etc/nginx/backends.conf": "./app/operations/backends.conf",
    }
    named = re.findall(r"^\s*server (\S+?):8000 resolve", (OPERATIONS / "backends.conf").read_text(), re.MULTILINE)
    assert named == [name for name in SERVICES if name.startswith("backend-")]


def test_every_process_of_the_product_is_watched_where_it_listens() -> None:
    watched = yaml.safe_load(COMPOSE["configs"]["prometheus"]["content"])["scrape_configs"][0]["static_configs"]
    assert watched == [{"targets": ["backend-1:8000", "backend-2:8000", "worker:8001"]}]
    dashboards = yaml.safe_load(COMPOSE["configs"]["dashboards"]["content"])["providers"][0]["options"]["path"]
    [dashboard] = SERVICES["grafana"]["volumes"]
    file, place, _ = dashboard.split(":")
    assert place.startswith(dashboards)
    assert json.loads((PROJECT / file).read_text())["title"]
    for mounted in (each for name in ("prometheus", "grafana") for each in SERVICES[name]["configs"]):
        assert yaml.safe_load(COMPOSE["configs"][mounted["source"]]["content"])


def health_check() -> list[str]:
    """The command by which the image knows whether it is well."""
    [found] = re.findall(r"^HEALTHCHECK [^\[]*(\[.*\])$", (PROJECT / "Dockerfile").read_text(), re.MULTILINE)
    command: list[str] = json.loads(found)
    return command


@pytest.mark.parametrize("port", ["8000", "8001"])
def test_the_image_knows_whether_a_backend_or_a_worker_is_well(backend: Server, port: str) -> None:
    def exit_code(live: str) -> int:
        _, *arguments = health_check()
        for each in ("8000", "8001"):
            arguments[-1] = arguments[-1].replace(each, live if each == port else str(free_port()))
        return subprocess.run([sys.executable, *arguments], capture_output=True).returncode

    assert exit_code(backend.url.rpartition(":")[2]) == 0
    assert exit_code(str(free_port())) != 0


# ---- nginx


@dataclass
class Asked:
    """A request as a backend sees it."""

    line: str
    headers: dict[str, list[str]]


@dataclass
class Backends:
    """nginx in front of two backends, of which the second may not be there."""

    proxy: Proxy
    client: httpx.AsyncClient
    asked: list[Asked] = field(default_factory=list)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request: `/drop` never, `/drop-once` at the second time, `/stream` in two pieces."""
        line, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers: dict[str, list[str]] = {}
        for each in fields:
            name, _, value = each.partition(": ")
            headers.setdefault(name.lower(), []).append(value)
        await reader.readexactly(int(headers.get("content-length", ["0"])[0]))
        self.asked.append(Asked(line, headers))
        if "/drop" not in line or ("/drop-once" in line and len(self.asked) > 1):
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n")
            if "/stream" in line:
                await self.go_on.wait()
            writer.write(b"6\r\nsecond\r\n0\r\n\r\n")
        writer.close()

    async def logged(self, *paths: str) -> list[dict[str, Any]]:
        """The last lines of nginx's log, once they are about requests for these paths: it writes after it answers."""
        async with asyncio.timeout(10):
            while [line["path"] for line in self.proxy.requests][-len(paths) :] != [*paths]:
                await asyncio.sleep(0.01)
        return self.proxy.requests[-len(paths) :]


@asynccontextmanager
async def backends(folder: Path, *, both: bool = True, at_once: int | None = None) -> AsyncIterator[Backends]:
    """Run nginx in front of backends that tell what they are asked."""
    if not is_installed():
        skip_without("nginx")
    made: list[Backends] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await made[0].answer(reader, writer)

    async with AsyncExitStack() as running:
        servers = [await asyncio.start_server(answer, "127.0.0.1", 0) for _ in range(2 if both else 1)]
        for server in servers:
            await running.enter_async_context(server)
        ports = [server.sockets[0].getsockname()[1] for server in servers]
        proxy = running.enter_context(run_proxy(folder, ports if both else [*ports, free_port()], at_once))
        client = httpx.AsyncClient(base_url=proxy.url, verify=NO_AUTHORITIES, trust_env=False)
        await running.enter_async_context(client)
        made.append(Backends(proxy, client))
        yield made[0]


async def test_what_a_client_says_of_himself_is_not_believed(tmp_path: Path) -> None:
    lies = {"X-Forwarded-For": "6.6.6.6", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "evil.example.com"}
    async with backends(tmp_path) as running:
        await running.client.get("/ok", headers={**lies, "X-Real-IP": "6.6.6.6", "Forwarded": "for=6.6.6.6"})
        headers = running.asked[0].headers
        assert (headers["x-forwarded-for"], headers["x-forwarded-proto"]) == (["127.0.0.1"], ["http"])
        assert headers.keys().isdisjoint({"x-real-ip", "forwarded", "x-forwarded-host"})


async def test_a_request_has_one_name_everywhere(tmp_path: Path) -> None:
    async with backends(tmp_path) as running:
        await running.client.get("/ok", headers={"X-Request-Id": "mine-1"})
        await running.client.get("/ok", headers={"X-Request-Id": "not harmless"})
        names = [asked.headers["x-request-id"][0] for asked in running.asked]
        assert names[0] == "mine-1"
        assert re.fullmatch("[0-9a-f]{32}", names[1])
        logged = [line["request_id"] for line in await running.logged("/ok", "/ok")]
    assert logged == names


async def test_a_post_that_was_sent_is_never_sent_again(tmp_path: Path) -> None:
    async with backends(tmp_path) as running:
        answer = await running.client.post("/drop", json={"text": "你好"})
        assert len(running.asked) == 1
    assert (answer.status_code, answer.json()["code"], answer.json()["error"]) == (503, 503, "NOT_READY")
    assert answer.json()["data"] is None
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"] == PROTECTIVE_HEADERS["Content-Security-Policy"]
    assert answer.headers["cache-control"] == "no-store"
    assert "Idempotency-Key" in answer.json()["message"]
    assert answer.headers["retry-after"] == "5"
    assert answer.headers["x-request-id"]


async def test_a_question_is_put_to_the_other_backend(tmp_path: Path) -> None:
    async with backends(tmp_path) as running:
        answer = await running.client.get("/drop-once")
        assert (answer.status_code, answer.text) == (200, "firstsecond")
        assert len(running.asked) == 2


async def test_nobody_notices_that_a_backend_is_down(tmp_path: Path) -> None:
    async with backends(tmp_path, both=False) as running:
        answers = [await running.client.post("/ok", json={"text": "你好"}) for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 6
        assert len(running.asked) == 6


async def test_metrics_are_not_for_everybody(tmp_path: Path) -> None:
    async with backends(tmp_path) as running:
        host, port = "127.0.0.1", running.proxy.port
        for path in ("/metrics", "/metrics?x", "/%6detrics", "//metrics", "/health/../metrics", "/./metrics"):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
            writer.close()
            assert head.startswith("HTTP/1.1 404"), path
            assert json.loads(body)["error"] == "NOT_FOUND"
        assert running.asked == []


async def test_the_log_of_nginx_tells_no_token(tmp_path: Path) -> None:
    async with backends(tmp_path) as running:
        for path in ("/ok", "/drop"):
            await running.client.post(f"{path}?token=abc.def.ghi", headers={"Authorization": "Bearer abc.def.ghi"})
        await running.logged("/ok", "/drop")
        assert "abc.def.ghi" not in running.proxy.log
        assert "server: nginx/" not in str((await running.client.get("/ok")).headers).lower()


async def test_nginx_takes_what_the_product_takes_and_not_much_more(tmp_path: Path) -> None:
    [megabytes] = re.findall(r"client_max_body_size (\d+)m;", NGINX)
    [most] = [meta.le for meta in Settings.model_fields["long_text_max_chars"].metadata if hasattr(meta, "le")]
    largest = max(
        recognition.MAX_BODY_BYTES, voices.MAX_BODY_BYTES, MAX_BODY_BYTES + LONGEST_CHARACTER_BYTES * int(most)
    )
    assert largest <= int(megabytes) * 1024 * 1024 < largest + 1024 * 1024
    async with backends(tmp_path) as running:
        taken = await running.client.post("/ok", content=bytes(largest))
        refused = await running.client.post("/ok", content=bytes(largest + 1024 * 1024))
        assert taken.status_code == 200
        assert (refused.status_code, refused.json()["error"]) == (413, "PAYLOAD_TOO_LARGE")
        assert len(running.asked) == 1


HEAD = "GET /ok HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("said", "status", "error"),
    [
        ("garbage\r\n\r\n", 400, "INVALID_REQUEST"),
        (f"{HEAD}Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "INVALID_REQUEST"),
        (f"{HEAD}Host: y\r\n\r\n", 400, "INVALID_REQUEST"),
        ("TRACE / HTTP/1.1\r\nHost: x\r\n\r\n", 400, "INVALID_REQUEST"),
        (f"{HEAD}X: {'x' * 20_000}\r\n\r\n", 431, "HEAD_TOO_LARGE"),
        (f"GET /{'x' * 20_000} HTTP/1.1\r\nHost: x\r\n\r\n", 431, "HEAD_TOO_LARGE"),
    ],
)
async def test_nginx_refuses_in_the_envelope(tmp_path: Path, said: str, status: int, error: str) -> None:
    async with backends(tmp_path) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.proxy.port)
        writer.write(said.encode())
        head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
        writer.close()
        assert head.startswith(f"HTTP/1.1 {status} ")
        assert "x-request-id: " in head.lower()
        assert json.loads(body)["error"] == error
        assert running.asked == []


async def test_one_address_has_so_many_requests_at_a_time(tmp_path: Path) -> None:
    async with backends(tmp_path, at_once=2) as running, AsyncExitStack() as open_streams:
        for _ in range(2):
            await open_streams.enter_async_context(running.client.stream("POST", "/stream"))
        refused = await running.client.post("/ok")
        assert (refused.status_code, refused.json()["error"]) == (429, "RATE_LIMITED")
        assert refused.json()["data"] is None
        assert int(refused.headers["retry-after"]) >= 1
        running.go_on.set()


async def test_a_stream_passes_as_it_comes(tmp_path: Path) -> None:
    async with backends(tmp_path) as running, running.client.stream("POST", "/stream") as answer:
        pieces = answer.aiter_raw()
        async with asyncio.timeout(5):
            assert await anext(pieces) == b"first"
        running.go_on.set()
        assert b"".join([piece async for piece in pieces]) == b"second"


async def test_a_websocket_passes_both_ways(tmp_path: Path) -> None:
    if not is_installed():
        skip_without("nginx")

    async def echo(socket: ServerConnection) -> None:
        async for message in socket:
            await socket.send(message)

    async with serve(echo, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        with run_proxy(tmp_path, [port, port]) as proxy:
            async with connect(proxy.url.replace("http", "ws"), proxy=None) as socket:
                for message in ("你好", b"\x00\x01"):
                    await socket.send(message)
                    assert await socket.recv() == message
