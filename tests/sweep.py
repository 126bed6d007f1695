"""The sweep after a run: of all that it has written, nothing tells a key, a token or a password.

Everything below the run's temporary folder is searched, byte by byte: logs, databases with what SQLite keeps beside
them, audio, what is held, drafts; and what PostgreSQL databases held when they were dropped.
"""

import ast
import errno
import mmap
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, product
from pathlib import Path
from typing import Any, Protocol

import pytest

TESTS = Path(__file__).resolve().parent
SHOWN = 20
SHORTEST_SECRET = 8

# Each begins with bytes that are looked for first, or it would take ten times as long.
PATTERNS = {
    "API key": re.compile(rb"sk-(?<![a-z]sk-)(?:test|bad|real)(?![a-z])[\w-]*"),
    "token": re.compile(rb"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{16,}"),
    "Bearer": re.compile(rb"earer\s+[\w.~+/-]{8,}"),
    "BEARER": re.compile(rb"EARER\s+[\w.~+/-]{8,}"),
    "invite code": re.compile(rb"invite-[\w-]{16,}"),
}
# Made by the product itself, each in a file of that name: no other may have its content.
GENERATED = ("jwt_secret", "credential_keys", "demo_password")
# What may hold a secret of a test: these, their drafts (`.jwt_secret.0123456789abcdef`), and settings of a test.
HOLDERS = re.compile(rf"(?:{'|'.join(GENERATED)})|\.(?:{'|'.join(GENERATED)})\.[0-9a-f]{{16}}|\.env")
# Logs, and the text of dropped databases: of many servers.
SHARED = {".log", ".xml"}
# Constants of the tests that nothing may write down.
ASSIGNED = re.compile(rb"^\w*(?:PASSWORD|SECRET|KEY)S?\b", re.MULTILINE)  # to parse all tests takes seconds
SECRET_NAMES = re.compile(r"(?:.*_)?PASSWORDS?|.*_SECRETS?|(?:.*_)?(?:CREDENTIAL|SEALING|TOKEN)_KEYS?")


Sought = tuple[str, re.Pattern[bytes]]
Generated = dict[Path, list[Sought]]


@dataclass(frozen=True, order=True)
class Finding:
    """Where something lies that should not, and what; never the thing itself."""

    file: str
    offset: int
    kind: str


@dataclass
class Swept:
    """What was searched, and what was found."""

    files: int = 0
    size_bytes: int = 0
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    def __str__(self) -> str:
        outcome = f"{len(self.findings)} SECRETS FOUND" if self.findings else "nothing found"
        return f"swept {self.files} files, {self.size_bytes / 1e6:.0f} MB in {self.seconds:.1f} s: {outcome}"


def sweep(base: Path) -> Swept:
    """Search every file below a folder. What cannot be read is a finding, too."""
    started = time.perf_counter()
    swept = Swept()
    files = [file for file in sorted(base.rglob("*")) if file.is_file() and not file.is_symlink()]
    generated = _generated(base, files)
    for file in files:
        swept.files += 1
        try:
            size = file.stat().st_size
            if size:
                sought = _sought(base, file, generated)
                with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    written = list(_written(stream.fileno(), size))
                    swept.size_bytes += sum(end - start for start, end in written)
                    for (kind, pattern), (start, end) in product(sought, written):
                        found = [match.start() for match in pattern.finditer(content, start, end)]
                        swept.findings += [Finding(str(file.relative_to(base)), offset, kind) for offset in found]
        except OSError as error:
            swept.findings.append(Finding(str(file.relative_to(base)), 0, f"not read: {type(error).__name__}"))
    swept.seconds = time.perf_counter() - started
    return swept


def _written(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a file holds what somebody wrote: between these there are holes, gigabytes in some."""
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            raise
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end


def _generated(base: Path, files: Iterable[Path]) -> Generated:
    """By test, the secrets that the servers of it have made."""
    found: Generated = {}
    for file in files:
        if file.name in GENERATED:
            kind = f"content of {file.relative_to(base)}"
            secrets = [part for part in file.read_bytes().strip().split(b",") if len(part) >= SHORTEST_SECRET]
            found.setdefault(_room(base, file), []).extend((kind, re.compile(re.escape(each))) for each in secrets)
    return found


def _sought(base: Path, file: Path, generated: Generated) -> Iterator[Sought]:
    """What a file is searched for: the secrets of servers in all that is their test's, and in what tests share."""
    yield from PATTERNS.items()
    if HOLDERS.fullmatch(file.name):
        return
    yield from _constants()
    rooms = generated.values() if file.suffix in SHARED else [generated.get(_room(base, file), [])]
    yield from chain.from_iterable(rooms)


def _room(base: Path, file: Path) -> Path:
    """The folder of the test, or of the fixture, that a file belongs to."""
    parts = file.relative_to(base).parts
    return Path(*parts[: 2 if parts[0].startswith("popen-") else 1])


@cache
def _constants() -> tuple[Sought, ...]:
    """The secrets that stand in the tests themselves, by their names."""
    found: dict[str, str] = {}
    for file in sorted(TESTS.rglob("*.py")):
        source = file.read_bytes()
        statements = ast.parse(source).body if ASSIGNED.search(source) else []
        for statement in statements:
            if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
                continue
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            name = next((each.id for each in targets if isinstance(each, ast.Name)), "")
            if SECRET_NAMES.fullmatch(name):
                values = (node.value for node in ast.walk(statement.value) if isinstance(node, ast.Constant))
                for value in values:
                    if isinstance(value, str) and len(value) >= SHORTEST_SECRET:
                        found.setdefault(value, f"{name} of {file.relative_to(TESTS)}")
    return tuple((kind, re.compile(re.escape(secret.encode()))) for secret, kind in found.items())


class Dropping(Protocol):
    """What drops databases, and leaves their text in a folder if it is given one."""

    dumps: Path | None


class Sweep:
    """The plugin: sweeps when all workers have ended, and lets the run fail for what it finds."""

    def __init__(self, config: Any, databases: Dropping) -> None:
        self._config = config
        self._databases = databases
        self._swept: Swept | None = None

    @property
    def _folder(self) -> Path:
        folder: Path = self._config._tmp_path_factory.getbasetemp()
        return folder

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Search what the run has written."""
        if hasattr(self._config, "workerinput"):
            return
        self._swept = sweep(self._folder)
        if self._swept.findings:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_sessionstart(self) -> None:
        """Have databases dropped only after their text is where it will be searched."""
        self._databases.dumps = self._folder / "dropped"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Tell what was found."""
        if self._swept is None:
            return
        terminalreporter.write_line(str(self._swept), red=bool(self._swept.findings))
        for finding in sorted(self._swept.findings)[:SHOWN]:
            terminalreporter.write_line(f"{finding.file} at byte {finding.offset}: {finding.kind}", red=True)
