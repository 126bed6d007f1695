"""Audio in Alibaba Cloud OSS, with V4 signatures. oss2 blocks, so every call runs in a thread of our own few.

Facts about oss2 2.19 that shape this file: V1 is its default signature, V4 needs a region; its
`connect_timeout` also limits every wait for data; it retries nothing; a connection goes back to the pool only
when its answer was read, an empty one too; failures while a body is read come as `requests` errors (an OSError)
instead of its own; it logs access key ids and signatures below WARNING.
"""

import logging
import math
import random
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, BinaryIO, ClassVar, TypeVar
from urllib.parse import urlsplit

import anyio
import crcmod.crcmod
import oss2
import structlog
from anyio import to_thread
from oss2.exceptions import ClientError, InconsistentError, OssError, RequestError, ServerError
from oss2.utils import is_ip_or_localhost

from app.errors import AppError, ObjectNotFound, StorageError
from app.probes import storage_call
from app.storage.keys import check_key, is_key, is_private, key_under
from app.timing import measure

THREADS = 10  # more gain nothing (measured), and the connection pool is as large
TIMEOUT_SECONDS = 10.0
ATTEMPTS = 3
BACKOFF_SECONDS = 0.2
SIGNED_URL_SECONDS = 3600
CHUNK_BYTES = 256 * 1024
# How long a connection that nobody uses can be relied on to stay open.
OPEN_SECONDS = 20.0

_ADVICE_BY_CODE = {
    "AccessDenied": "对象存储拒绝访问，请管理员检查 OSS 账号的读写权限",
    "InvalidAccessKeyId": "对象存储密钥无效，请管理员检查 OSS 的 AccessKey 配置",
    "SignatureDoesNotMatch": "对象存储密钥不匹配，请管理员检查 OSS 的 AccessKey 和地域配置",
    "InvalidArgument": "对象存储拒绝了请求，请管理员检查 OSS 的地域和 Endpoint 配置",
    "NoSuchBucket": "对象存储空间不存在，请管理员检查 OSS 的 Bucket 和 Endpoint 配置",
    "RequestTimeTooSkewed": "服务器时钟与对象存储相差过大，请管理员校准系统时间",
    "UserDisable": "对象存储账号已停用或欠费，请管理员检查阿里云账户",
}
_UNREACHABLE = "暂时无法连接对象存储，请稍后重试"
_REFUSED = "对象存储拒绝了请求，请管理员按日志中的错误码检查 OSS 配置"

log = structlog.get_logger(__name__)
Result = TypeVar("Result")


