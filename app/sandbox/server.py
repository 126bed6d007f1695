"""The sandbox as one ASGI application, and the way to serve it."""

from __future__ import annotations

import logging

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from app.sandbox.calls import CallLog
from app.sandbox.enrolled_voices import VoiceBook
from app.sandbox.envelope import refusal
from app.sandbox.faults import Faults
from app.sandbox.http_services import http_routes
from app.sandbox.object_service import ObjectService
from app.sandbox.observation import observation_routes
from app.sandbox.options import SandboxOptions
from app.sandbox.request_log import RequestLog
from app.sandbox.speech_service import SpeechService
from app.sandbox.spoken_audio import SpokenAudio
from app.sandbox.tasks import TaskBook
from app.sandbox.voice_control import voice_routes

_log = logging.getLogger("app.sandbox")

INFERENCE_PATH = "/api-ws/v1/inference"
LARGEST_CLIENT_FRAME = 1024 * 1024


def create_sandbox(options: SandboxOptions | None = None) -> Starlette:
    """A stand-in of CosyVoice over WebSocket (PROTOCOL.md §1), of voice enrollment, speech recognition, tasks and
    temporary uploads over HTTP (§3-§6) and of OSS, with a state of its own."""
    options = options or SandboxOptions()
    calls = CallLog(options.calls_kept)
    requests = RequestLog(options.calls_kept)
    faults = Faults()
    spoken = SpokenAudio()
    voices = VoiceBook(options)
    tasks = TaskBook()
    speech = SpeechService(options, calls, faults, spoken, voices)
    objects = ObjectService(options, faults)
    app = Starlette(
        routes=[
            WebSocketRoute(INFERENCE_PATH, speech),
            WebSocketRoute(f"{INFERENCE_PATH}/", speech),
            WebSocketRoute("/{path:path}", _unknown_socket),
            *observation_routes(calls, requests, tasks, faults),
            *voice_routes(voices),
            *http_routes(options, faults, requests, spoken, voices, tasks, objects.read),
            Route(INFERENCE_PATH, _not_a_websocket),
            *(Route(f"/{prefix}/{{rest:path}}", _unknown_path) for prefix in _RESERVED_PREFIXES),
            Route("/{path:path}", objects),
        ]
    )
    app.router.redirect_slashes = False
    return app


def serve(options: SandboxOptions | None = None, host: str = "127.0.0.1", port: int = 8100) -> None:
    """Serve until interrupted. Neither pings nor compression: the service's own timeouts watch its sockets (§1.7)."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("uvicorn.error").addFilter(_is_no_false_alarm)
    _log.info("sandbox on http://%s:%d", host, port)
    uvicorn.run(create_sandbox(options), host=host, port=port, **UVICORN_ARGUMENTS)  # type: ignore[arg-type]


UVICORN_ARGUMENTS: dict[str, object] = {
    "ws": "auto",
    "ws_ping_interval": None,
    "ws_per_message_deflate": False,
    "ws_max_size": LARGEST_CLIENT_FRAME,
    "access_log": False,
    "log_level": "warning",
    "timeout_graceful_shutdown": 2,
    "server_header": False,
}
"""What `serve` tells uvicorn, for whoever runs the server by other means."""

_RESERVED_PREFIXES = ("_sandbox", "api-ws", "api", "compatible-mode")


def _is_no_false_alarm(record: logging.LogRecord) -> bool:
    # uvicorn takes every handshake that was answered by an HTTP response for one that was forgotten.
    return record.getMessage() != "ASGI callable returned without completing handshake."


async def _not_a_websocket(_: Request) -> Response:
    return refusal(400, "InvalidParameter", "url error, please check url！")


async def _unknown_socket(websocket: WebSocket) -> None:
    await websocket.send_denial_response(_not_served())


async def _unknown_path(_: Request) -> Response:
    return _not_served()


def _not_served() -> Response:
    return refusal(404, "NotFound", "The sandbox does not serve this path.")
