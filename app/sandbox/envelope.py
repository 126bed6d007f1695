"""The error envelope of the HTTP services (PROTOCOL.md §0.3), and refusals of §11 that several of them share."""

from __future__ import annotations

import uuid

from starlette.responses import JSONResponse


class ServiceError(Exception):
    """One refusal: HTTP status, code and message of PROTOCOL.md §11."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code
        self.message = message


def refusal(status: int, code: str, message: str, request_id: str | None = None) -> JSONResponse:
    """The error envelope (§0.3), with its `x-request-id` (§15)."""
    request_id = request_id or str(uuid.uuid4())
    body = {"code": code, "message": message, "request_id": request_id}
    return JSONResponse(body, status, {"x-request-id": request_id})


def refused_parameter(name: str) -> ServiceError:
    """A field that is absent or has an impossible value (§11)."""
    message = f"Required parameter({name}) missing or invalid, please check the request parameters."
    return ServiceError(400, "InvalidParameter", message)


def unknown_model() -> ServiceError:
    return ServiceError(404, "ModelNotFound", "Model can not be found.")


def wrong_url() -> ServiceError:
    """A model that another endpoint serves."""
    return ServiceError(400, "InvalidParameter", "url error, please check url！")


def refused_url() -> ServiceError:
    """A URL that is none, or an `oss://` one without the resolve header (§6)."""
    detail = "The provided URL does not appear to be valid. Ensure it is correctly formatted."
    return ServiceError(400, "invalid_parameter_error", f"<400> InternalError.Algo.InvalidParameter: {detail}")


def rate_exceeded() -> ServiceError:
    return ServiceError(429, "Throttling.RateQuota", "Requests rate limit exceeded, please try again later.")
