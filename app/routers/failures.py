"""One mapping from everything that can go wrong to the error envelope."""

import asyncio
from collections.abc import Sequence
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import AppError, NotReady, PayloadTooLarge, Unauthorized
from app.routers.idempotency import REPLAYED
from app.services.calls import as_told

log = structlog.get_logger(__name__)

_HTTP_ERRORS = {
    400: ("INVALID_REQUEST", "请求格式错误，无法解析"),
    404: ("NOT_FOUND", "接口或资源不存在，请检查路径"),
    405: ("METHOD_NOT_ALLOWED", "该接口不支持此请求方法"),
    413: ("PAYLOAD_TOO_LARGE", "请求体过大"),
    416: ("RANGE_NOT_SATISFIABLE", "请求的范围超出文件大小"),
}

# Pydantic's error types in words; {name} is the field, the rest comes from the error's context.
_RULES = {
    "missing": "缺少必填字段 {name}",
    "extra_forbidden": "没有字段 {name}",
    "json_invalid": "请求体不是合法的 JSON",
    "less_than_equal": "{name} 必须小于等于 {le}",
    "greater_than_equal": "{name} 必须大于等于 {ge}",
    "less_than": "{name} 必须小于 {lt}",
    "greater_than": "{name} 必须大于 {gt}",
    "string_too_short": "{name} 至少需要 {min_length} 个字符",
    "string_too_long": "{name} 不能超过 {max_length} 个字符",
    "string_pattern_mismatch": "{name} 的格式不正确",
    "string_type": "{name} 必须是字符串",
    "string_unicode": "{name} 含有无法编码的字符",
    "int_type": "{name} 必须是整数",
    "int_parsing": "{name} 必须是整数",
    "int_from_float": "{name} 必须是整数",
    "int_parsing_size": "{name} 超出整数范围",
    "float_type": "{name} 必须是数字",
    "float_parsing": "{name} 必须是数字",
    "finite_number": "{name} 必须是有限的数字",
    "bool_type": "{name} 必须是 true 或 false",
    "bool_parsing": "{name} 必须是 true 或 false",
    "literal_error": "{name} 必须是以下之一：{expected}",
    "model_attributes_type": "请求体必须是 JSON 对象",
    "dict_type": "请求体必须是 JSON 对象",
    "value_error": "{name} {error}",
}
_PLACES = {"body", "query", "path", "header", "form"}


def add_failure_handlers(app: FastAPI) -> None:
    """Answer every exception that a route or the framework raises with the envelope."""
    app.add_exception_handler(AppError, _answer_app_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)


def error_response(error: AppError) -> JSONResponse:
    """The envelope of an error, with the headers that belong to it."""
    headers: dict[str, str] = {}
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    if error.is_repeat:
        headers[REPLAYED] = "true"
    return _envelope(error.status, error.code, error.message, headers)


class AnswerUnexpected:
    """Answers what no handler caught: a bug, or a request that the server cancels because it shuts down.

    What happens after the answer has begun is raised on, so that the server breaks the connection off visibly.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        started = False

        async def send_watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, send_watched)
        except asyncio.CancelledError:
            if scope["type"] != "http" or started:
                raise
            await error_response(NotReady("服务正在重启，请稍后重试；已开始的合成见历史记录"))(scope, receive, send)
        except Exception as error:
            told = as_told(error)
            if isinstance(told, NotReady):
                log.warning("request_met_outage", error=type(error).__name__, answered=started)
            else:
                log.exception("request_failed", error=type(error).__name__, answered=started)
            if scope["type"] != "http" or started:
                raise
            await error_response(told)(scope, receive, send)


async def _answer_app_error(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, AppError):
        raise error
    return error_response(error)


async def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    headers = dict(error.headers or {})
    code, message = _HTTP_ERRORS.get(error.status_code, ("HTTP_ERROR", "请求无法处理"))
    if error.status_code == PayloadTooLarge.status:
        message = error.detail  # BodyLimit's, which names the limit
    if error.status_code == 405 and (methods := _methods_at(request)) and request.method not in methods:
        headers["Allow"] = ", ".join(sorted(methods))  # the router names those of one function only
    return _envelope(error.status_code, code, message, headers)


def _methods_at(request: Request) -> set[str]:
    """The methods of the first path that fits, of all the functions that share it."""
    contexts = [each for each in iter_route_contexts(request.app.routes) if each.methods and each.path is not None]
    path = request.scope["path"]
    fitting = next((each.path for each in contexts if compile_path(each.path or "")[0].match(path)), None)
    return {method for each in contexts if each.path == fitting for method in each.methods or ()}


async def _answer_validation_error(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    return _envelope(400, "INVALID_REQUEST", describe_problems(error.errors()), {})


def describe_problems(problems: Sequence[Any]) -> str:
    """Pydantic's errors in words."""
    described = list(dict.fromkeys(_describe(problem) for problem in problems))
    return "；".join(described[:5])


def _describe(problem: dict[str, Any]) -> str:
    path = [str(part) for part in problem["loc"] if part not in _PLACES]
    name = ".".join(path)[:100] or "请求体"
    rule = _RULES.get(problem["type"], "{name} 不符合要求")
    if problem["type"] == "missing" and not path:
        rule = "缺少请求体"
    context = {
        key: str(value)[:500].replace(" or ", "、").replace(", ", "、") for key, value in problem.get("ctx", {}).items()
    }
    return rule.format_map({**context, "name": name})


def _envelope(status: int, code: str, message: str, headers: dict[str, str]) -> JSONResponse:
    content = {"code": status, "message": message, "data": None, "error": code}
    return JSONResponse(content, status, headers=headers)
