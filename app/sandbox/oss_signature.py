"""Checking OSS signatures of version 4, in the Authorization header and in presigned URLs.

The canonical request is method, path, query, signed headers, the names of additional ones and the payload's hash. The
key is derived from the secret by date, region, product and a fixed word.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final
from urllib.parse import quote

from app.sandbox.oss_errors import OssError

ALGORITHM: Final = "OSS4-HMAC-SHA256"
UNSIGNED_PAYLOAD: Final = "UNSIGNED-PAYLOAD"
LARGEST_CLOCK_SKEW: Final = timedelta(minutes=15)
LONGEST_EXPIRY_SECONDS: Final = 604_800

_HEADER: Final = re.compile(r"(\w+)=([^,\s]*)")
_ALWAYS_SIGNED: Final = frozenset({"content-type", "content-md5"})


@dataclass(frozen=True, slots=True)
class OssRequest:
    """A request as it is signed: the decoded path, the decoded query in any order, headers in lower case."""

    method: str
    path: bytes
    query: Sequence[tuple[str, str]]
    headers: Mapping[str, bytes]

    def parameter(self, name: str) -> str | None:
        return next((value for key, value in self.query if key == name), None)

    def header(self, name: str) -> str:
        return self.headers.get(name, b"").decode("latin-1").strip()


@dataclass(frozen=True, slots=True)
class _Claim:
    """What a request says about its signature."""

    credential: str
    signature: str
    date: str
    additional_headers: tuple[str, ...]
    payload_hash: str


class OssVerifier:
    """Knows the one pair of keys that the sandbox accepts."""

    def __init__(self, access_key_id: str, access_key_secret: str, region: str) -> None:
        self._id = access_key_id
        self._secret = access_key_secret
        self._region = region

    def verify(self, request: OssRequest, now: datetime) -> bool:
        """True for a good signature, False for an anonymous request; an `OssError` for a bad one."""
        if authorization := request.header("authorization"):
            claim = self._header_claim(request, authorization)
            if abs(_signing_time(claim.date) - now) > LARGEST_CLOCK_SKEW:
                raise OssError(
                    403,
                    "RequestTimeTooSkewed",
                    "The difference between the request time and the current time is too large.",
                )
        elif request.parameter("x-oss-signature-version") is not None:
            claim = self._query_claim(request, now)
        elif request.parameter("Signature") is not None:
            raise OssError(403, "AccessDenied", "Signatures of version 1 are not accepted here, use version 4.")
        else:
            return False
        self._check(request, claim)
        return True

    def _header_claim(self, request: OssRequest, authorization: str) -> _Claim:
        algorithm, _, rest = authorization.partition(" ")
        if algorithm != ALGORITHM:
            raise OssError(403, "AccessDenied", "Only signatures of version 4 are accepted here.")
        fields = dict(_HEADER.findall(rest))
        payload_hash = request.header("x-oss-content-sha256")
        if not fields.get("Credential") or not fields.get("Signature") or not payload_hash:
            raise OssError(400, "InvalidArgument", "The Authorization header or x-oss-content-sha256 is incomplete.")
        return _Claim(
            credential=fields["Credential"],
            signature=fields["Signature"],
            date=request.header("x-oss-date"),
            additional_headers=_names(fields.get("AdditionalHeaders", "")),
            payload_hash=payload_hash,
        )

    def _query_claim(self, request: OssRequest, now: datetime) -> _Claim:
        if request.parameter("x-oss-signature-version") != ALGORITHM:
            raise OssError(400, "InvalidArgument", "The signature version is not known.")
        date = request.parameter("x-oss-date") or ""
        expires = request.parameter("x-oss-expires") or ""
        if not expires.isdigit() or not 0 < int(expires) <= LONGEST_EXPIRY_SECONDS:
            raise OssError(400, "AuthorizationQueryParametersError", "x-oss-expires is missing or out of range.")
        signed_at = _signing_time(date)
        if signed_at - now > LARGEST_CLOCK_SKEW:
            raise OssError(403, "AccessDenied", "Request is not valid yet.")
        if now > signed_at + timedelta(seconds=int(expires)):
            raise OssError(403, "AccessDenied", "Request has expired.")
        return _Claim(
            credential=request.parameter("x-oss-credential") or "",
            signature=request.parameter("x-oss-signature") or "",
            date=date,
            additional_headers=_names(request.parameter("x-oss-additional-headers") or ""),
            payload_hash=request.header("x-oss-content-sha256") or UNSIGNED_PAYLOAD,
        )

    def _check(self, request: OssRequest, claim: _Claim) -> None:
        key_id, _, scope = claim.credential.partition("/")
        if key_id != self._id:
            raise OssError(
                403, "InvalidAccessKeyId", "The OSS Access Key Id you provided does not exist in our records."
            )
        if scope != f"{claim.date[:8]}/{self._region}/oss/aliyun_v4_request":
            raise OssError(400, "InvalidArgument", "Invalid signing region, product or date in the credential.")
        expected = self._sign(request, claim, scope)
        if not hmac.compare_digest(expected.encode(), claim.signature.encode()):
            raise OssError(
                403,
                "SignatureDoesNotMatch",
                "The request signature we calculated does not match the signature you provided.",
            )

    def _sign(self, request: OssRequest, claim: _Claim, scope: str) -> str:
        canonical = _canonical_request(request, claim)
        to_sign = "\n".join((ALGORITHM, claim.date, scope, hashlib.sha256(canonical).hexdigest()))
        key = b"aliyun_v4" + self._secret.encode()
        for part in scope.split("/"):
            key = _hmac(key, part.encode())
        return _hmac(key, to_sign.encode()).hex()


def _canonical_request(request: OssRequest, claim: _Claim) -> bytes:
    query = sorted((_encode(name), _encode(value)) for name, value in request.query if name != "x-oss-signature")
    headers = sorted(
        (name, value.strip())
        for name, value in request.headers.items()
        if name.startswith("x-oss-") or name in _ALWAYS_SIGNED or name in claim.additional_headers
    )
    return b"\n".join(
        (
            request.method.encode(),
            quote(request.path, safe="/-_.~").encode(),
            "&".join(f"{name}={value}" if value else name for name, value in query).encode(),
            b"".join(name.encode() + b":" + value + b"\n" for name, value in headers),
            ";".join(sorted(claim.additional_headers)).encode(),
            claim.payload_hash.encode(),
        )
    )


def _signing_time(date: str) -> datetime:
    try:
        return datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError as error:
        raise OssError(403, "AccessDenied", "OSS authentication requires a valid x-oss-date.") from error


def _names(joined: str) -> tuple[str, ...]:
    return tuple(name.lower() for name in joined.split(";") if name)


def _encode(text: str) -> str:
    return quote(text, safe="-_.~")


def _hmac(key: bytes, message: bytes) -> bytes:
    return hmac.new(key, message, hashlib.sha256).digest()
