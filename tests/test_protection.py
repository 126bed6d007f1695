"""What answers tell browsers not to do, which hosts are answered for, and which origins may read answers."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin

from app.main import create_app, create_worker
from app.settings import Settings
from tests.conftest import Account
from tests.servers import NO_AUTHORITIES, Sandbox, Server, run_backend
from tests.talking import token_of

NO_PAGE = "default-src 'none'; frame-ancestors 'none'"
ALWAYS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "content-security-policy": NO_PAGE,
    "cross-origin-resource-policy": "same-origin",
}
LISTED = "https://good.example"
RANDOM = "Zq3vN8rT1kXw6LpY0sHd4JmB7cFgUe2AoViR9tKbQxS"
PRODUCTION: dict[str, Any] = {
    "environment": "production",
    "jwt_secret": RANDOM,
    "credential_keys": RANDOM,
    "public_base_url": "https://voice.example.com",
}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, sandbox: Sandbox) -> Iterator[Server]:
    """A server that goes by some names only, and lets two frontends read its answers."""
    settings = {
        **sandbox.settings,
        "ALLOWED_HOSTS": "127.0.0.1, voice.example.com,*.example.org,[2001:DB8:0::1]",
        "CORS_ORIGINS": f"{LISTED}/, http://localhost:3000",
        "PUBLIC_BASE_URL": "https://voice.example.com",
    }
    with run_backend(tmp_path_factory.mktemp("guarded"), settings) as running:
        yield running


@pytest.fixture
async def client(guarded: Server) -> AsyncIterator[httpx.AsyncClient]:
    """Somebody without a login."""
    async with httpx.AsyncClient(base_url=guarded.url, trust_env=False, verify=NO_AUTHORITIES) as client:
        yield client


# ---- Headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health/live", 200),
        ("GET", "/metrics", 200),
        ("GET", "/openapi.json", 200),
        ("GET", "/static-offline-docs/swagger-ui.css", 200),
        ("GET", "/api/user/me", 401),
        ("DELETE", "/api/auth/login", 405),
        ("GET", "/nowhere", 404),
        ("GET", "/media/audio/tts/20250101/none.mp3", 404),
        ("POST", "/api/auth/login", 400),
    ],
)
async def test_every_answer_is_protected(client: httpx.AsyncClient, method: str, path: str, status: int) -> None:
    answer = await client.request(method, path, headers={"Origin": LISTED})
    assert answer.status_code == status
    assert {name: answer.headers.get_list(name) for name in ALWAYS} == {name: [ALWAYS[name]] for name in ALWAYS}
    assert answer.headers["strict-transport-security"] == "max-age=31536000"
    assert (answer.headers.get("cache-control") == "no-store") is (status >= 400)
    assert answer.headers["access-control-allow-origin"] == LISTED
    assert answer.headers["x-request-id"]
    assert answer.headers["server-timing"]


async def test_what_layers_around_the_routes_answer_is_protected_too(client: httpx.AsyncClient) -> None:
    too_large = await client.post("/api/auth/login", content=b" " * 2_000_000)
    wrong_form = await client.post("/api/auth/token", headers={"Content-Type": "text/plain; charset=utf-7"})
    foreign = await client.get("/api/user/me", headers={"Host": "evil.example"})
    refused = await client.options(
        "/api/user/me", headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "GET"}
    )
    for answer, status in ((too_large, 413), (wrong_form, 400), (foreign, 400), (refused, 400)):
        assert answer.status_code == status
        assert ALWAYS.items() <= dict(answer.headers).items()
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-request-id"]


async def test_what_a_route_says_itself_wins_and_failures_are_protected(tmp_path: Path) -> None:
    app: FastAPI = create_app(Settings(_env_file=None, data_dir=tmp_path))
    own = {"Cache-Control": "max-age=5", "Content-Security-Policy": "sandbox", "X-Frame-Options": "SAMEORIGIN"}

    @app.get("/api/broken")
    async def broken() -> None:
        raise RuntimeError

    @app.get("/api/own")
    async def says_it_itself() -> PlainTextResponse:
        return PlainTextResponse("", headers=own)

    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        failed, said = await client.get("/api/broken"), await client.get("/api/own")
    assert failed.status_code == 500
    assert ({**ALWAYS, "cache-control": "no-store"}).items() <= dict(failed.headers).items()
    assert {name: said.headers.get_list(name) for name in own} == {name: [value] for name, value in own.items()}
    assert said.headers["x-content-type-options"] == "nosniff"
    assert "strict-transport-security" not in said.headers


async def test_a_worker_answers_with_the_same_protection(tmp_path: Path) -> None:
    app = create_worker(Settings(_env_file=None, data_dir=tmp_path, public_base_url="HTTPS://voice.example.com"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://10.0.0.7:8001") as client:
        answers = [await client.get(path) for path in ("/health/live", "/nowhere")]
    assert [answer.status_code for answer in answers] == [200, 404]
    for answer in answers:
        assert ALWAYS.items() <= dict(answer.headers).items()
        assert answer.headers["strict-transport-security"]


async def test_answers_of_the_api_are_for_nobody_to_store(account: Account) -> None:
    for path in ("/api/user/me", "/api/audio/history", "/api/user/apikey"):
        assert (await account.client.get(path)).headers["cache-control"] == "no-store"


# ---- Media


@pytest.fixture
async def spoken(account: Account) -> str:
    """The path of some speech."""
    said = await account.synthesize("你好。")
    return httpx.URL(said.json()["data"]["audio_url"]).path


async def test_audio_is_for_every_page_to_play_and_none_to_run(account: Account, spoken: str) -> None:
    answer = await account.client.get(spoken, headers={"Origin": "https://anybody.example", "Range": "bytes=0-9"})
    policy = answer.headers["content-security-policy"].split("; ")
    assert (answer.status_code, answer.headers["content-type"]) == (206, "audio/mpeg")
    assert {"sandbox", "default-src 'none'"} <= set(policy)
    assert not [rule for rule in policy if "script" in rule]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "content-disposition" not in answer.headers


async def test_what_is_no_audio_is_saved_and_not_shown(backend: Server, account: Account) -> None:
    for name in ("page.html", "image.svg", "bare"):
        file = backend.data / "media" / "audio" / "tts" / "20250101" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("<script>alert(1)</script>")
        answer = await account.client.get(f"/media/audio/tts/20250101/{name}")
        file.unlink()
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["content-disposition"] == f'attachment; filename="{name}"'


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("range_header", "status", "error"),
    [
        ("bytes=5-2", 400, "INVALID_REQUEST"),
        ("bytes", 400, "INVALID_REQUEST"),
        ("bytes=x-y", 400, "INVALID_REQUEST"),
        ("seconds=0-1", 400, "INVALID_REQUEST"),
        ("bytes=999999999-", 416, "RANGE_NOT_SATISFIABLE"),
    ],
)
async def test_a_range_that_makes_no_sense_is_refused_in_the_envelope(
    account: Account, spoken: str, method: str, range_header: str, status: int, error: str
) -> None:
    answer = await account.client.request(method, spoken, headers={"Range": range_header})
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    assert method == "HEAD" or (answer.json()["code"], answer.json()["error"]) == (status, error)
    assert answer.headers["cache-control"] == "no-store"
    assert ("content-range" in answer.headers) is (status == 416)
    assert "etag" not in answer.headers


# ---- Hosts


async def ask(server: Server, *hosts: str, target: str = "/api/user/me") -> tuple[int, bytes]:
    """Ask in the server's own words; gives status and body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(server.url).port)
    lines = [f"GET {target} HTTP/1.1", *(f"Host: {host}" for host in hosts), "Connection: close", "", ""]
    writer.write("\r\n".join(lines).encode("latin-1"))
    head, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    return int(head.split()[1]), body


