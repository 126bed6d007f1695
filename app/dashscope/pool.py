"""WebSocket connections to the provider, kept open between tasks (PROTOCOL §1.7)."""

import asyncio
import ssl
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import orjson
import structlog
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, InvalidStatus
from websockets.protocol import State

from app.dashscope.credential import Credential
from app.dashscope.failures import explain, heed, plain
from app.errors import AppError, ConnectionLost, HandshakeTimeout, InvalidApiKey, Unreachable
from app.timing import measure

log = structlog.get_logger(__name__)

# The provider closes after 60 s without a task (§1.7); ours go first, with room for a slow network.
IDLE_SECONDS = 40.0
MAX_IDLE_PER_CREDENTIAL = 16
CLOSE_SECONDS = 2.0
# Frames are about 8000 bytes (§1.6); reading pauses while this many wait.
QUEUED_FRAMES = 8
MAX_FRAME_BYTES = 4 * 1024 * 1024


@dataclass(eq=False, slots=True)
class Connection:
    """One open socket; `reused` says that it has carried a task before, `retired` that it may not carry another."""

    socket: ClientConnection
    credential: Credential
    reused: bool = False
    retired: bool = False
    expiry: asyncio.TimerHandle | None = None

    @property
    def is_open(self) -> bool:
        """Whether neither side has closed it, as far as is known here."""
        return self.socket.state is State.OPEN


class _Handshake(connect):
    """Never follows a redirect: the key would travel to a host that the operator did not name."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


class ConnectionPool:
    """Idle connections per credential, last used first."""

    def __init__(self, *, handshake_seconds: float, idle_seconds: float = IDLE_SECONDS) -> None:
        self._handshake_seconds = handshake_seconds
        self._idle_seconds = idle_seconds
        self._idle: defaultdict[Credential, list[Connection]] = defaultdict(list)
        self._busy: set[Connection] = set()
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> int:
        """How many connections carry a task."""
        return len(self._busy)

    @property
    def idle(self) -> int:
        """How many connections wait for one."""
        return sum(map(len, self._idle.values()))

    async def acquire(self, credential: Credential, *, fresh: bool = False) -> Connection:
        """Take an idle connection, or open one; `fresh` insists on a new one.

        Raises InvalidApiKey, Throttled, ConnectionLost or HandshakeTimeout; no work was accepted then.
        """
        while not fresh and (connection := self._take_idle(credential)):
            if connection.is_open:
                connection.reused = True
                self._busy.add(connection)
                return connection
            self.discard(connection)
        with measure("provider"):
            connection = Connection(await self._open(credential), credential)
        self._busy.add(connection)
        return connection

    def release(self, connection: Connection) -> None:
        """Give back a connection whose task has ended with `task-finished`."""
        if connection.retired or not connection.is_open:
            self.discard(connection)
            return
        self._busy.discard(connection)
        idle = self._idle[connection.credential]
        connection.expiry = asyncio.get_running_loop().call_later(self._idle_seconds, self._expire, connection)
        idle.append(connection)
        if len(idle) > MAX_IDLE_PER_CREDENTIAL:
            self._expire(idle[0])

    def discard(self, connection: Connection) -> None:
        """Close a connection that is not fit for another task, without waiting for it."""
        self._busy.discard(connection)
        task = asyncio.create_task(connection.socket.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def forget(self, api_key: str) -> None:
        """Close the connections of a key that was replaced or deleted: idle ones now, busy ones after their task."""
        for connection in self._busy:
            connection.retired = connection.retired or connection.credential.api_key == api_key
        for credential in [each for each in self._idle if each.api_key == api_key]:
            for connection in list(self._idle[credential]):
                self._expire(connection)

    async def close(self) -> None:
        """Close everything that is idle and wait for it; what is still busy closes after its task."""
        for connection in self._busy:
            connection.retired = True
        for connections in list(self._idle.values()):
            for connection in list(connections):
                self._expire(connection)
        while self._closing:
            await asyncio.wait(self._closing)

    def _take_idle(self, credential: Credential) -> Connection | None:
        idle = self._idle.get(credential)
        if not idle:
            return None
        connection = idle.pop()
        self._leave_idle(connection)
        return connection

    def _expire(self, connection: Connection) -> None:
        self._idle[connection.credential].remove(connection)
        self._leave_idle(connection)
        self.discard(connection)

    def _leave_idle(self, connection: Connection) -> None:
        if connection.expiry is not None:
            connection.expiry.cancel()
            connection.expiry = None
        if not self._idle[connection.credential]:
            del self._idle[connection.credential]

    async def _open(self, credential: Credential) -> ClientConnection:
        secure: dict[str, Any] = {"ssl": self._tls} if urlsplit(credential.ws_url).scheme == "wss" else {}
        try:
            return await _Handshake(
                credential.ws_url,
                additional_headers=credential.headers,
                user_agent_header="ai-voice-backend",
                compression=None,
                proxy=None,
                open_timeout=self._handshake_seconds,
                close_timeout=CLOSE_SECONDS,
                ping_interval=None,  # a paused reader sees no pong; silence is timed where it matters
                max_size=MAX_FRAME_BYTES,
                max_queue=QUEUED_FRAMES,
                **secure,
            )
        except TimeoutError as error:
            raise HandshakeTimeout from error
        except InvalidStatus as error:
            told = ", ".join(error.response.headers.get_all("Retry-After"))
            failure = heed(_explain_refusal(error), error.response.status_code, told)
            raise failure from None  # its traceback would show the request headers
        except (OSError, InvalidHandshake) as error:
            raise Unreachable from error

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()


def _explain_refusal(refusal: InvalidStatus) -> AppError:
    """An HTTP answer instead of a WebSocket: 401 and 403 are about the key (§1.1), unless the body says otherwise."""
    status = refusal.response.status_code
    try:
        body = orjson.loads(refusal.response.body or b"{}")
    except orjson.JSONDecodeError:
        body = {}
    code = body.get("code") if isinstance(body, dict) else None
    message = body.get("message") if isinstance(body, dict) else None
    log.warning("provider_handshake_refused", status=status, provider_code=plain(str(code or "")))
    if status == 429:
        return explain(str(code or "Throttling"), str(message or ""))
    if status >= 500:
        return ConnectionLost(f"百炼平台暂时不可用（HTTP {status}），请稍后重试")
    if status == 401 or (status == 403 and not code):
        return InvalidApiKey()
    return explain(str(code or f"HTTP {status}"), str(message or ""))
