"""OSS over HTTP, path style (`/{bucket}/{key}`): PUT, GET, HEAD and DELETE of single objects."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import logging
import re
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Final
from urllib.parse import parse_qsl, unquote_to_bytes

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.sandbox.connection import hang_up, wait_until_gone
from app.sandbox.faults import Faults
from app.sandbox.object_store import ObjectStore, StoredObject, new_object
from app.sandbox.options import SandboxOptions
from app.sandbox.oss_errors import OssError
from app.sandbox.oss_signature import UNSIGNED_PAYLOAD, OssRequest, OssVerifier
from app.sandbox.storage_faults import StorageFault

_log = logging.getLogger("app.sandbox")

_BUCKET: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{1,61}[a-z0-9])")
_LONGEST_KEY: Final = 1023
_RANGE: Final = re.compile(r"bytes=(\d*)-(\d*)")
_KEPT_HEADERS: Final = ("content-type", "cache-control", "content-disposition", "content-encoding", "expires")
_DEFAULT_TYPE: Final = "application/octet-stream"
_OVERRIDES: Final = {
    f"response-{name}": name for name in ("content-type", "content-disposition", "cache-control", "content-encoding")
}


class ObjectService:
    """An ASGI application for every path that nothing else serves."""

    def __init__(self, options: SandboxOptions, faults: Faults) -> None:
        self._faults = faults
        self._options = options
        self._store = ObjectStore(options.oss_max_total_bytes)
        self._verifier = OssVerifier(options.oss_access_key_id, options.oss_access_key_secret, options.oss_region)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        fault = self._faults.take_storage(request.method)
        try:
            response = await (self._respond(request) if fault is None else self._meet(fault, request, send))
        except ClientDisconnect:
            _log.info("sandbox object %s given up by the client", request.method)
            return
        if response is not None:
            await response(scope, receive, send)
            return
        _log.info("sandbox object %s cut off by a fault", request.method)
        hang_up(request)
        await wait_until_gone(request)

    async def _meet(self, fault: StorageFault, request: Request, send: Send) -> Response | None:
        """What becomes of a request that a fault strikes; None if its connection is to be closed now."""
        if fault.does_the_work:
            response = await self._respond(request)
            await asyncio.sleep(fault.seconds)
            return response if fault.how == "slow" else None
        if fault.how == "cut" and request.method == "PUT":
            await request.receive()
        await asyncio.sleep(fault.seconds)
        if fault.how != "cut":
            return await self._respond(request, refusal=_refusal(fault.how))
        if request.method == "GET":
            await _send_half(await self._respond(request), send)
        return None

    async def _respond(self, request: Request, *, refusal: OssError | None = None) -> Response:
        """The answer in OSS's dress; `refusal` if there is one, instead of the work."""
        request_id = uuid.uuid4().hex[:24].upper()
        error_code = None
        try:
            if refusal is not None:
                raise refusal
            response = await self._answer(request)
        except OssError as error:
            error_code = error.code
            body = error.as_xml(request_id, request.headers.get("host", ""))
            response = Response(body, error.status, media_type="application/xml")
        response.headers["x-oss-request-id"] = request_id
        response.headers["server"] = "AliyunOSS"
        _log.info("sandbox object %s status=%d error=%s", request.method, response.status_code, error_code)
        return response

    async def _answer(self, request: Request) -> Response:
        if self._faults.take("oss_unavailable"):
            raise _refusal("unavailable")
        asked = _read_request(request)
        bucket, key = _bucket_and_key(asked.path)
        signed = self._verifier.verify(asked, datetime.now(UTC))
        if signed:
            self._store.create_bucket(bucket)
        if not key:
            raise OssError(501, "NotImplemented", "The sandbox serves single objects only.")
        if request.method == "PUT":
            _require(signed)
            return await self._put(request, asked, bucket, key)
        if request.method == "DELETE":
            _require(signed)
            self._store.delete(bucket, key)
            return Response(status_code=204)
        if request.method in ("GET", "HEAD"):
            _require(signed or self._store.is_public(bucket, key))
            return _download(self._store.get(bucket, key), request, asked, signed=signed)
        raise OssError(405, "MethodNotAllowed", "The specified method is not allowed against this resource.")

    def read(self, asked: OssRequest) -> bytes:
        """The object that a GET would bring, with the right of whoever holds the URL; an `OssError` otherwise."""
        bucket, key = _bucket_and_key(asked.path)
        signed = self._verifier.verify(asked, datetime.now(UTC))
        _require(signed or self._store.is_public(bucket, key))
        return self._store.get(bucket, key).content

    async def _put(self, request: Request, asked: OssRequest, bucket: str, key: str) -> Response:
        if any(name in ("acl", "append", "partNumber", "uploadId", "tagging") for name, _ in asked.query):
            raise OssError(501, "NotImplemented", "The sandbox stores whole objects only.")
        if asked.headers.get("x-oss-copy-source"):
            raise OssError(501, "NotImplemented", "The sandbox copies no objects.")
        content = await self._read_body(request)
        _check_digests(asked, content)
        kept = {name: value for name, value in request.headers.items() if _is_kept(name)}
        kept.setdefault("content-type", _DEFAULT_TYPE)
        acl = asked.header("x-oss-object-acl") or "default"
        stored = await asyncio.to_thread(new_object, content, kept, acl)
        forbid_overwrite = asked.header("x-oss-forbid-overwrite").lower() == "true"
        self._store.put(bucket, key, stored, forbid_overwrite=forbid_overwrite)
        md5 = base64.b64encode(bytes.fromhex(stored.etag)).decode()
        return Response(status_code=200, headers={**_sums(stored), "Content-MD5": md5})

    async def _read_body(self, request: Request) -> bytes:
        content = bytearray()
        async for piece in request.stream():
            content += piece
            if len(content) > self._options.oss_max_object_bytes:
                raise OssError(400, "EntityTooLarge", "Your proposed upload exceeds the maximum allowed size.")
        return bytes(content)


