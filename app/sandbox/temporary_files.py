"""Temporary files (PROTOCOL.md §6): granted by a policy, written once, read by the services only.

A file belongs to the key and the model its policy was made for, and is gone after 48 hours.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final
from zoneinfo import ZoneInfo

import orjson

from app.sandbox.oss_errors import OssError

UPLOAD_BUCKET: Final = "dashscope-file-sandbox"
ACCESS_KEY_ID: Final = "LTAIsandboxUpload"

_LIFE: Final = timedelta(hours=48)
_BEIJING: Final = ZoneInfo("Asia/Shanghai")


@dataclass(frozen=True, slots=True)
class _Grant:
    api_key: str
    model: str
    made_at: datetime


class TemporaryFiles:
    """Policies, and the files that were uploaded with them. Their total size is bounded."""

    def __init__(self, max_total_bytes: int) -> None:
        self._max_total_bytes = max_total_bytes
        self._secret = uuid.uuid4().bytes
        self._grants: dict[str, _Grant] = {}
        self._files: dict[str, bytes] = {}

    def grant(self, api_key: str, model: str, seconds: int, megabytes: int) -> dict[str, object]:
        """The `data` of a policy answer, all but `upload_host`."""
        self._forget_old()
        now = datetime.now(UTC)
        account = hashlib.sha256(api_key.encode()).hexdigest()[:32]
        upload_dir = f"dashscope-instant/{account}/{now.astimezone(_BEIJING):%Y-%m-%d}/{uuid.uuid4()}"
        self._grants[upload_dir] = _Grant(api_key, model, now)
        conditions: list[object] = [
            ["content-length-range", 0, megabytes * 1024 * 1024],
            ["starts-with", "$key", upload_dir],
            {"bucket": UPLOAD_BUCKET},
            {"x-oss-object-acl": "private"},
            {"x-oss-forbid-overwrite": "true"},
        ]
        expiration = f"{now + timedelta(seconds=seconds):%Y-%m-%dT%H:%M:%S.000Z}"
        policy = base64.b64encode(orjson.dumps({"expiration": expiration, "conditions": conditions})).decode()
        return {
            "policy": policy,
            "signature": self.sign(policy),
            "upload_dir": upload_dir,
            "expire_in_seconds": seconds,
            "max_file_size_mb": megabytes,
            "capacity_limit_mb": 999_999_999,
            "oss_access_key_id": ACCESS_KEY_ID,
            "x_oss_object_acl": "private",
            "x_oss_forbid_overwrite": "true",
        }

    def sign(self, policy: str) -> str:
        """The signature of a policy as OSS makes it for form uploads."""
        return base64.b64encode(hmac.digest(self._secret, policy.encode(), "sha1")).decode()

    def write(self, key: str, content: bytes) -> None:
        """Keep a file whose policy was checked; a second one of the same name is refused."""
        if key in self._files:
            message = "The object you specified already exists and can not be overwritten."
            raise OssError(409, "FileAlreadyExists", message)
        if len(content) + sum(map(len, self._files.values())) > self._max_total_bytes:
            raise OssError(507, "StorageFull", "The sandbox holds no more files; start it again.")
        self._files[key] = content

    def read(self, key: str, api_key: str, model: str) -> bytes | None:
        """The file, for the account and the model it was uploaded for."""
        self._forget_old()
        grant = self._grants.get(_upload_dir(key))
        if grant is None or (grant.api_key, grant.model) != (api_key, model):
            return None
        return self._files.get(key)

    def _forget_old(self) -> None:
        oldest = datetime.now(UTC) - _LIFE
        for upload_dir in [upload_dir for upload_dir, grant in self._grants.items() if grant.made_at < oldest]:
            del self._grants[upload_dir]
            for key in [key for key in self._files if _upload_dir(key) == upload_dir]:
                del self._files[key]


def _upload_dir(key: str) -> str:
    return "/".join(key.split("/")[:4])
