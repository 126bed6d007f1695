"""Folders of this machine: the data folder, local audio, and audio that waits for the store. All of it blocks."""

import os
import shutil
import tempfile
import time
from pathlib import Path

from app.doctor.case import Case
from app.doctor.finding import Finding, fail, ok, warn
from app.storage.held import HeldFolder
from app.storage.room import MIN_FREE_BYTES

LOW_BYTES = 1024**3
GIGABYTE = 1024**3
MEGABYTE = 1024**2
_GIVE = "Give the folder to the user that serves (chown), or set DATA_DIR to another."


def examine_data_folder(case: Case) -> list[Finding]:
    """Whether the data folder can be made, written and filled; nothing is left in it."""
    return [examine_folder("data folder", case.settings.data_dir)]


def examine_folder(check: str, folder: Path) -> Finding:
    """Whether a folder takes files, or could be made where it is not there yet."""
    place = folder.absolute()
    existing = next(each for each in (place, *place.parents) if each.exists())
    if not existing.is_dir():
        return fail(check, f"{existing} is a file, not a folder", "Set DATA_DIR to a folder.")
    if existing != place and not os.access(existing, os.W_OK | os.X_OK):
        return fail(check, f"{folder} is not there and cannot be made in {existing}", _GIVE)
    if existing == place:
        try:
            with tempfile.TemporaryFile(dir=place) as probe:
                probe.write(b"doctor")
                probe.flush()
        except OSError as error:
            return fail(check, f"nothing can be written to {folder} ({error.strerror})", _GIVE)
    free = shutil.disk_usage(existing).free
    found = f"{folder} {'is writable' if existing == place else 'will be made'}, {free / GIGABYTE:.1f} GB free"
    if free <= MIN_FREE_BYTES:
        return fail(check, found, "Make room on this disk: new speech is refused while it is full.")
    if free < LOW_BYTES:
        return warn(check, found, "Make room on this disk soon: speech is refused once it is full.")
    return ok(check, found)


def examine_held_audio(case: Case) -> list[Finding]:
    """Audio that was paid for and is not in OSS yet."""
    settings = case.settings
    files = HeldFolder(settings.data_dir / "held", settings.held_audio_max_mb * MEGABYTE).files()
    if not files:
        return [ok("held audio", "nothing waits to be uploaded")] if settings.storage == "oss" else []
    size, age = sum(each.size for each in files), max(0.0, time.time() - files[0].since)
    found = f"{len(files)} files, {size / MEGABYTE:.1f} MB, wait for OSS, the oldest for {age / 60:.0f} min"
    if settings.storage != "oss":
        advice = "Set the OSS_ settings again and start once, so that they are uploaded."
        return [warn("held audio", f"{found}, but STORAGE is local", advice)]
    return [warn("held audio", found, "They are uploaded by `serve` once OSS takes them: see the storage check.")]