OURS = [
    "127.0.0.1",
    "127.0.0.1:8000",
    "voice.example.com",
    "VOICE.Example.COM:443",
    "voice.example.com.",
    "voice.example.com.:80",
    "voice.example.com:",
    "a.example.org",
    "a.b.example.org:1",
    "[2001:db8::1]",
    "[2001:0DB8:0:0::1]:8000",
]
STRANGERS = [
    "",
    "evil.example",
    "example.com",
    "example.org",
    "evilexample.org",
    "voice.example.com.evil.example",
    "evil.voice.example.com",
    "voice.example.com..",
    "voice.example.com@evil.example",
    "voice.example.com/",
    "voice.example.com, evil.example",
    "voice.example.com evil.example",
    "voice.example.com:80:80",
    "voice.example.com:http",
    "2001:db8::1",
    "[2001:db8::2]",
    "[2001:db8::1",
    "[voice.example.com]",
    "localhost",
    "127.1",
    "\xaa.example.org",
    "*.example.org",
    "." + "a." * 2000 + "example.org",
]


@pytest.mark.parametrize("host", OURS)
async def test_requests_for_our_hosts_are_answered(guarded: Server, host: str) -> None:
    status, _ = await ask(guarded, host)
    assert status == 401


@pytest.mark.parametrize("host", STRANGERS)
async def test_requests_for_other_hosts_are_refused(guarded: Server, host: str) -> None:
    status, body = await ask(guarded, host)
    told = json.loads(body)
    assert (status, told["code"], told["error"], told["data"]) == (400, 400, "INVALID_REQUEST", None)
    assert "主机名" in told["message"]


