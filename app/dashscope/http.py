"""The provider's HTTP services: one client, which knows what may be asked again (PROTOCOL §0.2)."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx
import orjson
import structlog
from anyio import fail_after

from app.dashscope.answers import understand
from app.dashscope.credential import Credential
from app.dashscope.failures import may_retry
from app.dashscope.retries import MAX_ATTEMPTS, Patience
from app.errors import (
    AppError,
    ConnectionLost,
    HandshakeTimeout,
    Throttled,
    UnclearAnswer,
    Unreachable,
    UpstreamTimeout,
)
from app.probes import provider_retry, provider_try

log = structlog.get_logger(__name__)

MAX_ANSWER_BYTES = 8 * 1024 * 1024
KEPT_CONNECTIONS = 64
# An attempt whose answer drips in for this many times the silence that is borne is given up.
PATIENCE_FACTOR = 10
# Gateways drop idle connections after 60 s and more; ours go long before, so that a call rarely meets a dead one.
IDLE_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class StreamedBody:
    """A request body of known length that is made anew for each attempt, so that a large one is never held whole."""

    length: int
    chunks: Callable[[], AsyncIterator[bytes]]
    content_type: str = "application/json"


class HttpClient:
    """Calls with a user's key. Redirects are not followed: the key would travel to an unknown host."""

    def __init__(self, *, handshake_seconds: float, silence_seconds: float) -> None:
        self._silence_seconds = silence_seconds
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(silence_seconds, connect=handshake_seconds, pool=None),
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=KEPT_CONNECTIONS, keepalive_expiry=IDLE_SECONDS
            ),
            # Bodies come as they are: nothing unpacks to more than the limits below.
            headers={"User-Agent": "ai-voice-backend", "Accept-Encoding": "identity"},
            # One user's cookies are not for the next user's calls.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            trust_env=False,
        )

    async def post(
        self,
        credential: Credential,
        path: str,
        body: object,
        headers: dict[str, str] | None = None,
        *,
        is_free: bool = False,
    ) -> dict[str, Any]:
        """Call a service: one that is not free is asked again only while it surely did not take the work on.

        No attempt begins later than `silence_seconds` after the first. Gives the whole JSON answer.
        Raises the AppError that the failure means.
        """
        streamed = body if isinstance(body, StreamedBody) else _held(orjson.dumps(body))
        framing = {"Content-Type": streamed.content_type, "Content-Length": str(streamed.length)}
        url = credential.http_url + path
        all_headers = {**credential.headers, **(headers or {}), **framing}
        return await self._call(
            lambda: self._client.build_request("POST", url, headers=all_headers, content=streamed.chunks()),
            is_free=is_free,
        )

    async def get(
        self, credential: Credential, path: str, query: dict[str, str] | None = None, *, attempts: int = MAX_ATTEMPTS
    ) -> dict[str, Any]:
        """Ask for something that costs nothing. Raises the AppError that the failure means."""
        url = credential.http_url + path
        return await self._call(
            lambda: self._client.build_request("GET", url, params=query, headers=credential.headers),
            attempts,
            is_free=True,
        )

    async def send(self, request: httpx.Request, max_bytes: int) -> tuple[int, bytes]:
        """Send a request without a key, to a host that was checked; gives status and body.

        Raises ConnectionLost or UpstreamTimeout, and UnclearAnswer beyond `max_bytes`.
        """
        with provider_try():
            async with self.stream(request) as answer:
                return answer.status_code, await _read(answer, max_bytes)

    @asynccontextmanager
    async def stream(self, request: httpx.Request) -> AsyncIterator[httpx.Response]:
        """Send such a request, and read its answer piece by piece. Raises ConnectionLost or UpstreamTimeout."""
        with telling_what_broke():
            answer = await self._client.send(request, stream=True)
            try:
                yield answer
            finally:
                await answer.aclose()

    def build_request(self, method: str, url: str, **arguments: Any) -> httpx.Request:
        """Prepare a request for `send`."""
        return self._client.build_request(method, url, **arguments)

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()

    async def _call(
        self, build: Callable[[], httpx.Request], attempts: int = MAX_ATTEMPTS, *, is_free: bool = False
    ) -> dict[str, Any]:
        patience = Patience(self._silence_seconds, attempts)
        for attempt in itertools.count(1):
            try:
                with provider_try():
                    with fail_after(self._silence_seconds * PATIENCE_FACTOR):
                        async with self.stream(build()) as answer:
                            content = await _read(answer, MAX_ANSWER_BYTES)
                return understand(answer.status_code, content, answer.headers.get("Retry-After"))
            except TimeoutError as error:
                raise UpstreamTimeout from error
            except AppError as error:
                accepted = not is_free and not isinstance(error, Unreachable | HandshakeTimeout | Throttled)
                is_invited = is_free and error.retry_after_seconds is not None
                if not is_invited and not may_retry(error, accepted=accepted):
                    raise
                pause_seconds = patience.pause_seconds(attempt, error)
                if pause_seconds is None:
                    raise
                log.info("provider_retry", attempt=attempt, error=type(error).__name__)
            with provider_retry():
                await asyncio.sleep(pause_seconds)
        raise AssertionError("unreachable: the last attempt returns or raises")


@contextmanager
def telling_what_broke() -> Iterator[None]:
    """Turn the transport's failures into ours."""
    try:
        yield
    except httpx.ConnectTimeout as error:
        raise HandshakeTimeout from error
    except httpx.ConnectError as error:
        raise Unreachable from error
    except httpx.TimeoutException as error:
        raise UpstreamTimeout from error
    except httpx.HTTPError as error:
        raise ConnectionLost from error


def _held(content: bytes) -> StreamedBody:
    async def once() -> AsyncIterator[bytes]:
        yield content

    return StreamedBody(len(content), once)


async def _read(answer: httpx.Response, max_bytes: int) -> bytes:
    return b"".join([piece async for piece in pieces(answer, max_bytes)])


async def pieces(answer: httpx.Response, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body of an answer as it comes. Raises UnclearAnswer beyond `max_bytes`."""
    read = 0
    async for piece in answer.aiter_raw():
        read += len(piece)
        if read > max_bytes:
            raise UnclearAnswer("百炼平台返回的内容过大")
        yield piece
