"""The envelope around every JSON answer: `{"code": 200, "message": "success", "data": …}`."""

from threading import Lock
from typing import Any, Generic, TypeVar

import orjson
from fastapi import FastAPI
from fastapi.responses import Response
from pydantic import BaseModel, Field

Data = TypeVar("Data")
JSON = "application/json"


class Envelope(BaseModel, Generic[Data]):
    """统一响应格式。"""

    code: int = Field(default=200, description="状态码，与 HTTP 状态码一致", examples=[200])
    message: str = Field(default="success", description="响应消息", examples=["success"])
    data: Data = Field(description="响应数据")


class ErrorEnvelope(BaseModel):
    """统一的错误响应格式。"""

    code: int = Field(description="状态码，与 HTTP 状态码一致")
    message: str = Field(description="说明原因与处理办法的中文消息")
    data: None = Field(default=None, description="出错时为 null")
    error: str = Field(description="错误码，供程序判断")


def enveloped(data: object) -> Response:
    """The envelope around data that holds ready JSON as `orjson.Fragment`, which is not read again."""
    return Response(orjson.dumps({"code": 200, "message": "success", "data": data}), media_type=JSON)


_ERRORS = {
    400: ("参数错误", "INVALID_REQUEST", "volume 必须小于等于 100"),
    401: ("未登录、登录失效，或百炼 API Key 无效", "UNAUTHORIZED", "未登录或登录已失效，请重新登录"),
    403: ("未配置 API 密钥、超出预算，或没有权限", "NO_API_KEY", "未配置API密钥，请在用户设置中配置apikey"),
    404: ("资源不存在", "NOT_FOUND", "资源不存在"),
    409: ("与已有数据冲突", "USERNAME_TAKEN", "用户名已被占用，请换一个"),
    413: ("请求体过大，未被读取", "PAYLOAD_TOO_LARGE", "请求体过大"),
    429: ("请求频率超限，见 Retry-After", "RATE_LIMITED", "请求过于频繁，请稍后重试"),
    500: ("服务器内部错误", "INTERNAL_ERROR", "服务器内部错误，请稍后重试"),
    502: ("百炼平台或存储返回错误", "UPSTREAM_ERROR", "百炼平台返回错误：百炼账号已欠费，请充值后重试（Arrearage）"),
    503: ("服务尚未就绪", "NOT_READY", "数据库不可用"),
    504: ("百炼平台没有及时响应", "TIMEOUT", "百炼平台长时间没有响应，请稍后重试"),
}


# By name: FastAPI would build a serializer for each error of each route, which is never used.
_ERROR = {"$ref": f"#/components/schemas/{ErrorEnvelope.__name__}"}


def error_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The documentation of a route's error answers."""
    answers: dict[int | str, dict[str, Any]] = {}
    for status in (*statuses, 500):
        description, error, message = _ERRORS[status]
        example = {"code": status, "message": message, "data": None, "error": error}
        answers[status] = {"description": description, "content": {JSON: {"schema": _ERROR, "example": example}}}
    return answers


def describe_errors_as_answered(app: FastAPI) -> None:
    """Mend the schema's error answers.

    Validation answers 400, not 422; FastAPI drops nulls from examples, and does not know the envelope of errors.
    """
    generate, one_at_a_time = app.openapi, Lock()

    def openapi() -> dict[str, Any]:
        with one_at_a_time:
            return mended()

    def mended() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = generate()
            for operations in schema["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    for answer in operation["responses"].values():
                        if example := answer.get("content", {}).get(JSON, {}).get("example"):
                            example.setdefault("data", None)
            schemas = schema["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            schemas[ErrorEnvelope.__name__] = ErrorEnvelope.model_json_schema()
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
