"""Room on this machine's disk."""

import shutil
from pathlib import Path

from app.errors import StorageFull

# Never filled by us: the database or the logs may be on the same disk.
MIN_FREE_BYTES = 32 * 1024 * 1024
RETRY_SECONDS = 30


def free_bytes(folder: Path) -> int:
    """How much this disk takes beyond what is left free: of a folder, or of where it will be made. Raises OSError."""
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    return max(0, shutil.disk_usage(existing).free - MIN_FREE_BYTES)


def storage_full() -> StorageFull:
    """What callers are told while nothing could be kept."""
    return StorageFull(retry_after_seconds=RETRY_SECONDS)
