"""Keys of stored objects, such as `audio/tts/20251230/<uuid>.mp3`: the same rule for every backend."""

import re
from datetime import UTC, datetime
from urllib.parse import SplitResult, urlsplit

MAX_KEY_CHARS = 512
WORK_FOLDER = "audio/work/"
PRIVATE_FOLDERS = ("audio/voice/", WORK_FOLDER)

# Nothing here needs quoting in a URL, and no segment can be empty or a dot name of the file system.
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_OF_A_DAY = re.compile(r"audio/[a-z]+/(20\d{6})/")


def is_key(text: str) -> bool:
    """Whether the text may name an object: at most 512 characters, plain segments, no `..`."""
    return len(text) <= MAX_KEY_CHARS and ".." not in text and _KEY.fullmatch(text) is not None


def is_private(key: str) -> bool:
    """Whether an object is not for players: recorded voices and work in progress, wherever the rest is public."""
    return key.casefold().startswith(PRIVATE_FOLDERS)  # some file systems do not tell letters by case


def day_of(key: str) -> datetime | None:
    """The day that a key tells, as if it began in UTC; None for a key that tells none."""
    found = _OF_A_DAY.match(key)
    try:
        return datetime.strptime(found[1], "%Y%m%d").replace(tzinfo=UTC) if found else None
    except ValueError:
        return None


def key_under(base_url: str, url: str) -> str | None:
    """The key that a URL holds behind the base URL, whatever its query; None for a URL of anywhere else."""
    try:
        base, given = urlsplit(base_url), urlsplit(url)
        same_place = _place(base) == _place(given) and given.username is None and given.password is None
    except ValueError:
        return None
    key = given.path.removeprefix(f"{base.path}/")
    return key if same_place and key != given.path and is_key(key) else None


def _place(parts: SplitResult) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def work_key(record_id: int, number: int) -> str:
    """Where the samples of a segment lie: the same place for every try, so that none is forgotten."""
    return f"{WORK_FOLDER}{record_id}-{number}.pcm"


def check_key(key: str) -> None:
    """Raise ValueError when the key could not name an object: whoever made it has a bug."""
    if not is_key(key):
        raise ValueError(f"not a storage key: {key[:80]!r}")
