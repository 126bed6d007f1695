"""A folder of this machine for objects that the store has not taken yet. All of it blocks: to be called in threads.

An object is held for as long as it has a label: a small file beside its content, which tells its key and its content
type. The processes of a machine share the folder: what they change, they change under a lock, and one at a time brings
objects to the store. Whatever a crash left behind without a label is removed.
"""

import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from app.storage.room import free_bytes, storage_full

CHUNK_BYTES = 256 * 1024
# How long content stays without its label, for those who have found its file and are about to open it.
LINGER_SECONDS = 10.0
# The part of the room that new speech may not count on: what is being spoken when the room ends still finds some.
RESERVED_BYTES = 32 * 1024 * 1024
RESERVED_SHARE = 16

_LABEL = ".json"
_DRAFT = "draft-"
_CHANGING = ".changing"
_UPLOADING = ".uploading"


@dataclass(frozen=True, slots=True)
class HeldFile:
    """A held object as the folder lists it; `since` is a moment of the machine's clock."""

    name: str
    size: int
    since: float


@dataclass(frozen=True, slots=True)
class HeldObject:
    """A held object that is open; the caller closes its content."""

    name: str
    key: str
    content_type: str
    content: BinaryIO


class HeldFolder:
    """Holds objects durably, up to a number of bytes."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._counting = threading.Lock()
        self._listed_bytes = 0
        self._written_bytes = 0
        self._litter: set[str] = set()
        self._refuses = False

    def has_room_for(self, size: int) -> bool:
        """Whether so many bytes more may be counted on, as far as is known; cheap enough for the event loop."""
        if self._refuses:
            return False
        reserved = min(RESERVED_BYTES, self._max_bytes // RESERVED_SHARE)
        try:
            has_disk = free_bytes(self._folder) > size
        except OSError:
            return False
        return has_disk and self._listed_bytes + self._written_bytes + reserved + size < self._max_bytes

    def holds(self, key: str) -> bool:
        """Whether an object is held; a single look at the disk, cheap enough for the event loop."""
        return os.path.exists(f"{self._folder}/{_name(key)}{_LABEL}")  # pathlib takes three times as long

    def path(self, key: str) -> Path | None:
        """The file of a held object; it stays for some seconds after it is held no more."""
        return self._folder / _name(key) if self.holds(key) else None

    def write(self, key: str, source: BinaryIO, content_type: str) -> None:
        """Hold an object, in place of another version of it. Raises StorageFull, or OSError if the disk fails."""
        size = source.seek(0, os.SEEK_END)
        try:
            with self._reserved(size):
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                with self._draft() as draft:
                    source.seek(0)
                    shutil.copyfileobj(source, draft, CHUNK_BYTES)
                    draft.flush()
                    os.fsync(draft.fileno())
                    with self._changing():
                        self._publish(Path(draft.name), _name(key), {"key": key, "content_type": content_type})
        except OSError:
            self._refuses = True
            raise
        self._refuses = False

    def files(self) -> list[HeldFile]:
        """Everything that is held, the oldest first, whichever process held it."""
        labels: set[str] = set()
        drafts: set[str] = set()
        contents: dict[str, os.stat_result] = {}
        with suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.endswith(_LABEL):
                    labels.add(entry.name.removesuffix(_LABEL))
                elif entry.name.startswith(_DRAFT):
                    drafts.add(entry.name)
                elif not entry.name.startswith("."):
                    with suppress(FileNotFoundError):
                        contents[entry.name] = entry.stat()
        held = [HeldFile(name, contents[name].st_size, contents[name].st_mtime) for name in labels & contents.keys()]
        with self._counting:
            self._listed_bytes = sum(each.size for each in held)
        self._litter = drafts | (contents.keys() - labels) | {f"{name}{_LABEL}" for name in labels - contents.keys()}
        return sorted(held, key=lambda each: each.since)

    def tidy(self) -> None:
        """Remove what the last listing found that nobody holds or writes; see whether a disk that refused still does.

        Raises OSError when it does.
        """
        if self._litter:
            with self._changing():
                for path in [self._folder / name for name in self._litter]:
                    with suppress(FileNotFoundError):
                        if self._is_litter(path):
                            path.unlink()
        if self._refuses:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._draft():
                self._refuses = False

    def take_turn(self) -> ExitStack | None:
        """The right to bring objects to the store, until it is closed; None while another process has it."""
        lock = self._open_lock(_UPLOADING)
        turn = ExitStack()
        turn.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            turn.close()
            return None
        return turn

    def take(self, name: str) -> HeldObject | None:
        """Open a held object to bring it to the store; None when it is held no more. Raises OSError or ValueError."""
        with self._changing():
            try:
                label = json.loads(self._label(name).read_bytes())
                content = (self._folder / name).open("rb")
            except FileNotFoundError:
                return None
        return HeldObject(name, label["key"], label["content_type"], content)

    def release(self, held: HeldObject) -> bool:
        """Hold an object no more, since the store has it; another version that came meanwhile stays.

        False when somebody removed it meanwhile, so that the store is not to have it either.
        """
        with self._changing():
            label, content = self._label(held.name), self._folder / held.name
            if not label.exists():
                return False
            brought = os.fstat(held.content.fileno())
            if not os.path.samestat(brought, content.stat()):
                return True
            os.utime(content)  # it lingers from now on
            label.unlink()
            self._sync()
        with self._counting:
            self._listed_bytes = max(0, self._listed_bytes - brought.st_size)
        return True

    def remove(self, key: str) -> None:
        """Hold an object no more, whatever it is; one that is not held is fine."""
        if self.holds(key):
            with self._changing():
                self._label(_name(key)).unlink(missing_ok=True)
                (self._folder / _name(key)).unlink(missing_ok=True)
                self._sync()

    def _label(self, name: str) -> Path:
        return self._folder / f"{name}{_LABEL}"

    @contextmanager
    def _reserved(self, size: int) -> Iterator[None]:
        """Count bytes as held while they are written, and until the next listing when they were."""
        with self._counting:
            left = self._max_bytes - self._listed_bytes - self._written_bytes
            if size > min(left, free_bytes(self._folder)):
                raise storage_full()
            self._written_bytes += size
        try:
            yield
            with self._counting:
                self._listed_bytes += size
        finally:
            with self._counting:
                self._written_bytes -= size

    @contextmanager
    def _draft(self) -> Iterator[BinaryIO]:
        """A file to write in, locked for as long as it is written, so that others can tell it from litter."""
        with self._changing():
            draft = self._draft_file()
        try:
            with draft:
                yield draft
        finally:
            Path(draft.name).unlink(missing_ok=True)

    def _draft_file(self) -> BinaryIO:
        draft = (self._folder / f"{_DRAFT}{uuid.uuid4().hex}").open("xb")
        fcntl.flock(draft, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return draft

    def _publish(self, draft: Path, name: str, label: dict[str, str]) -> None:
        with self._draft_file() as written:
            try:
                written.write(json.dumps(label).encode())
                written.flush()
                os.fsync(written.fileno())
                draft.replace(self._folder / name)
                Path(written.name).replace(self._label(name))
            finally:
                Path(written.name).unlink(missing_ok=True)
        self._sync()

    def _is_litter(self, path: Path) -> bool:
        if path.name.startswith(_DRAFT):
            with path.open("rb") as draft:
                try:
                    fcntl.flock(draft, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
            return True
        if path.name.endswith(_LABEL):
            return not path.with_name(path.name.removesuffix(_LABEL)).exists()
        return not self._label(path.name).exists() and time.time() - path.stat().st_mtime > LINGER_SECONDS

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Nobody else changes the folder inside the block, of no process."""
        lock = self._open_lock(_CHANGING)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _open_lock(self, name: str) -> int:
        return os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _sync(self) -> None:
        """Make what was renamed and removed survive a power cut."""
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _name(key: str) -> str:
    """The name of a key's file: of one length, and without a way out of the folder."""
    return hashlib.sha256(key.encode()).hexdigest()