class OssStorage:
    """Objects of one bucket. Failures that may pass are tried three times, refusals once."""

    fetchable: ClassVar[bool] = True

    def __init__(
        self,
        *,
        endpoint: str,
        region: str,
        bucket: str,
        access_key_id: str,
        access_key_secret: str,
        public_base_url: str | None = None,
        signed_urls: bool = False,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        """Prepare a client; nothing is sent yet.

        `endpoint` is a host (then HTTPS is used) or a URL, `region` a name such as `cn-hangzhou`.
        `public_base_url` is a domain or CDN in front of the bucket. `timeout_seconds` limits each wait for the
        network, not a whole transfer. Raises ValueError when the endpoint or the bucket name is malformed.
        """
        logging.getLogger("oss2").setLevel(logging.WARNING)
        if not crcmod.crcmod._usingExtension:
            log.warning("crc_is_slow", remedy="install crcmod-plus: pure Python checksums slow uploads tenfold")
        endpoint = endpoint.strip().rstrip("/")
        if "://" not in endpoint:
            endpoint = f"https://{endpoint}"
        self._session = oss2.Session(pool_size=THREADS)
        try:
            self._bucket = oss2.Bucket(
                oss2.AuthV4(access_key_id, access_key_secret),
                endpoint,
                bucket,
                session=self._session,
                connect_timeout=timeout_seconds,
                region=region.removeprefix("oss-"),
            )
        except ClientError as error:
            raise ValueError("OSS_ENDPOINT or OSS_BUCKET is malformed") from error
        self._bucket_url = _bucket_url(endpoint, bucket)
        self._base_url = public_base_url or self._bucket_url
        self._signed_urls = signed_urls
        self._threads = anyio.CapacityLimiter(THREADS)
        self._used_at = -math.inf

    async def put(self, key: str, source: BinaryIO, *, content_type: str) -> None:
        """Upload the source from its start, again from its start at each try, checked by CRC-64."""
        check_key(key)
        loan = _Loan(source)
        headers = {"Content-Type": content_type}
        if is_private(key):
            headers["x-oss-object-acl"] = "private"  # whatever the bucket's is

        def upload() -> None:
            loan.seek(0)
            self._bucket.put_object(key, loan, headers=headers).resp.read()

        try:
            await self._call("put", key, upload)
        finally:
            loan.end()

    def url(self, key: str) -> str:
        """Give the public address, or one that is signed for an hour when the bucket or the object is private.

        A private object has that of the bucket itself, past any CDN, which could keep it or have rights of its own.

        A V4 signature covers bucket, key and parameters but no host, so it also holds for a domain or CDN in
        front of the bucket (oss2: `ProviderAuthV4._sign_url`).
        """
        check_key(key)
        if not self._signed_urls and not is_private(key):
            return f"{self._base_url}/{key}"
        signed = self._bucket.sign_url("GET", key, SIGNED_URL_SECONDS)
        base_url = self._bucket_url if is_private(key) else self._base_url
        return f"{base_url}/{key}?{urlsplit(signed).query}"

    def key_of(self, url: str) -> str | None:
        """Recognise an address of the bucket, its own or that of the domain in front of it, signed or not."""
        return key_under(self._base_url, url) or key_under(self._bucket_url, url)

    @asynccontextmanager
    async def open(self, key: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """Open an object as a stream of chunks; its CRC-64 is checked at the end."""
        if not is_key(key):
            raise ObjectNotFound
        download = await self._call("open", key, lambda: self._bucket.get_object(key))
        try:
            async with aclosing(self._chunks(key, download)) as chunks:
                yield chunks
        finally:
            download.close()

    async def delete(self, key: str) -> None:
        """Remove an object; OSS answers the same for an absent one."""
        check_key(key)
        with suppress(ObjectNotFound):
            await self._call("delete", key, lambda: self._bucket.delete_object(key).resp.read())

    async def get_ready(self) -> None:
        """Open a connection by asking for an object that is not there, unless one was used lately."""
        if time.monotonic() - self._used_at > OPEN_SECONDS:
            self._used_at = time.monotonic()
            absent = f"health/{uuid.uuid4()}"
            with suppress(OssError, OSError):
                await to_thread.run_sync(
                    lambda: self._bucket.get_object(absent).read(), limiter=self._threads, abandon_on_cancel=True
                )

    async def close(self) -> None:
        """Close the connections of the pool."""
        self._session.session.close()

    async def _call(self, verb: str, key: str, function: Callable[[], Result]) -> Result:
        """Run a call in a thread, with bounded and jittered retries. A cancelled caller leaves the thread behind."""
        with storage_call(verb):
            return await self._try(verb, key, function)

    async def _try(self, verb: str, key: str, function: Callable[[], Result]) -> Result:
        attempt = 1
        while True:
            self._used_at = time.monotonic()
            try:
                return await to_thread.run_sync(function, limiter=self._threads, abandon_on_cancel=True)
            except (OssError, OSError) as error:
                if attempt == ATTEMPTS or not _may_pass(error):
                    raise _translated(verb, key, error) from None
                log.warning("oss_retry", verb=verb, key=key, attempt=attempt, **_facts(error))
            longest = BACKOFF_SECONDS * 2**attempt
            await anyio.sleep(random.uniform(longest / 2, longest))  # noqa: S311 - spreads load, hides nothing
            attempt += 1

    async def _chunks(self, key: str, download: Any) -> AsyncGenerator[bytes, None]:
        try:
            while True:
                with measure("storage"):
                    chunk = await to_thread.run_sync(download.read, CHUNK_BYTES, limiter=self._threads)
                if not chunk:
                    break
                yield chunk
            if download.server_crc is not None and download.client_crc != download.server_crc:
                raise InconsistentError("the downloaded bytes do not match their CRC", download.request_id)
        except (OssError, OSError) as error:
            raise _translated("read", key, error) from None


class _Loan:
    """A source lent to an upload. Once the loan ends, an abandoned thread can neither read nor move it.

    The bytes that a request promised are then missing, so OSS stores nothing of it.
    """

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._ended = False

    def read(self, size: int = -1) -> bytes:
        with self._lock:
            self._check()
            return self._source.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        with self._lock:
            self._check()
            return self._source.seek(offset, whence)

    def tell(self) -> int:
        with self._lock:
            self._check()
            return self._source.tell()

    def end(self) -> None:
        with self._lock:
            self._ended = True

    def _check(self) -> None:
        if self._ended:
            raise anyio.ClosedResourceError


def _bucket_url(endpoint: str, bucket: str) -> str:
    """Where the public reaches a bucket: by host name, by path where the endpoint is a bare address.

    The internal endpoint is free inside Alibaba's network and unknown outside it: players get the public one.
    """
    scheme, netloc = urlsplit(endpoint)[:2]
    if is_ip_or_localhost(netloc):
        return f"{scheme}://{netloc}/{bucket}"
    return f"{scheme}://{bucket}.{netloc.replace('-internal.aliyuncs.com', '.aliyuncs.com')}"


def _may_pass(error: Exception) -> bool:
    """Whether the same call may succeed soon: nothing came back, damage on the way, or the server's own trouble."""
    if isinstance(error, ServerError):
        return bool(error.status >= 500)
    return isinstance(error, RequestError | InconsistentError | OSError)


def _translated(verb: str, key: str, error: OssError | OSError) -> AppError:
    """The one place where failures of OSS become ours. oss2's texts quote signatures: they go no further."""
    if isinstance(error, ServerError) and error.status == 404 and error.code != "NoSuchBucket":
        return ObjectNotFound()
    facts = _facts(error)
    log.error("oss_failed", verb=verb, key=key, **facts)
    return StorageError(_ADVICE_BY_CODE.get(facts["code"]) or (_UNREACHABLE if _may_pass(error) else _REFUSED))


def _facts(error: OssError | OSError) -> dict[str, Any]:
    """What a log line says of a failure; for a broken connection the code is the name of its exception."""
    if not isinstance(error, ServerError):
        return {"code": type(getattr(error, "exception", error)).__name__}
    return {"code": error.code or None, "status": error.status, "request_id": error.request_id}
