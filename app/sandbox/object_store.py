"""Objects in memory. They are gone when the sandbox ends, and their total size is bounded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal, cast, get_args

import crcmod  # type: ignore[import-untyped,unused-ignore]

from app.sandbox.oss_errors import OssError

Acl = Literal["default", "private", "public-read", "public-read-write"]

_crc64 = crcmod.mkCrcFun(0x142F0E1EBA9EA3693, initCrc=0, xorOut=0xFFFFFFFFFFFFFFFF, rev=True)
_PRIVATE_SUFFIX: Final = "-private"


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object and what OSS tells about it. `headers` are those of the upload that come back with every download."""

    content: bytes
    headers: Mapping[str, str]
    acl: Acl
    etag: str
    crc64: str
    modified: datetime


def new_object(content: bytes, headers: Mapping[str, str], acl: str) -> StoredObject:
    """An object ready to be stored; its sums are computed here, which takes a moment for large ones."""
    if acl not in get_args(Acl):
        raise OssError(400, "InvalidArgument", "The x-oss-object-acl is not known.")
    return StoredObject(
        content=content,
        headers=headers,
        acl=cast(Acl, acl),
        etag=hashlib.md5(content, usedforsecurity=False).hexdigest().upper(),
        crc64=str(_crc64(content)),
        modified=datetime.now(UTC),
    )


class ObjectStore:
    """Buckets of objects. A bucket exists from its first authorised use, and is private if its name ends so."""

    def __init__(self, max_total_bytes: int) -> None:
        self._max_total_bytes = max_total_bytes
        self._buckets: dict[str, dict[str, StoredObject]] = {}
        self._total_bytes = 0

    def create_bucket(self, bucket: str) -> None:
        self._buckets.setdefault(bucket, {})

    def put(self, bucket: str, key: str, stored: StoredObject, *, forbid_overwrite: bool) -> None:
        objects = self._objects(bucket)
        replaced = objects.get(key)
        if replaced is not None and forbid_overwrite:
            raise OssError(
                409,
                "FileAlreadyExists",
                "The object you specified already exists and can not be overwritten.",
            )
        growth = len(stored.content) - (len(replaced.content) if replaced else 0)
        if self._total_bytes + growth > self._max_total_bytes:
            raise OssError(507, "StorageFull", "The sandbox holds no more objects; delete some or start it again.")
        self._total_bytes += growth
        objects[key] = stored

    def get(self, bucket: str, key: str) -> StoredObject:
        try:
            return self._objects(bucket)[key]
        except KeyError:
            raise OssError(404, "NoSuchKey", "The specified key does not exist.") from None

    def delete(self, bucket: str, key: str) -> None:
        """Forget an object; an unknown one is no error."""
        forgotten = self._objects(bucket).pop(key, None)
        if forgotten is not None:
            self._total_bytes -= len(forgotten.content)

    def is_public(self, bucket: str, key: str) -> bool:
        """Whether anybody may read the object. Keys that don't exist follow their bucket."""
        stored = self._objects(bucket).get(key)
        if stored is None or stored.acl == "default":
            return not bucket.endswith(_PRIVATE_SUFFIX)
        return stored.acl != "private"

    def _objects(self, bucket: str) -> dict[str, StoredObject]:
        try:
            return self._buckets[bucket]
        except KeyError:
            raise OssError(404, "NoSuchBucket", "The specified bucket does not exist.") from None
