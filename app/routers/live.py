"""Live text to speech: spec 1.4, a WebSocket."""

import asyncio
import re
from dataclasses import dataclass, field
from typing import Any

import orjson
import structlog
from fastapi import APIRouter, WebSocket
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from starlette.websockets import WebSocketDisconnect, WebSocketDisconnected

from app.audio import AudioFormat
from app.completion import end_by_cancelling
from app.database import UNAVAILABLE
from app.errors import AppError, InvalidRequest, NotReady, Restarting, Unauthorized
from app.routers.failures import describe_problems
from app.routers.fields import Text
from app.routers.presentation import show_amount
from app.routers.speech import SpeechFields
from app.services import Services
from app.services.calls import as_told
from app.services.live import LiveSession, Spoken
from app.services.logins import LoginService, Visitor

log = structlog.get_logger(__name__)

CLIENT_FAULT, SERVER_FAULT, RESTART = 1008, 1011, 1012
# A client that takes no message for this long is treated like one that hung up.
STALLED_CLIENT_SECONDS = 60.0
LOGIN_CHECK_SECONDS = 10.0
_TOKEN = re.compile(r"(?:bearer\.)?([\w-]+\.[\w-]+\.[\w-]+)", re.ASCII | re.IGNORECASE)
_GONE = (WebSocketDisconnect, WebSocketDisconnected)

router = APIRouter()


