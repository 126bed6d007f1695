"""Where audio is kept: six verbs, the same for OSS and for local files.

Every backend raises ObjectNotFound for an absent object and StorageError for everything else that fails.
"""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import BinaryIO, ClassVar, Protocol

from app.settings import Settings
from app.storage.keys import WORK_FOLDER, is_private
from app.storage.local import LocalStorage

__all__ = ["WORK_FOLDER", "LocalStorage", "Storage", "create_storage", "is_private"]


class Storage(Protocol):
    """A place for objects that are written once, under keys that satisfy `keys.is_key`."""

    fetchable: ClassVar[bool]
    """Whether others than our clients, such as the provider, can fetch what `url()` names."""

    async def put(self, key: str, source: BinaryIO, *, content_type: str) -> None:
        """Store a seekable file from position 0 to its end, visible whole or not at all; a private one to nobody.

        Putting twice is harmless. Once this returns or raises, also by cancellation, the source is the
        caller's again. Raises StorageError, and ValueError for an impossible key.
        """

    def url(self, key: str) -> str:
        """Give the address where a client plays the object, computed without asking the store.

        That of a private object ends soon, and leads nowhere where objects are not fetchable. Raises ValueError for
        an impossible key.
        """

    def key_of(self, url: str) -> str | None:
        """Give the key of an object that this URL is an address of; None for every other URL."""

    def open(self, key: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Open an object as a stream of chunks: `async with storage.open(key) as chunks`.

        Raises ObjectNotFound on entering, and StorageError on entering or while reading.
        """

    async def delete(self, key: str) -> None:
        """Remove an object; an absent one is fine. Raises StorageError, and ValueError for an impossible key."""

    async def close(self) -> None:
        """Give back connections. Nothing may be called afterwards."""


def create_storage(settings: Settings) -> Storage:
    """Build the backend that the settings name.

    Loading the OSS client takes about 0.3 s: call this in a thread, or before serving.
    Raises ValueError when the OSS settings are incomplete or malformed.
    """
    if settings.storage != "oss":
        return LocalStorage(settings.data_dir / "media", settings.public_base_url)

    from app.storage.oss import OssStorage  # here, so that local storage does not pay for loading oss2

    key_id, key_secret = settings.oss_access_key_id, settings.oss_access_key_secret
    if not (settings.oss_endpoint and settings.oss_region and settings.oss_bucket and key_id and key_secret):
        raise ValueError("STORAGE=oss needs an endpoint, a region, a bucket and an access key")
    return OssStorage(
        endpoint=settings.oss_endpoint,
        region=settings.oss_region,
        bucket=settings.oss_bucket,
        access_key_id=key_id.get_secret_value(),
        access_key_secret=key_secret.get_secret_value(),
        public_base_url=settings.oss_public_base_url,
        signed_urls=settings.oss_url_mode == "signed",
    )