def _refusal(how: str) -> OssError:
    if how == "denied":
        return OssError(403, "AccessDenied", "You have no right to access this object.")
    return OssError(503, "ServiceUnavailable", "The service is unavailable; please try again later.")


async def _send_half(response: Response, send: Send) -> None:
    body = bytes(response.body)
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})


def _read_request(request: Request) -> OssRequest:
    scope = request.scope
    raw_path: bytes = scope.get("raw_path") or scope["path"].encode()
    query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    headers = {name.decode("latin-1").lower(): value for name, value in scope["headers"]}
    return OssRequest(scope["method"], unquote_to_bytes(raw_path), query, headers)


def _bucket_and_key(path: bytes) -> tuple[str, str]:
    try:
        bucket, _, key = path.decode().removeprefix("/").partition("/")
    except UnicodeDecodeError as error:
        raise OssError(400, "InvalidObjectName", "The object name is not UTF-8.") from error
    if not bucket:
        raise OssError(403, "AccessDenied", "Buckets are not listed here.")
    if not _BUCKET.fullmatch(bucket):
        raise OssError(400, "InvalidBucketName", "The specified bucket is not valid.")
    if len(key.encode()) > _LONGEST_KEY or key.startswith(("/", "\\")):
        raise OssError(400, "InvalidObjectName", "The specified object is not valid.")
    return bucket, key


def _require(allowed: bool) -> None:
    if not allowed:
        raise OssError(403, "AccessDenied", "You have no right to access this object because of bucket acl.")


def _is_kept(name: str) -> bool:
    return name in _KEPT_HEADERS or name.startswith("x-oss-meta-")


def _check_digests(asked: OssRequest, content: bytes) -> None:
    if expected := asked.header("content-md5"):
        try:
            digest = base64.b64decode(expected, validate=True)
        except binascii.Error as error:
            raise OssError(400, "InvalidDigest", "The Content-MD5 you specified is not valid.") from error
        if digest != hashlib.md5(content, usedforsecurity=False).digest():
            raise OssError(400, "InvalidDigest", "The Content-MD5 you specified did not match what we received.")
    payload_hash = asked.header("x-oss-content-sha256")
    if payload_hash not in ("", UNSIGNED_PAYLOAD) and payload_hash != hashlib.sha256(content).hexdigest():
        raise OssError(400, "InvalidArgument", "The x-oss-content-sha256 does not match what we received.")


def _sums(stored: StoredObject) -> dict[str, str]:
    return {"ETag": f'"{stored.etag}"', "x-oss-hash-crc64ecma": stored.crc64}


def _download(stored: StoredObject, request: Request, asked: OssRequest, *, signed: bool) -> Response:
    headers: dict[str, str] = {
        **stored.headers,
        **_sums(stored),
        "Last-Modified": format_datetime(stored.modified, usegmt=True),
        "Accept-Ranges": "bytes",
        "x-oss-object-type": "Normal",
        "x-oss-storage-class": "Standard",
    }
    if signed:
        headers.update({_OVERRIDES[name]: value for name, value in asked.query if name in _OVERRIDES})
    if asked.header("if-none-match").strip('"') == stored.etag:
        return Response(status_code=304, headers=_sums(stored))
    status, content = 200, stored.content
    if window := _range(request.headers, len(stored.content)):
        first, last = window
        status, content = 206, stored.content[first : last + 1]
        headers["Content-Range"] = f"bytes {first}-{last}/{len(stored.content)}"
    if request.method == "HEAD":
        return Response(status_code=status, headers={**headers, "Content-Length": str(len(content))})
    return Response(content, status, headers)


def _range(headers: Mapping[str, str], size: int) -> tuple[int, int] | None:
    """First and last byte of a Range header. OSS sends everything when the range is not inside the object, unless
    `x-oss-range-behavior: standard` asks for HTTP's own rules."""
    standard = headers.get("x-oss-range-behavior") == "standard"
    match = _RANGE.fullmatch(headers.get("range", "").replace(" ", ""))
    if match is None or match[0] == "bytes=-":
        return None
    if not match[1]:
        length = int(match[2])
        first, last, inside = max(0, size - length), size - 1, 0 < length <= size
    else:
        first, last = int(match[1]), int(match[2]) if match[2] else max(int(match[1]), size - 1)
        if first > last:
            return None
        inside = last < size
    if inside:
        return first, last
    if not standard:
        return None
    if first >= size:
        raise OssError(416, "InvalidRange", "The requested range cannot be satisfied.")
    return first, min(last, size - 1)