class LiveParameters(SpeechFields):
    """How a session sounds: the query of its URL, where numbers are text."""

    model_config = ConfigDict(strict=False, allow_inf_nan=False)

    format: AudioFormat = "pcm"

    @field_validator("sample_rate", mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value


class SayMessage(BaseModel):
    """Some text to be spoken."""

    model_config = ConfigDict(strict=True)

    content: Text


@router.websocket("/api/audio/tts/stream")
async def stream_speech(websocket: WebSocket) -> None:
    """Speak what a client writes while he writes it."""
    presented = _read_token(websocket)
    try:
        await websocket.accept(presented.subprotocol)
        try:
            visitor = await _identify(websocket, presented)
            session = await _open(websocket, visitor)
            await _converse(websocket, session, visitor)
            if websocket.app.state.services.in_flight.hurried:
                await websocket.close(RESTART)
        except AppError as error:
            await _refuse(websocket, error)
        except _GONE:
            raise
        except Exception as error:
            told = as_told(error)
            if isinstance(told, NotReady):
                log.warning("live_session_met_outage", error=type(error).__name__)
            else:
                log.exception("live_session_broke")
            await _refuse(websocket, told)
    except (*_GONE, TimeoutError):
        log.info("live_client_gone")


@dataclass(frozen=True, slots=True)
class Presented:
    """What a client shows to be let in, where, and the subprotocol that he is answered with."""

    token: str | None = field(repr=False)
    subprotocol: str | None = field(repr=False)
    is_in_url: bool = False


def _read_token(websocket: WebSocket) -> Presented:
    """Find the token, and the subprotocol to answer with: browsers can send neither headers nor leave one unanswered.

    The token is never the answer where the client offers anything else.
    """
    offered: list[str] = websocket.scope.get("subprotocols", [])
    among = next((each for each in offered if _TOKEN.fullmatch(each)), None)
    answer = next((each for each in offered if each != among), among)
    scheme, _, header = websocket.headers.get("authorization", "").partition(" ")
    if scheme.casefold() == "bearer" and header.strip():
        return Presented(header.strip(), answer)
    if token := websocket.query_params.get("token"):
        return Presented(token, answer, is_in_url=True)
    matched = _TOKEN.fullmatch(among or "")
    return Presented(matched and matched[1], answer)


async def _identify(websocket: WebSocket, presented: Presented) -> Visitor:
    services: Services = websocket.app.state.services
    if not presented.token:
        raise Unauthorized
    if presented.is_in_url:
        return await services.logins.authenticate_by_url(presented.token)
    return await services.logins.authenticate(presented.token)


async def _open(websocket: WebSocket, visitor: Visitor) -> LiveSession:
    services: Services = websocket.app.state.services
    await services.limiter.check(services.settings.rate_limit, "user", str(visitor.user.id))
    try:
        asked = LiveParameters.model_validate(dict(websocket.query_params))
    except ValidationError as error:
        raise InvalidRequest(describe_problems(error.errors())) from None
    return await services.live.open(visitor.user.id, asked.parameters)


async def _converse(websocket: WebSocket, session: LiveSession, visitor: Visitor) -> None:
    """Pass on what both sides say until one of them ends. Raises what ended the session, unless the client left."""
    tasks = [
        asyncio.create_task(session.run()),
        asyncio.create_task(_read(websocket, session)),
        asyncio.create_task(_watch_login(websocket.app.state.services.logins, session, visitor)),
    ]
    try:
        async for heard in session.heard():
            async with asyncio.timeout(STALLED_CLIENT_SECONDS):
                if isinstance(heard, bytes):
                    await websocket.send_bytes(heard)
                else:
                    await websocket.send_text(_report(heard))
    except TimeoutError:
        log.warning("live_client_stalled")
    finally:
        session.close()
        for task in reversed(tasks):
            await end_by_cancelling(task)


async def _read(websocket: WebSocket, session: LiveSession) -> None:
    """Take what the client says, until he leaves or says what makes no sense."""
    try:
        while (frame := await websocket.receive())["type"] != "websocket.disconnect":
            _obey(frame, session)
        session.leave()
    except AppError as error:
        session.leave(error)


async def _watch_login(logins: LoginService, session: LiveSession, visitor: Visitor) -> None:
    """End a session soon after its user was logged out or shut out; he may have been talking for hours."""
    while True:
        await asyncio.sleep(LOGIN_CHECK_SECONDS)
        try:
            is_in = await logins.is_in(visitor)
        except UNAVAILABLE as error:
            log.warning("login_not_checked", error=type(error).__name__)
            continue
        if not is_in:
            session.leave(Unauthorized())
            return


def _obey(frame: Any, session: LiveSession) -> None:
    text = frame.get("text")
    if text is None:
        raise InvalidRequest("只接受文本消息（JSON）")
    try:
        message = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise InvalidRequest("消息不是合法的 JSON") from None
    match message.get("type") if isinstance(message, dict) else None:
        case "text":
            try:
                session.say(SayMessage.model_validate(message).content)
            except ValidationError as error:
                raise InvalidRequest(describe_problems(error.errors())) from None
        case "end":
            session.end()
        case "flush":
            session.flush()
        case "cancel":
            session.cancel()
        case _:
            raise InvalidRequest("消息的 type 必须是以下之一：text、end、flush、cancel")


def _report(spoken: Spoken) -> str:
    report: dict[str, Any] = {
        "type": spoken.ending,
        "characters": spoken.characters,
        "duration": spoken.duration_ms / 1000,
        "bill": show_amount(spoken.amount),
    }
    if spoken.record_id is not None:
        report["record_id"] = spoken.record_id
    if spoken.audio_url is not None:
        report["audio_url"] = spoken.audio_url
    return orjson.dumps(report).decode()


async def _refuse(websocket: WebSocket, error: AppError) -> None:
    """Tell what went wrong, then whose fault it was by the code that the socket is closed with."""
    told = {"type": "error", "code": error.status, "error": error.code, "message": error.message}
    async with asyncio.timeout(STALLED_CLIENT_SECONDS):
        await websocket.send_text(orjson.dumps(told).decode())
        await websocket.close(_close_code(error), error.code)


def _close_code(error: AppError) -> int:
    if isinstance(error, Restarting):
        return RESTART
    return SERVER_FAULT if error.status >= 500 else CLIENT_FAULT
