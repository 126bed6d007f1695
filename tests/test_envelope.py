"""Every JSON answer is in the envelope, whatever happens."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from app.main import create_app
from app.settings import Settings
from tests.conftest import Account
from tests.servers import Server


@pytest.mark.parametrize(
    ("method", "path", "status", "error"),
    [
        ("GET", "/nowhere", 404, "NOT_FOUND"),
        ("GET", "/api/audio/history/", 404, "NOT_FOUND"),
        ("DELETE", "/api/auth/login", 405, "METHOD_NOT_ALLOWED"),
        ("GET", "/media/../../etc/passwd", 404, "NOT_FOUND"),
        ("GET", "/media/audio/tts/20250101/none.mp3", 404, "NOT_FOUND"),
        ("GET", "/api/user/me", 401, "UNAUTHORIZED"),
        ("POST", "/api/auth/login", 400, "INVALID_REQUEST"),
        ("POST", "/api/auth/token", 400, "INVALID_REQUEST"),
    ],
)
async def test_refusals_are_in_the_envelope(backend: Server, method: str, path: str, status: int, error: str) -> None:
    async with httpx.AsyncClient(base_url=backend.url) as client:
        answer = await client.request(method, path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert body.keys() == {"code", "message", "data", "error"}
    assert (body["code"], body["data"], body["error"]) == (status, None, error)
    assert any("一" <= character <= "龥" for character in body["message"])


async def test_a_body_too_large_is_refused_unread(backend: Server) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(backend.url).port)
    head = ["POST /api/auth/login HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 2000000000"]
    writer.write(("\r\n".join(head) + "\r\n\r\n").encode())
    answer = await asyncio.wait_for(reader.readuntil(b"}"), 5)
    writer.close()
    assert b"413" in answer.split(b"\r\n")[0]
    assert b'"error":"PAYLOAD_TOO_LARGE"' in answer


async def test_a_body_that_grows_too_large_is_cut_off(backend: Server) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 65536

    async with httpx.AsyncClient(base_url=backend.url) as client:
        headers = {"Content-Type": "application/json"}
        answer = await client.post("/api/auth/login", content=endless(), headers=headers)
    assert (answer.status_code, answer.json()["error"]) == (413, "PAYLOAD_TOO_LARGE")


async def test_the_callers_request_id_is_kept_when_it_is_harmless(backend: Server) -> None:
    async with httpx.AsyncClient(base_url=backend.url) as client:
        for given, kept in (("trace-1.a_B", True), ("x" * 65, False), ("a b", False), ('"', False)):
            answer = await client.get("/health/live", headers={"X-Request-Id": given})
            assert (answer.headers["x-request-id"] == given) is kept


async def test_an_unexpected_exception_is_answered_without_details(tmp_path: Path) -> None:
    app: FastAPI = create_app(Settings(_env_file=None, data_dir=tmp_path))

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("sk-test-secret")

    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/broken")
    assert answer.status_code == 500
    assert answer.headers["x-request-id"]
    assert answer.json() == {
        "code": 500,
        "message": "服务器内部错误，请稍后重试",
        "data": None,
        "error": "INTERNAL_ERROR",
    }


async def test_browsers_of_other_origins_may_read_what_they_need(account: Account) -> None:
    answer = await account.client.get("/api/user/me", headers={"Origin": "http://frontend.example"})
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "X-Record-Id" in answer.headers["access-control-expose-headers"]
    assert "access-control-allow-credentials" not in answer.headers


async def test_metrics_count_requests_by_route(account: Account) -> None:
    await account.client.get("/api/user/me")
    text = (await account.client.get("/metrics")).text
    assert 'http_requests_total{method="GET",route="/api/user/me",status="200"}' in text