async def test_a_request_names_one_host(guarded: Server) -> None:
    assert (await ask(guarded))[0] == 400
    assert (await ask(guarded, "voice.example.com", "voice.example.com"))[0] == 400
    assert (await ask(guarded, "voice.example.com", "evil.example"))[0] == 400


async def test_the_host_decides_whatever_the_target_says(guarded: Server) -> None:
    for target_host in ("voice.example.com", "evil.example"):
        target = f"http://{target_host}/api/user/me"
        assert (await ask(guarded, "voice.example.com", target=target))[0] == 401
        assert (await ask(guarded, "evil.example", target=target))[0] == 400


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/metrics"])
async def test_monitors_may_ask_by_any_name(guarded: Server, path: str) -> None:
    assert (await ask(guarded, "10.0.0.7:8000", target=path))[0] == 200
    assert (await ask(guarded, target=path))[0] == 200


async def test_a_live_session_is_opened_on_our_hosts_only(guarded: Server) -> None:
    url = guarded.url.replace("http", "ws") + "/api/audio/tts/stream"
    port = httpx.URL(guarded.url).port
    with pytest.raises(InvalidStatus) as refused:
        await connect(url.replace("127.0.0.1", "evil.example"), host="127.0.0.1", port=port, proxy=None)
    answer = refused.value.response
    assert answer.status_code == 400
    assert json.loads(answer.body)["error"] == "INVALID_REQUEST"
    assert answer.headers["content-security-policy"] == NO_PAGE
    assert answer.headers["x-request-id"]
    async with connect(
        url.replace("127.0.0.1", "voice.example.com"), host="127.0.0.1", port=port, proxy=None
    ) as socket:
        assert json.loads(await socket.recv())["error"] == "UNAUTHORIZED"


@pytest.mark.parametrize(
    ("given", "hosts"),
    [
        ({}, ["*"]),
        (PRODUCTION, ["voice.example.com", "localhost", "127.0.0.1", "::1"]),
        (
            {**PRODUCTION, "public_base_url": "https://[2001:DB8::1]:8443"},
            ["2001:db8::1", "localhost", "127.0.0.1", "::1"],
        ),
        ({**PRODUCTION, "public_base_url": "http://localhost:8000"}, ["*"]),
        (
            {**PRODUCTION, "public_base_url": "http://bücher.example"},
            ["xn--bcher-kva.example", "localhost", "127.0.0.1", "::1"],
        ),
        ({**PRODUCTION, "allowed_hosts": "*"}, ["*"]),
        (
            {**PRODUCTION, "allowed_hosts": " A.example., *.B.example ,[::1], ::2"},
            ["a.example", "*.b.example", "::1", "::2"],
        ),
    ],
)
def test_hosts_that_are_trusted(given: dict[str, Any], hosts: list[str]) -> None:
    assert Settings(_env_file=None, **given).trusted_hosts == hosts


