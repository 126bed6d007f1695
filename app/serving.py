"""How the server treats its connections: how much they may send and how long they may take, and how they end.

uvicorn by itself reads heads, chunks and WebSocket fragments of any length for any time. What is refused here was heard
by nobody else: it is answered in the envelope, where an answer is still possible, and the connection ends.
"""

import uuid
from asyncio import TimerHandle, Transport
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, cast

import orjson
import structlog
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame

from app.errors import AppError, HeadTooLarge, InvalidRequest, RequestTimeout

log = structlog.get_logger(__name__)

MAX_HEAD_BYTES = 64 * 1024
"""Of a request line with its headers, and of what comes between two pieces of a body."""
MAX_HEADERS = 128
MAX_PIPELINED = 16
HEAD_SECONDS = 20.0
# A body that brings less than this in that time is not waited for any longer.
BODY_SECONDS, BODY_BYTES = 60.0, 4 * 1024
# How long, and how much, the rest of a body is read on after the answer, for a client that looks for one only when it
# has sent all; one that brings less than BODY_BYTES in REST_SECONDS is not waited for.
REST_SECONDS, MAX_REST_SECONDS = 5.0, 60.0
MAX_REST_BYTES = 32 * 1024 * 1024
MAX_FRAGMENTS = 1024
MAX_PINGS_PER_SECOND = 50
# How long after it connected somebody may take to say what for, when the process is to end.
FIRST_REQUEST_SECONDS = 1.0
PROTECTIVE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    # Of pages elsewhere, those that CORS lets in read answers; it asks nothing of others to embed them. /media says
    # otherwise for itself.
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""What every answer tells browsers, unless it says something else itself."""
_TOO_MANY_WAIT = "同一连接上排队的请求过多或过大，请等待应答后再发送"


class _Stage(Enum):
    HEAD = auto()
    BODY = auto()
    WHOLE = auto()


class BoundedHttp(HttpToolsProtocol):
    """An HTTP connection of bounded memory and patience."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._stage = _Stage.HEAD
        self._head_bytes = self._body_bytes = self._other_bytes = 0
        self.served: RequestResponseCycle | None = None
        self._deadline: TimerHandle | None = None
        self._refusal: AppError | None = None
        self._has_heard = False
        self._rest_until = 0.0
        self._rest_bytes = 0

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Wait for a head."""
        super().connection_made(transport)
        self._wait(HEAD_SECONDS, self._end_late_head)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell it to the request that is worked on, also when others came behind it."""
        self._wait_no_more()
        super().connection_lost(exc)
        self.pipeline.clear()
        self._give_upserved()

    def data_received(self, data: bytes) -> None:
        """Take what came, within the limits."""
        self._has_heard = True
        self._other_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing() or self.transport.get_protocol() is not self:
            return
        if self._other_bytes > MAX_HEAD_BYTES:
            self._refuse(HeadTooLarge())
        elif self._stage is _Stage.WHOLE and not self._is_answering:
            self._stage = _Stage.HEAD
        if self._deadline is None and self._stage is not _Stage.WHOLE:
            if self._stage is _Stage.HEAD:
                self._wait(HEAD_SECONDS, self._end_late_head)
            else:
                self._wait_for_body()

    # What the parser finds

    def on_message_begin(self) -> None:
        """Begin to count."""
        super().on_message_begin()
        self._stage = _Stage.HEAD
        self._head_bytes = self._other_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Take a piece of the request line."""
        self._head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header. Trailers are left out: nobody asks for them, and they could pass for headers."""
        if self._stage is not _Stage.HEAD:
            return
        self._head_bytes += len(name) + len(value)
        super().on_header(name, value)
        if self._head_bytes > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._refuse_by_parser(HeadTooLarge())

    def on_headers_complete(self) -> None:
        """Have the request answered, unless it is of another HTTP, or too many are waiting."""
        if self.parser.get_http_version() not in {"1.0", "1.1"}:
            self._refuse_by_parser(InvalidRequest("只支持 HTTP/1.1"))
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refuse_by_parser(InvalidRequest(_TOO_MANY_WAIT))
        self._wait_no_more()
        self._stage = _Stage.BODY
        super().on_headers_complete()
        self.flow.resume_reading()  # who does not read does not see either that the client leaves

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._body_bytes += len(body)
        self._other_bytes = 0
        if self.cycle is not self.served and len(self.cycle.body) + len(body) > MAX_HEAD_BYTES:
            self._refuse_by_parser(InvalidRequest(_TOO_MANY_WAIT))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Wait for nothing more of this request."""
        self._wait_no_more()
        self._stage = _Stage.WHOLE
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self.served = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Wait for the next request, or a moment for the rest of this one."""
        super().on_response_complete()
        if self._stage is _Stage.BODY and not self.transport.is_closing():
            self._unset_keepalive_if_required()
            self._rest_until = self.loop.time() + MAX_REST_SECONDS
            self._rest_bytes = 0
            self._wait_for_rest()

    # Time

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        self._wait_no_more()
        self._deadline = self.loop.call_later(seconds, then)

    def _wait_no_more(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _end_late_head(self) -> None:
        if self._is_answering:
            self._wait(HEAD_SECONDS, self._end_late_head)
        elif self._has_heard:
            self._refuse(RequestTimeout())
        else:
            self.transport.close()  # nothing was asked

    def _wait_for_body(self) -> None:
        self._body_bytes = 0
        self._wait(BODY_SECONDS, self._end_late_body)

    def _end_late_body(self) -> None:
        cycle = cast("RequestResponseCycle | None", self.cycle)
        is_our_turn = self.flow.read_paused or (cycle is not None and cycle.waiting_for_100_continue)
        if is_our_turn or self._body_bytes >= BODY_BYTES:
            self._wait_for_body()
        else:
            self._refuse(RequestTimeout())

    def _wait_for_rest(self) -> None:
        self._body_bytes = 0
        self._wait(REST_SECONDS, self._end_late_rest)

    def _end_late_rest(self) -> None:
        self._rest_bytes += self._body_bytes
        goes_on = self._body_bytes >= BODY_BYTES and self._rest_bytes < MAX_REST_BYTES
        if goes_on and self.loop.time() < self._rest_until:
            self._wait_for_rest()
        else:
            self.transport.close()

    # Refusals

    @property
    def _is_answering(self) -> bool:
        return self.served is not None and not self.served.response_complete

    def _refuse_by_parser(self, refusal: AppError) -> None:
        """Have the parser stop where it is."""
        self._refusal = refusal
        raise refusal

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser stopped at."""
        self._refuse(self._refusal or InvalidRequest("不是合法的 HTTP 请求，请检查后重新发送"))

    def _refuse(self, refusal: AppError) -> None:
        """Answer, unless that would pass for the answer to another request or lie within one; then end."""
        served = self.served if self._is_answering else None
        if served is None or (served is self.cycle and self._stage is _Stage.BODY and not served.response_started):
            self.transport.write(_answer(refusal))
        log.info("connection_refused", status=refusal.status, error=refusal.code)
        self._wait_no_more()
        self._give_upserved()
        self.transport.close()

    def _give_upserved(self) -> None:
        if self.served is not None and not self.served.response_complete:
            self.served.disconnected = True
            self.served.message_event.set()


def _answer(refusal: AppError) -> bytes:
    told = {"code": refusal.status, "message": refusal.message, "data": None, "error": refusal.code}
    body = orjson.dumps(told)
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        "x-request-id": uuid.uuid4().hex,
        "cache-control": "no-store",
        **PROTECTIVE_HEADERS,
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return STATUS_LINE[refusal.status] + lines.encode() + b"\r\n" + body


class BoundedWebSocket(WebSocketsSansIOProtocol):
    """A WebSocket whose peer can neither hoard fragments, nor pongs that he does not read, nor our time with pings."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._pings = 0
        self._pings_since = 0.0
        self._is_ended = False

    def data_received(self, data: bytes) -> None:
        """Take what came; a handshake that makes no sense is refused."""
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.transport.is_closing():
            self.transport.write(_answer(InvalidRequest("不是合法的 WebSocket 握手请求，请检查请求头")))
            self.transport.close()

    def handle_parser_exception(self) -> None:
        """End a connection that broke the protocol; the application is told like of one that its client has left."""
        self._is_ended = True
        super().handle_parser_exception()

    async def send(self, message: ASGISendEvent) -> None:
        """Send what the application says. Raises ClientDisconnected after an end that it has not heard of yet."""
        if self._is_ended:
            raise ClientDisconnected
        await super().send(message)

    def send_receive_event_to_app(self) -> None:
        """Hand a message over; a text that is no UTF-8 ends the connection, and is nothing to be logged."""
        try:
            if self.curr_msg_data_type == "text" and not self.close_sent:
                b"".join(self.frames).decode()
        except UnicodeDecodeError:
            self.frames = []
            self._end(CloseCode.INVALID_DATA, "no UTF-8")
        else:
            super().send_receive_event_to_app()

    def handle_cont(self, event: Frame) -> None:
        """Take a fragment, if there are not too many already."""
        if len(self.frames) >= MAX_FRAGMENTS:
            self._end(CloseCode.MESSAGE_TOO_BIG, "too many fragments")
        else:
            super().handle_cont(event)

    def handle_ping(self) -> None:
        """Answer, unless earlier answers are not read, or there are too many."""
        now = self.loop.time()
        if now - self._pings_since > 1:
            self._pings, self._pings_since = 0, now
        self._pings += 1
        if self._pings > MAX_PINGS_PER_SECOND:
            self._end(CloseCode.POLICY_VIOLATION, "too many pings")
        elif self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()

    def _end(self, code: CloseCode, reason: str) -> None:
        if self.close_sent:
            return
        self.conn.fail(code, reason)
        self.handle_parser_exception()


class DrainedHttp(BoundedHttp):
    """A connection that is not closed on somebody who has just made it, and whose request is on its way.

    A proxy could not tell whether that request was heard, and would have to give it up.
    """

    def shutdown(self) -> None:
        """Come to an end, after the first request if there was none yet."""
        if self.served is None:
            self.loop.call_later(FIRST_REQUEST_SECONDS, super().shutdown)
        else:
            super().shutdown()


class DrainedWebSocket(BoundedWebSocket):
    """A WebSocket that the application closes itself when the process is to end: what is said completely is spoken.

    The server's own way is to break it off at once. It still does when the application takes longer than the server
    waits for requests.
    """

    def shutdown(self) -> None:
        """Refuse what is only about to be opened."""
        self.stop_keepalive()
        if not self.handshake_complete or self.close_sent:
            super().shutdown()


SERVER: dict[str, Any] = {
    "http": DrainedHttp,
    "ws": DrainedWebSocket,
    "ws_max_size": 4 * 1024 * 1024,  # more than ever may wait to be spoken, so that its sender is told
    "ws_per_message_deflate": False,  # audio does not shrink
    "ws_ping_timeout": None,  # who listens at playing speed answers late; silence is timed where it matters
}
"""Options of uvicorn."""
