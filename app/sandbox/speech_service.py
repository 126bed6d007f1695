"""The CosyVoice WebSocket endpoint: the handshake, then one `SpeechSocket` per connection (PROTOCOL.md §1.1)."""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from app.sandbox.api_key import accepted_key
from app.sandbox.calls import CallLog
from app.sandbox.enrolled_voices import VoiceBook
from app.sandbox.envelope import ServiceError, refusal
from app.sandbox.faults import Faults
from app.sandbox.options import SandboxOptions
from app.sandbox.run_task_quota import RunTaskQuota
from app.sandbox.speech_socket import Caller, SpeechSocket
from app.sandbox.spoken_audio import SpokenAudio


class SpeechService:
    """An ASGI application for `/api-ws/v1/inference`."""

    def __init__(
        self, options: SandboxOptions, calls: CallLog, faults: Faults, spoken: SpokenAudio, voices: VoiceBook
    ) -> None:
        self._faults = faults
        self._spoken = spoken
        self._voices = voices
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
        socket = SpeechSocket(
            websocket, caller, self._options, self._calls, self._quota, self._faults, self._spoken, self._voices
        )
        await socket.converse()

    def _admit(self, websocket: WebSocket) -> tuple[str, JSONResponse | None]:
        """The API key, or the HTTP answer that refuses the handshake (§0.2, §1.1)."""
        if self._faults.take("refuse_handshakes"):
            return "", self._refusal()
        try:
            return accepted_key(websocket.headers), None
        except ServiceError as error:
            return "", refusal(error.status, error.code, error.message)

    def _refusal(self) -> JSONResponse:
        answer = refusal(self._faults.refuse_status, "InternalError", "The handshake was refused by a fault.")
        if self._faults.refuse_retry_after is not None:
            answer.headers["retry-after"] = str(self._faults.refuse_retry_after)
        return answer
