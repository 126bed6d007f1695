"""URLs that anybody may read until they expire, as OSS signs them.

A changed one is refused, and so is one that is asked for with an Authorization as well.
"""

from __future__ import annotations

import hmac
import time
import uuid
from datetime import datetime
from typing import Final
from urllib.parse import quote, urlencode

from starlette.requests import Request

from app.sandbox.oss_errors import OssError

_ACCESS_KEY_ID: Final = "LTAIsandboxResult"


class SignedLinks:
    """Signs paths and knows its own signatures again."""

    def __init__(self) -> None:
        self._secret = uuid.uuid4().bytes

    def sign(self, path: str, expires_at: datetime) -> str:
        """The path with the query that opens it."""
        expires = str(round(expires_at.timestamp()))
        query = {"Expires": expires, "OSSAccessKeyId": _ACCESS_KEY_ID, "Signature": self._signature(path, expires)}
        return f"{quote(path)}?{urlencode(query)}"

    def check(self, request: Request) -> str:
        """The path asked for; an `OssError` unless it was signed here and has not expired."""
        if "authorization" in request.headers:
            raise OssError(400, "InvalidArgument", "Only one auth mechanism allowed.")
        expires, signature = (request.query_params.get(name, "") for name in ("Expires", "Signature"))
        path = str(request.scope["path"])
        if not hmac.compare_digest(self._signature(path, expires).encode(), signature.encode()):
            message = "The request signature we calculated does not match the signature you provided."
            raise OssError(403, "SignatureDoesNotMatch", message)
        if int(expires) < time.time():
            raise OssError(403, "AccessDenied", "Request has expired.")
        return path

    def _signature(self, path: str, expires: str) -> str:
        return hmac.digest(self._secret, f"{path}\n{expires}".encode(), "sha256").hex()
