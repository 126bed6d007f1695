"""Where audio is kept: in OSS, sheltered by this machine's disk, or in local files.

Every backend raises ObjectNotFound for an absent object and StorageError for everything else that fails.
"""

from pathlib import Path
from typing import BinaryIO, Protocol

from app.metrics import HeldAudio
from app.settings import Secrets, Settings
from app.storage.keys import day_of, is_key, is_private, work_key
from app.storage.links import MediaLinks
from app.storage.local import LocalStorage
from app.storage.store import Store

__all__ = ["LocalStorage", "Storage", "Store", "create_storage", "day_of", "is_key", "is_private", "work_key"]

MEGABYTE = 1024 * 1024


class Storage(Store, Protocol):
    """A store that what was paid for can be trusted to."""

    async def keep(self, key: str, source: BinaryIO, *, content_type: str) -> None:
        """Store what was paid for: like `put`, but what the store does not take now is held here and uploaded later.

        Raises StorageError when neither takes it, and ValueError for an impossible key.
        """

    def require_room(self, size: int = 0) -> None:
        """Raise StorageFull when it is known that so many bytes, if paid for now, could be kept nowhere."""

    async def check(self) -> None:
        """Find out whether what is paid for now can be kept. Raises StorageFull or StorageError when not."""

    def is_fetchable(self, key: str) -> bool:
        """Whether others than our clients, such as the provider, can fetch this object at its `url()` now."""

    def admits(self, key: str, query: str) -> bool:
        """Whether an address of the media route with this query may play the object through us."""

    def grants(self, url: str) -> bool:
        """Whether a URL is an address of the media route that lets whoever knows it play an object."""

    def path(self, key: str) -> Path:
        """Find the file of this machine that holds an object; it stays for some seconds at least.

        It touches the disk: call it in a thread. Raises ObjectNotFound when there is none.
        """

    def held(self) -> HeldAudio:
        """Count what the store has not taken yet. It touches the disk: call it in a thread."""

    async def run(self) -> None:
        """Until cancelled: bring to the store what is held. It may end by itself where nothing ever is."""


def create_storage(settings: Settings, secrets: Secrets) -> Storage:
    """Build the backend that the settings name; URLs of held audio are signed by a key of the secrets.

    Loading the OSS client takes about 0.3 s: call this in a thread, or before serving.
    Raises ValueError when the OSS settings are incomplete or malformed.
    """
    if settings.storage != "oss":
        return LocalStorage(settings.data_dir / "media", settings.public_base_url)

    from app.storage.oss import OssStorage  # here, so that local storage does not pay for loading oss2
    from app.storage.shelter import ShelteredStorage

    key_id, key_secret = settings.oss_access_key_id, settings.oss_access_key_secret
    if not (settings.oss_endpoint and settings.oss_region and settings.oss_bucket and key_id and key_secret):
        raise ValueError("STORAGE=oss needs an endpoint, a region, a bucket and an access key")
    is_signed = settings.oss_url_mode == "signed"
    oss = OssStorage(
        endpoint=settings.oss_endpoint,
        region=settings.oss_region,
        bucket=settings.oss_bucket,
        access_key_id=key_id.get_secret_value(),
        access_key_secret=key_secret.get_secret_value(),
        public_base_url=settings.oss_public_base_url,
        signed_urls=is_signed,
    )
    return ShelteredStorage(
        oss,
        settings.data_dir / "held",
        MediaLinks(settings.public_base_url, secrets.jwt_secrets if is_signed else ()),
        settings.held_audio_max_mb * MEGABYTE,
    )
