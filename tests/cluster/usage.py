"""What processes have used, as the kernel counts it."""

import os
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_MEGABYTE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Usage:
    """Seconds of processor, and megabytes of memory at most."""

    cpu_seconds: float = 0.0
    memory_mb: float = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.cpu_seconds + other.cpu_seconds, max(self.memory_mb, other.memory_mb))

    def beside(self, other: "Usage") -> "Usage":
        """That of two processes that live at the same time."""
        return Usage(self.cpu_seconds + other.cpu_seconds, self.memory_mb + other.memory_mb)


def usage_of(pid: int) -> Usage:
    """What one process has used so far; nothing once it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return Usage()
    peaks = [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")]
    return Usage((int(fields[11]) + int(fields[12])) / _TICKS, sum(peaks) / _MEGABYTE)


def usage_of_all(pids: list[int]) -> Usage:
    """What several processes have used together."""
    total = Usage()
    for pid in pids:
        total = total.beside(usage_of(pid))
    return total


def children_of(pid: int) -> list[int]:
    """The processes that one has started."""
    return [child for child, fields in _processes() if fields.rpartition(")")[2].split()[1] == str(pid)]


def serving_database(name: str) -> list[int]:
    """PostgreSQL's processes that serve a database."""
    found = []
    for pid, _ in _processes():
        try:
            title = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if title.startswith("postgres:") and f" {name} " in title:
            found.append(pid)
    return found


def _processes() -> list[tuple[int, str]]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                found.append((int(folder.name), (folder / "stat").read_text()))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found
