"""Temporary uploads (PROTOCOL.md §6): the policy of DashScope, and the form upload to the storage behind it.

The storage answers as OSS does, in XML. It takes no Authorization, and nobody reads from it over HTTP.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import AsyncGenerator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import orjson
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response

from app.sandbox.enrollment_order import ENROLLMENT
from app.sandbox.envelope import rate_exceeded, refused_parameter, unknown_model
from app.sandbox.faults import Faults
from app.sandbox.options import SandboxOptions
from app.sandbox.oss_errors import OssError
from app.sandbox.rate_window import RateWindow
from app.sandbox.recognition_models import EVERY
from app.sandbox.request_log import SeenRequest
from app.sandbox.service_door import Answer
from app.sandbox.temporary_files import ACCESS_KEY_ID, UPLOAD_BUCKET, TemporaryFiles

_POLICY_EXPIRED: Final = "Invalid according to Policy: Policy expired."
_FORM_OVERHEAD: Final = 64 * 1024
_MOST_FIELDS: Final = 32


class UploadService:
    """Hands out policies and takes the files that come with them."""

    def __init__(self, options: SandboxOptions, faults: Faults, files: TemporaryFiles) -> None:
        self._options = options
        self._faults = faults
        self._files = files
        self._window = RateWindow(options.upload_policies_per_second, 1.0)

    async def policy(self, request: Request, seen: SeenRequest) -> Answer:
        """`GET /api/v1/uploads?action=getPolicy&model=…`."""
        if request.query_params.get("action") != "getPolicy":
            raise refused_parameter("action")
        seen.model = model = request.query_params.get("model")
        if not model:
            raise refused_parameter("model")
        if model not in EVERY | {ENROLLMENT}:
            raise unknown_model()
        if not self._window.take((seen.api_key, model)):
            raise rate_exceeded()
        options = self._options
        granted = self._files.grant(seen.api_key, model, options.upload_policy_seconds, options.upload_max_megabytes)
        host = f"{request.url.scheme}://{request.headers['host']}/{UPLOAD_BUCKET}"
        return {"data": {**granted, "upload_host": host}}

    async def upload(self, request: Request, seen: SeenRequest) -> Answer:
        """The form upload to `upload_host`: 200 and nothing more."""
        if "authorization" in request.headers:
            raise OssError(400, "InvalidArgument", "Unsupported authorization type.")
        if fault := self._faults.take_upload():
            seen.fault = fault.how
            await request.body()
            raise _denied(_POLICY_EXPIRED if fault.how == "expired" else "Access denied.")
        form = await self._read_form(request)
        try:
            fields, file = _take_apart(form)
            key = fields.get("key", "")
            limit = self._check(fields, key)
            content = await file.read()
        finally:
            await form.close()
        if len(content) > limit:
            raise _too_large()
        self._files.write(key, content)
        seen.audio_bytes = len(content)
        return Response(status_code=200)

    async def deny(self, request: Request, seen: SeenRequest) -> Answer:
        """Whatever else is asked of the storage."""
        raise _denied("You have no right to access this object because of bucket acl.")

    async def _read_form(self, request: Request) -> FormData:
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            message = "Bucket POST must be of the enclosure-type multipart/form-data."
            raise OssError(412, "PreconditionFailed", message)
        largest = self._options.upload_max_megabytes * 1024 * 1024 + _FORM_OVERHEAD
        parser = MultiPartParser(
            request.headers, _bounded(request, largest), max_files=_MOST_FIELDS, max_fields=_MOST_FIELDS
        )
        try:
            return await parser.parse()
        except MultiPartException:
            raise _malformed() from None

    def _check(self, fields: Mapping[str, str], key: str) -> int:
        """The largest size that a form's policy allows; an `OssError` unless every field agrees with it."""
        policy = fields.get("policy", "")
        if not policy or not fields.get("Signature") or not fields.get("OSSAccessKeyId"):
            raise _denied("You have no right to access this object because of bucket acl.")
        if fields["OSSAccessKeyId"] != ACCESS_KEY_ID:
            message = "The OSS Access Key Id you provided does not exist in our records."
            raise OssError(403, "InvalidAccessKeyId", message)
        if not hmac.compare_digest(self._files.sign(policy).encode(), fields["Signature"].encode()):
            message = "The request signature we calculated does not match the signature you provided."
            raise OssError(403, "SignatureDoesNotMatch", message)
        document = orjson.loads(base64.b64decode(policy))
        if datetime.fromisoformat(document["expiration"]) <= datetime.now(UTC):
            raise _denied(_POLICY_EXPIRED)
        if fields.get("success_action_status") != "200":
            raise OssError(400, "InvalidArgument", "The success_action_status must be 200.")
        return _allowed_size(document["conditions"], {**fields, "bucket": UPLOAD_BUCKET, "key": key})


async def _bounded(request: Request, largest: int) -> AsyncGenerator[bytes, None]:
    received = 0
    async for piece in request.stream():
        received += len(piece)
        if received > largest:
            raise _too_large()
        yield piece


def _take_apart(form: FormData) -> tuple[dict[str, str], UploadFile]:
    """The fields and the file of a form, which comes last and alone."""
    items = form.multi_items()
    files = [value for _, value in items if isinstance(value, UploadFile)]
    if len(files) != 1:
        message = "POST requires exactly one file upload per request."
        raise OssError(400, "IncorrectNumberOfFilesInPOSTRequest", message)
    name, file = items[-1]
    if name != "file" or not isinstance(file, UploadFile):
        raise _malformed()
    fields = {name: value for name, value in items[:-1] if isinstance(value, str)}
    if len(fields) != len(items) - 1:
        raise _malformed()
    return fields, file


def _allowed_size(conditions: list[Any], fields: Mapping[str, str]) -> int:
    largest = 0
    for condition in conditions:
        if isinstance(condition, dict):
            met = all(fields.get(name) == value for name, value in condition.items())
        elif condition[0] == "starts-with":
            rest = fields[condition[1].removeprefix("$")].removeprefix(condition[2])
            met = fields["key"].startswith(f"{condition[2]}/") and len(rest) > 1
        else:
            met, largest = True, condition[2]
        if not met:
            raise _denied(f"Invalid according to Policy: Policy Condition failed: {orjson.dumps(condition).decode()}")
    return int(largest)


def _denied(message: str) -> OssError:
    return OssError(403, "AccessDenied", message)


def _malformed() -> OssError:
    message = "The body of your POST request is not well-formed multipart/form-data."
    return OssError(400, "MalformedPOSTRequest", message)


def _too_large() -> OssError:
    return OssError(400, "EntityTooLarge", "Your proposed upload exceeds the maximum allowed size.")
