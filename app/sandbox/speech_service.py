"""The CosyVoice WebSocket endpoint: the handshake, then one `SpeechSocket` per connection (PROTOCOL.md §1.1)."""

from __future__ import annotations

import uuid
from typing import Final

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from app.sandbox.calls import CallLog
from app.sandbox.faults import Faults
from app.sandbox.options import SandboxOptions
from app.sandbox.run_task_quota import RunTaskQuota
from app.sandbox.speech_socket import Caller, SpeechSocket

REFUSED_KEY_PREFIX: Final = "sk-bad"
"""Keys that begin so are refused like a revoked key (§15)."""


def refusal(status: int, code: str, message: str) -> JSONResponse:
    """The error envelope of DashScope (§0.3), with its `x-request-id` (§15)."""
    request_id = str(uuid.uuid4())
    body = {"code": code, "message": message, "request_id": request_id}
    return JSONResponse(body, status, {"x-request-id": request_id})


class SpeechService:
    """An ASGI application for `/api-ws/v1/inference`."""

    def __init__(self, options: SandboxOptions, calls: CallLog, faults: Faults) -> None:
        self._faults = faults
        self._options = options
        self._calls = calls
        self._quota = RunTaskQuota(options.rate_limit_per_second)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        websocket = WebSocket(scope, receive, send)
        api_key, answer = self._admit(websocket)
        if answer is not None:
            await websocket.send_denial_response(answer)
            return
        await websocket.accept()
        caller = Caller(self._calls.open_connection(), api_key)
        socket = SpeechSocket(websocket, caller, self._options, self._calls, self._quota, self._faults)
        await socket.converse()

    def _admit(self, websocket: WebSocket) -> tuple[str, JSONResponse | None]:
        """The API key, or the HTTP answer that refuses the handshake (§0.2, §1.1)."""
        if self._faults.take("refuse_handshakes"):
            return "", refusal(self._faults.refuse_status, "InternalError", "The handshake was refused by a fault.")
        scheme, _, api_key = websocket.headers.get("authorization", "").strip().partition(" ")
        api_key = api_key.strip()
        if scheme.lower() != "bearer" or not api_key:
            return "", refusal(401, "InvalidApiKey", "No API-key provided.")
        if api_key.startswith(REFUSED_KEY_PREFIX):
            return "", refusal(401, "InvalidApiKey", "Invalid API-key provided.")
        return api_key, None
