"""What every answer tells browsers not to do with it, and which hosts are answered for."""

from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import InvalidRequest
from app.hosts import EVERY, asked_host, is_among
from app.routers.failures import error_response
from app.serving import PROTECTIVE_HEADERS

ONE_YEAR_SECONDS = 365 * 24 * 3600
# Monitors ask these by the address of one process, whatever name the public knows the service by.
FOR_ANY_HOST = frozenset({"/health/live", "/health/ready", "/metrics"})

_STARTS = {"http.response.start", "websocket.http.response.start"}
_NO_STORE = (b"cache-control", b"no-store")

Pairs = tuple[tuple[bytes, bytes], ...]


class ProtectiveHeaders:
    """Adds what an answer does not say itself. Answers of the API, and all errors, are for nobody to store.

    `is_https` says that clients reach this service over TLS, and are to insist on it for a year.
    """

    def __init__(self, app: ASGIApp, is_https: bool) -> None:
        self._app = app
        headers = PROTECTIVE_HEADERS | (
            {"Strict-Transport-Security": f"max-age={ONE_YEAR_SECONDS}"} if is_https else {}
        )
        self._always: Pairs = tuple((name.lower().encode(), value.encode()) for name, value in headers.items())
        self._unstored: Pairs = (*self._always, _NO_STORE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        is_api = scope["path"].startswith("/api/")

        async def send_protected(message: Message) -> None:
            if message["type"] in _STARTS:
                said = message.get("headers", [])
                names = {name for name, _ in said}
                wanted = self._unstored if is_api or message["status"] >= 400 else self._always
                message["headers"] = [*said, *(pair for pair in wanted if pair[0] not in names)]
            await send(message)

        await self._app(scope, receive, send_protected)


class TrustedHosts:
    """Refuses requests for hosts that this service does not go by, and those that name none or several.

    What stands in an absolute request target is not looked at: nothing of the product reads it, either.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = hosts
        self._trusts_all = EVERY in hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] in {"http", "websocket"} and not self._is_for_us(scope):
            await error_response(InvalidRequest("请求的主机名不受信任，请使用服务的正式地址访问"))(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_for_us(self, scope: Scope) -> bool:
        if self._trusts_all or scope["path"] in FOR_ANY_HOST:
            return True
        named = [value for name, value in scope["headers"] if name == b"host"]
        host = asked_host(named[0].decode("latin-1")) if len(named) == 1 else None
        return host is not None and is_among(host, self._hosts)
