"""The sweep finds what it is for, and nothing else. What is planted here lies where it does not look."""

import os
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from app.security import TokenSigner
from tests.conftest import PASSWORD
from tests.faults import OSS_SECRET
from tests.servers import PROJECT
from tests.sweep import sweep

TOKEN = TokenSigner(("s" * 40,), 3600).issue(uuid.uuid4(), uuid.uuid4())
GENERATED = "Zx0-generated_" * 4


@pytest.fixture
def base() -> Iterator[Path]:
    """A folder of a run, apart from that of this run."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


def put(base: Path, name: str, text: str) -> None:
    """Write a file."""
    file = base / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("secret", "kind"),
    [
        ("sk-test-0123456789abcdef", "API key"),
        ("sk-bad-1", "API key"),
        (TOKEN, "token"),
        ("Authorization: Bearer abcdefgh", "Bearer"),
        ("AUTHORIZATION: BEARER abcdefgh", "BEARER"),
        ("invite-0123456789abcdef_-", "invite code"),
        (PASSWORD, "PASSWORD of conftest.py"),
        (OSS_SECRET, "OSS_SECRET of faults.py"),
    ],
)
@pytest.mark.parametrize("name", ["server.log", "popen-gw0/backend0/data/media/a.mp3", "popen-gw0/dropped/a.xml"])
def test_a_secret_is_found_wherever_it_lies_and_not_told(base: Path, name: str, secret: str, kind: str) -> None:
    put(base, name, f"\x00你好{secret}")
    swept = sweep(base)
    [found] = [(each.file, each.kind) for each in swept.findings]
    assert found == (name, kind)
    assert 7 <= swept.findings[0].offset <= 8 + len("Authorization: ")
    assert secret.split()[-1] not in f"{swept} {swept.findings}"
    assert "1 SECRETS FOUND" in str(swept)


def test_what_resembles_a_secret_is_none(base: Path) -> None:
    masks = "sk-****cdef task-started disk-test sk-testing eyJhbGciOiJIUzI1NiJ9 invite-code inviting"
    put(base, "server.log", f'{masks} {{"token_type": "bearer"}} correct horse battery')
    swept = sweep(base)
    assert (swept.findings, swept.files) == ([], 1)
    assert str(swept).startswith("swept 1 files, 0 MB in ")
    assert str(swept).endswith(": nothing found")


def test_a_database_is_searched_with_what_is_written_ahead(base: Path) -> None:
    with closing(sqlite3.connect(base / "app.db", isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE notes (note TEXT)")
        database.execute("INSERT INTO notes VALUES (?)", ("sk-test-written-ahead",))
        assert {each.file for each in sweep(base).findings} == {"app.db-wal"}
    assert {each.file for each in sweep(base).findings} == {"app.db"}


@pytest.mark.parametrize("name", ["jwt_secret", "credential_keys", "demo/demo_password"])
def test_what_a_server_made_is_in_its_own_file_only(base: Path, name: str) -> None:
    put(base, f"popen-gw0/backend0/data/{name}", GENERATED)
    put(base, f"popen-gw0/backend0/data/.{Path(name).name}.0123456789abcdef", GENERATED)
    put(base, "popen-gw0/backend0/data/app.db", "nothing")
    assert sweep(base).findings == []
    for other in ("popen-gw0/backend0/data/app.db", "popen-gw1/sandbox0/server.log"):
        put(base, other, f"x{GENERATED}x")
    [one, two] = sweep(base).findings
    assert (one.file, two.file) == ("popen-gw0/backend0/data/app.db", "popen-gw1/sandbox0/server.log")
    assert one.kind == two.kind == f"content of popen-gw0/backend0/data/{name}"


def test_each_of_several_keys_is_one_of_them(base: Path) -> None:
    put(base, "backend0/data/credential_keys", f"{GENERATED}1,{GENERATED}2")
    put(base, "dropped/test_0.xml", f"<key>{GENERATED}2</key>")
    assert [each.file for each in sweep(base).findings] == ["dropped/test_0.xml"]


def test_files_that_hold_secrets_of_tests_are_known_by_their_whole_names(base: Path) -> None:
    for name in ("data/jwt_secret", "data/credential_keys", ".env"):
        put(base, name, f"X={PASSWORD}")
    assert sweep(base).findings == []
    put(base, ".env", "X=sk-test-1")  # no test needs that
    for name in ("data/jwt_secret.bak", "my.env", "data/.jwt_secret.xyz"):
        put(base, name, f"X={PASSWORD}")
    assert {each.file for each in sweep(base).findings} == {
        *("data/jwt_secret.bak", "my.env", "data/.jwt_secret.xyz", ".env")
    }


LEAKING = """
def test_it(tmp_path):
    (tmp_path / "server.log").write_text("sk-" + "test-" + "0123456789")
"""
CONFTEST = """
from types import SimpleNamespace
from tests.sweep import Sweep

def pytest_configure(config):
    config.pluginmanager.register(Sweep(config, SimpleNamespace()))
"""


def test_a_run_that_leaks_fails(base: Path) -> None:
    put(base, "conftest.py", CONFTEST)
    put(base, "test_leaking.py", LEAKING)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "xdist",
        "-n",
        "1",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        "run",
    ]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=base, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert "1 SECRETS FOUND" in done.stdout
    assert "test_it0/server.log at byte 0: API key" in done.stdout
    assert "0123456789" not in done.stdout


def test_a_secret_behind_a_hole_is_found_and_the_hole_costs_nothing(base: Path) -> None:
    with (base / "long.wav").open("wb") as file:
        file.write(b"RIFF")
        file.truncate(2**34)
        file.seek(2**34 - 2**20)
        file.write(b"sk-test-0123456789abcdef")
        file.truncate(2**35)
    swept = sweep(base)
    assert [(each.offset, each.kind) for each in swept.findings] == [(2**34 - 2**20, "API key")]
    assert swept.size_bytes < 2**24
