"""`python -m app demo`: sandbox and backend together, and a first sentence through the real routes."""

import asyncio
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from app.main import create_app
from app.serving import SERVER
from app.settings import Settings, read_or_create_secret

USERNAME = "demo"
SENTENCE = "你好，欢迎使用语音合成服务！Hello from your own voice backend."
START_SECONDS = 30.0


async def run_demo(host: str, port: int, sandbox_port: int) -> int:
    """Start both servers, speak, tell the user where to go on, and serve until Ctrl-C.

    Raises RuntimeError when a server does not come up or the first sentence fails.
    """
    data_dir = Path("data/demo")
    reachable = "localhost" if host in {"127.0.0.1", "0.0.0.0"} else f"[{host}]" if ":" in host else host  # noqa: S104
    url = f"http://{reachable}:{port}"
    settings = Settings(
        environment="development",
        data_dir=data_dir,
        database_url=f"sqlite+aiosqlite:///{data_dir / 'app.db'}",
        redis_url=None,
        storage="local",
        dashscope_ws_url=f"ws://127.0.0.1:{sandbox_port}/api-ws/v1/inference",
        dashscope_http_url=f"http://127.0.0.1:{sandbox_port}/api/v1",
        public_base_url=url,
        registration="open",
        log_level="WARNING",
    )
    async with _sandbox(sandbox_port), _backend(settings, host, port) as backend:
        await _speak_first_sentence(url, data_dir)
        await backend
    return 0


@asynccontextmanager
async def _sandbox(port: int) -> AsyncIterator[None]:
    """Run the sandbox in a process of its own, as the provider it stands for would be."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app", "sandbox", "--host", "127.0.0.1", "--port", str(port)
    )
    try:
        await _wait_for(f"http://127.0.0.1:{port}/_sandbox/health", lambda: process.returncode is not None)
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@asynccontextmanager
async def _backend(settings: Settings, host: str, port: int) -> AsyncIterator[asyncio.Task[None]]:
    config = uvicorn.Config(
        create_app(settings),
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        **SERVER,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    try:
        await _wait_for(f"{settings.public_base_url}/health/ready", serving.done)
        yield serving
    finally:
        server.should_exit = True
        await asyncio.wait([serving])


async def _wait_for(url: str, gave_up: Any) -> None:
    async with httpx.AsyncClient(trust_env=False) as client, asyncio.timeout(START_SECONDS):
        while True:
            if gave_up():
                raise RuntimeError(f"nothing came up at {url}: is the port taken?")
            try:
                if (await client.get(url)).is_success:
                    return
            except httpx.TransportError:
                await asyncio.sleep(0.1)


async def _speak_first_sentence(url: str, data_dir: Path) -> None:
    password = read_or_create_secret(data_dir / "demo_password", entropy_bytes=9)
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        login = {"username": USERNAME, "password": password}
        registered = await client.post("/api/auth/register", json=login)
        if registered.status_code not in {200, 409}:
            _data(registered)
        token = _data(await client.post("/api/auth/login", json=login))["access_token"]
        client.headers["Authorization"] = f"Bearer {token}"
        key = f"sk-test-{secrets.token_hex(8)}"
        _data(await client.put("/api/user/apikey", params={"verify": True}, json={"api_key": key}))
        request = {"model": "cosyvoice-v3-flash", "voice": "longanyang", "text": SENTENCE}
        speech = _data(await client.post("/api/audio/tts/synthesize", json=request))
        heard = _data(
            await client.post(
                "/api/audio/asr/recognize", json={"model": "qwen3-asr-flash", "audio_url": speech["audio_url"]}
            )
        )
    print(
        f"""
Spoke:     {SENTENCE}
Listen at: {speech["audio_url"]}  ({speech["duration"]} s)
It cost:   {speech["bill"]} CNY for {speech["characters"]} characters (sandbox: no real money)
Heard:     {heard["text"]}  ({heard["bill"]} CNY for {heard["duration"]} s)

Docs:      {url}/docs   (press Authorize)
Login:     {USERNAME} / {password}

Speak something yourself, in another shell:
TOKEN=$(curl -s {url}/api/auth/login -H 'Content-Type: application/json' \\
  -d '{{"username":"{USERNAME}","password":"{password}"}}' | sed 's/.*"access_token":"\\([^"]*\\)".*/\\1/')
curl -s {url}/api/audio/tts/synthesize -H "Authorization: Bearer $TOKEN" -H 'Content-Type: application/json' \\
  -d '{{"model":"cosyvoice-v3-flash","voice":"longanyang","text":"今天天气真好。","stream":true}}' -o hello.mp3

Press Ctrl-C to stop.
""",
        flush=True,
    )


def _data(answer: httpx.Response) -> dict[str, Any]:
    body: dict[str, Any] = answer.json()
    if not answer.is_success:
        raise RuntimeError(f"{answer.request.url.path} answered {body}")
    data: dict[str, Any] = body["data"]
    return data