@pytest.mark.parametrize(
    "hosts",
    ["https://a.example", "a.example:8000", "a.example/", "*.", "**", "a.*.example", "*example.com", "a b", "[::g]"],
)
def test_a_list_of_hosts_that_makes_no_sense_starts_no_server(hosts: str) -> None:
    with pytest.raises(ValueError, match="is not the name or address of a host"):
        Settings(_env_file=None, allowed_hosts=f"good.example,{hosts}")


# ---- Origins


@pytest.mark.parametrize(
    ("origin", "is_listed"),
    [
        (LISTED, True),
        ("http://localhost:3000", True),
        ("null", False),
        ("http://good.example", False),
        ("https://good.example:444", False),
        ("https://good.example.evil.com", False),
        ("https://evil.good.example", False),
        ("https://evilgood.example", False),
        ("https://good.example@evil.com", False),
        ("https://good.example/", False),
        ("https://GOOD.example", False),  # no browser writes it so
        ("http://localhost", False),
        ("http://localhost:30000", False),
        ("*", False),
        ("", False),
    ],
)
async def test_pages_of_listed_origins_may_read_answers(
    client: httpx.AsyncClient, origin: str, is_listed: bool
) -> None:
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "PUT",
        "Access-Control-Request-Headers": "authorization",
    }
    preflight = await client.options("/api/user/apikey", headers=asked)
    answer = await client.get("/api/user/apikey", headers={"Origin": origin})
    media = await client.get("/media/none.mp3", headers={"Origin": origin})
    assert (preflight.status_code, answer.status_code, media.status_code) == (200 if is_listed else 400, 401, 404)
    for each in (preflight, answer, media):
        assert each.headers.get("access-control-allow-origin") == (origin if is_listed else None)
        assert "access-control-allow-credentials" not in each.headers
        assert "Origin" in each.headers["vary"]


async def test_any_page_may_read_answers_where_all_origins_are_let_in_but_never_with_credentials(
    account: Account,
) -> None:
    for origin in ("https://anybody.example", "null"):
        answer = await account.client.get("/api/user/me", headers={"Origin": origin, "Cookie": "a=b"})
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in answer.headers


async def test_a_live_session_asks_for_a_token_and_not_for_an_origin(account: Account, backend: Server) -> None:
    """A page elsewhere has nothing to ride on: a login is no cookie, so no browser adds one by itself."""
    url = backend.url.replace("http", "ws") + "/api/audio/tts/stream"
    async with connect(
        url, origin=Origin("https://evil.example"), proxy=None, additional_headers={"Cookie": "token=x"}
    ) as socket:
        assert json.loads(await socket.recv())["error"] == "UNAUTHORIZED"
    async with connect(
        f"{url}?token={token_of(account)}&model=cosyvoice-v3-flash&voice=longanyang", origin=Origin("null"), proxy=None
    ) as socket:
        await socket.send(json.dumps({"type": "text", "content": "你好。"}))
        await socket.send(json.dumps({"type": "end"}))
        assert isinstance(await socket.recv(), bytes)


@pytest.mark.parametrize(
    ("given", "origins"),
    [
        ("*", ["*"]),
        (
            "https://A.example:443/, http://b.example:80,http://[::0:1]:3000",
            ["https://a.example", "http://b.example", "http://[::1]:3000"],
        ),
        (" , ", []),
    ],
)
def test_origins_are_kept_as_browsers_send_them(given: str, origins: list[str]) -> None:
    assert Settings(_env_file=None, cors_origins=given).allowed_origins == origins


@pytest.mark.parametrize(
    "given",
    [
        "null", "good.example", "//good.example", "ftp://good.example", "https://", "https://*.good.example",
        "https://good.example/app", "https://good.example?", "https://good.example#", "https://user@good.example",
        "https://good.example:", "https://good.example:99999", "https://good.example:x", "https://good .example",
        "https://good.example\\.evil.com", "https://a.example;https://b.example",
    ],
)  # fmt: skip
def test_a_list_of_origins_that_makes_no_sense_starts_no_server(given: str) -> None:
    with pytest.raises(ValueError, match="is not an origin such as"):
        Settings(_env_file=None, cors_origins=given)


def test_everybody_is_let_in_alone() -> None:
    with pytest.raises(ValueError, match="CORS_ORIGINS"):
        Settings(_env_file=None, cors_origins="*,https://good.example")
