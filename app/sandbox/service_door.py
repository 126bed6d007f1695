"""The door of every HTTP service: who comes in, what is noted, which fault strikes and how refusals are worded."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from app.sandbox.api_key import accepted_key, presented_key
from app.sandbox.connection import hang_up, wait_until_gone
from app.sandbox.envelope import ServiceError, refusal
from app.sandbox.faults import Faults
from app.sandbox.http_faults import RequestFault
from app.sandbox.oss_errors import OssError
from app.sandbox.request_log import RequestLog, SeenRequest, noted_headers

_LARGEST_BODY: Final = 64 * 1024 * 1024

Answer = Mapping[str, Any] | Response
Handler = Callable[[Request, SeenRequest], Awaitable[Answer]]
"""Answers a request: a document that gets its `request_id` (§0.3), or a whole response."""


class ServiceDoor:
    """An ASGI application for one path: a handler per HTTP method. `by_action` is for a path whose requests differ by
    the action in their input (§3)."""

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        faults: Faults,
        log: RequestLog,
        *,
        with_key: bool,
        by_action: bool = False,
    ) -> None:
        self._handlers = handlers
        self._faults = faults
        self._log = log
        self._with_key = with_key
        self._by_action = by_action

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        seen = SeenRequest(
            request_id=str(uuid.uuid4()),
            method=request.method,
            path=request.url.path,
            query=request.url.query,
            api_key=presented_key(request.headers),
            headers=noted_headers(request.headers),
        )
        self._log.add(seen)
        try:
            if self._by_action:
                seen.action = _action(await request.body())
            fault = self._faults.take_request(seen.method, seen.path, seen.action)
            response = await self._serve(request, seen, fault)
        except ClientDisconnect:
            response = None
        if response is None:
            seen.end(None, seen.error_code)
            return
        response.headers["x-request-id"] = seen.request_id
        seen.end(response.status_code, seen.error_code)
        await response(scope, receive, send)

    async def _serve(self, request: Request, seen: SeenRequest, fault: RequestFault | None) -> Response | None:
        """The response, None if there will never be one."""
        if fault is None:
            return await self._answer(request, seen)
        seen.fault = fault.how
        if fault.how in ("answer", "late", "silent"):
            await request.body()
        if fault.how in ("delay", "close_after"):
            response = await self._answer(request, seen)
        await asyncio.sleep(fault.seconds)
        if fault.how == "answer":
            return _faulty(fault, seen)
        if fault.how == "late":
            return await self._answer(request, seen)
        if fault.how == "delay":
            return response
        if fault.how != "silent":
            hang_up(request)
        await wait_until_gone(request)
        return None

    async def _answer(self, request: Request, seen: SeenRequest) -> Response:
        try:
            if self._with_key:
                accepted_key(request.headers)
            handler = self._handlers.get(request.method)
            if handler is None:
                raise ServiceError(400, "InvalidParameter", f"Request method '{request.method}' is not supported.")
            answer = await handler(request, seen)
        except ServiceError as error:
            seen.error_code = error.code
            return refusal(error.status, error.code, error.message, seen.request_id)
        except OssError as error:
            seen.error_code = error.code
            body = error.as_xml(seen.request_id, request.headers.get("host", ""))
            return Response(body, error.status, {"x-oss-request-id": seen.request_id}, "application/xml")
        if isinstance(answer, Response):
            return answer
        return JSONResponse({"request_id": seen.request_id, **answer})


async def read_document(request: Request, seen: SeenRequest) -> Mapping[str, Any]:
    """The JSON object of a request's body (§11 for what is wrong with it), noted without its audio."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise _no_json()
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > _LARGEST_BODY:
            raise ServiceError(400, "BadRequest.TooLarge", "Payload Too Large.")
    try:
        document = orjson.loads(content)
    except orjson.JSONDecodeError:
        raise _no_json() from None
    if not isinstance(document, dict):
        raise _no_json()
    seen.note_body(document)
    return document


def _action(body: bytes) -> str | None:
    """The action that a body asks for, as far as it can be understood."""
    try:
        action = orjson.loads(body)["input"]["action"]
    except (orjson.JSONDecodeError, LookupError, TypeError):
        return None
    return action if isinstance(action, str) else None


def _no_json() -> ServiceError:
    return ServiceError(400, "BadRequest.IllegalInput", "The input parameter requires json format.")


def _faulty(fault: RequestFault, seen: SeenRequest) -> Response:
    if fault.body is not None:
        response = Response(fault.body, fault.status)
    else:
        seen.error_code = fault.code
        response = refusal(fault.status, fault.code, fault.message, seen.request_id)
    if fault.retry_after is not None:
        response.headers["retry-after"] = str(fault.retry_after)
    return response
