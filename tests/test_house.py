"""The rules of the house, kept by machine."""

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import requires
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from secrets import token_bytes, token_hex, token_urlsafe
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import ValidationError

from app.settings import Settings, is_easy_to_guess, load_secrets, read_or_create_secret
from tests.servers import PROJECT

TOP_LEVEL = {
    ".ci",
    ".env.example",
    ".gitignore",
    "Dockerfile",
    "README.md",
    "alembic",
    "alembic.ini",
    "app",
    "compose.yaml",
    "pyproject.toml",
    "requirements.lock",
    "tests",
}
LONGEST_FILE = 400
DRAWERS = {"utils", "util", "helpers", "helper", "common", "base", "manager", "managers", "misc", "shared"}
SOURCES = sorted((PROJECT / "app").rglob("*.py"))
GENERATED_SECRET = "Zq3vN8rT1kXw6LpY0sHd4JmB7cFgUe2AoViR9tKbQxS"

# oss2 asks for crcmod; crcmod-plus brings the same module as a compiled wheel.
REPLACED = {"crcmod"}
BENCH_LOCK = "tests/bench/requirements.lock"


def names(paths: list[Path]) -> list[str]:
    """Paths as they are written in the project."""
    return [str(path.relative_to(PROJECT)) for path in paths]


# ---- Files


def test_imports_keep_their_contracts() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    checked = subprocess.run([linter, "--no-cache"], cwd=PROJECT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_only_the_database_commits() -> None:
    def commits(tree: ast.AST) -> bool:
        return any(isinstance(node, ast.Attribute) and node.attr in {"commit", "begin"} for node in ast.walk(tree))

    committing = names([file for file in SOURCES if commits(ast.parse(file.read_text()))])
    assert committing == ["app/database.py", "app/sqlite.py"]  # the latter is the driver


def test_no_file_is_longer_than_a_room() -> None:
    assert names([file for file in SOURCES if file.read_text().count("\n") > LONGEST_FILE]) == []


def test_nothing_is_named_like_a_drawer() -> None:
    assert names([file for file in SOURCES if DRAWERS & set(file.with_suffix("").parts[-2:])]) == []


def test_the_top_level_holds_what_it_should_and_nothing_else() -> None:
    if shutil.which("git") is None or not (PROJECT / ".git").exists():
        pytest.skip("not a git clone")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} <= TOP_LEVEL


# ---- Locked packages


def locked(file: str) -> dict[str, set[str]]:
    """The versions in a lock by name; more than one where Python versions or platforms differ."""
    versions: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9._-]+)==([^\s;]+)", (PROJECT / file).read_text(), re.MULTILINE):
        versions.setdefault(name, set()).add(version)
    return versions


def asked_for() -> dict[str, list[Requirement]]:
    """What pyproject.toml wants in each lock: of the product, of tests and checks on top, of the benchmark on top."""
    project: dict[str, Any] = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    wanted = {
        "requirements.lock": project["dependencies"],
        "tests/requirements.lock": [line for name, lines in extras.items() if name != "bench" for line in lines],
        BENCH_LOCK: extras["bench"],
    }
    return {file: [Requirement(line) for line in lines] for file, lines in wanted.items()}


def closure(wanted: list[Requirement]) -> Iterator[str]:
    """Everything that these need on this platform, as the installed packages tell it."""
    queue = [(canonicalize_name(each.name), frozenset(each.extras)) for each in wanted]
    seen = set(queue)
    for name, extras in queue:
        if name in REPLACED:
            continue
        yield name
        for line in requires(name) or []:
            need = Requirement(line)
            if need.marker and not any(need.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                continue
            found = (canonicalize_name(need.name), frozenset(need.extras))
            if found not in seen:
                seen.add(found)
                queue.append(found)


def test_locks_hold_the_versions_that_pyproject_asks_for() -> None:
    for file, wanted in asked_for().items():
        versions = locked(file)
        for each in wanted:
            found = versions.get(canonicalize_name(each.name), set())
            assert found, f"{each.name} is missing in {file}: run .ci/lock"
            assert all(each.specifier.contains(version) for version in found), f"{each}: run .ci/lock"


def test_locks_hold_everything_that_is_needed_and_crcmod_is_not() -> None:
    product, extras, _ = asked_for().values()
    runtime, development = locked("requirements.lock"), locked("tests/requirements.lock")
    assert set(closure(product)) <= runtime.keys()
    assert set(closure([*product, *extras])) <= runtime.keys() | development.keys()
    assert not runtime.keys() & development.keys()
    assert not REPLACED & (runtime.keys() | development.keys())


def test_the_lock_of_the_benchmark_holds_what_no_other_does() -> None:
    others = locked("requirements.lock").keys() | locked("tests/requirements.lock").keys()
    assert not locked(BENCH_LOCK).keys() & (others | REPLACED)


def test_the_lock_of_the_benchmark_holds_everything_that_it_needs() -> None:
    wanted = asked_for()
    names = {canonicalize_name(each.name) for each in wanted[BENCH_LOCK]}
    if not all(find_spec(name) for name in names):
        pytest.skip("the benchmark's packages are not installed")
    held = set[str]().union(*(locked(file) for file in wanted))
    assert set(closure([each for lines in wanted.values() for each in lines])) <= held


def test_locks_name_no_host_and_no_folder() -> None:
    for file in asked_for():
        text = (PROJECT / file).read_text()
        assert not re.search(r"://|^--|@ ", text, re.MULTILINE)


def test_checksums_are_compiled() -> None:
    import crcmod

    assert crcmod.crcmod._usingExtension


# ---- Settings


@pytest.fixture
def no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to start in, and not one setting in the environment."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


EXAMPLE = (PROJECT / ".env.example").read_text()


def test_env_example_explains_every_setting_once_and_nothing_else() -> None:
    shown = re.findall(r"^(?:# )?([A-Z_]+)=", EXAMPLE, re.MULTILINE)
    assert sorted(shown) == sorted(name.upper() for name in Settings.model_fields)


def test_env_example_changes_nothing_as_shipped(no_environment: Path) -> None:
    without = Settings()
    (no_environment / ".env").write_text(EXAMPLE)
    assert Settings() == without
    assert Settings().model_fields_set == without.model_fields_set


def test_env_example_shows_the_real_defaults(no_environment: Path) -> None:
    without = Settings()
    (no_environment / ".env").write_text(re.sub(r"^# ([A-Z_]+=)", r"\1", EXAMPLE, flags=re.MULTILINE))
    assert Settings() == without


SAFE: dict[str, Any] = {
    "environment": "production",
    "jwt_secret": GENERATED_SECRET,
    "credential_keys": GENERATED_SECRET,
    "cors_origins": "https://voice.example.com",
}


@pytest.mark.usefixtures("no_environment")
def test_production_starts_with_safe_settings() -> None:
    settings = Settings(**SAFE)
    assert settings.allowed_origins == ["https://voice.example.com"]
    assert settings.registration_limit == "20/hour"


@pytest.mark.usefixtures("no_environment")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"jwt_secret": None}, "JWT_SECRET"),
        ({"credential_keys": None}, "CREDENTIAL_KEYS"),
        ({"cors_origins": "*"}, "CORS_ORIGINS"),
        ({"cors_origins": "https://voice.example.com, *"}, "CORS_ORIGINS"),
        ({"workers": 2}, "DATABASE_URL"),
        ({"storage": "oss", "oss_bucket": "bucket"}, "OSS_ENDPOINT"),
    ],
)
def test_production_refuses_unsafe_settings(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Settings(**{**SAFE, **change})


WEAK = [
    "x" * 43,
    "12345678901234567890123456789012",
    "abcdefghijklmnopqrstuvwxyz123456",
    "dev-secret-do-not-use-in-production!",
    "passwordpassword1234567890123456",
    "supersecretsupersecretsupersecret123",
    "jwt_secret_jwt_secret_jwt_secret_123",
    "qwertyuiopasdfghjklzxcvbnm1234567890",
    "please-change-me-0123456789-abcdefgh",
    "your-secret-key-here-0123456789abcdef",
    "$(openssl rand -base64 48) of the README",
    "09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7",
    "the quick brown fox jumps over the lazy dog",
    "my-jwt-secret-key-for-ai-voice-backend-2026",
]


@pytest.mark.usefixtures("no_environment")
@pytest.mark.parametrize("secret", WEAK)
def test_production_refuses_secrets_that_somebody_would_try(secret: str) -> None:
    for name in ("jwt_secret", "credential_keys"):
        for given in (secret, f"{GENERATED_SECRET},{secret}"):
            with pytest.raises(ValidationError, match=f"{name.upper()} is easy to guess") as refusal:
                Settings(**{**SAFE, name: given})
            assert secret not in str(refusal.value)


@pytest.mark.usefixtures("no_environment")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("redis_url", "redis://:hunter2pw/x@host:6379/0"),
        ("redis_url", "http://:hunter2pw@host"),
        ("database_url", "postgresql+asyncpg://u:@x:hunter2pw@host/x"),
        ("database_url", "postgresql+asyncpg://u:ab@hunter2pw@host/x"),
        ("oss_endpoint", "https://u:hunter2pw/x@host"),
        ("public_base_url", "ftp://u:hunter2pw@host"),
        ("otel_exporter_otlp_endpoint", "https://u:hunter2pw/x@host"),
    ],
)
def test_an_address_that_cannot_be_is_refused_without_its_password(name: str, value: str) -> None:
    given: dict[str, Any] = {name: value}
    with pytest.raises(ValidationError) as refusal:
        Settings(**given)
    assert "hunter2pw" not in str(refusal.value)


def test_no_random_secret_is_taken_for_a_weak_one() -> None:
    makers = (token_urlsafe, token_hex, lambda size: b64encode(token_bytes(size)).decode())
    assert not any(is_easy_to_guess(make(size)) for make in makers for size in (32, 48) for _ in range(500))


@pytest.mark.usefixtures("no_environment")
def test_production_opens_to_no_browser_unless_told() -> None:
    assert Settings(**{**SAFE, "cors_origins": None}).allowed_origins == []


@pytest.mark.parametrize(("name", "value"), [("jwt_secret", "short"), ("credential_keys", f"{GENERATED_SECRET},short")])
def test_short_secrets_are_refused(no_environment: Path, name: str, value: str) -> None:
    settings: dict[str, Any] = {"data_dir": no_environment, name: value}
    with pytest.raises(ValueError, match="at least 32"):
        load_secrets(Settings(**settings))


@pytest.mark.usefixtures("no_environment")
def test_secrets_stay_out_of_what_is_printed() -> None:
    settings = Settings(**SAFE)
    assert GENERATED_SECRET not in f"{settings!r}{settings.model_dump_json()}"
    assert GENERATED_SECRET not in repr(load_secrets(settings))


def test_generated_secrets_are_the_owners_alone(no_environment: Path) -> None:
    load_secrets(Settings(data_dir=no_environment / "data"))
    made = sorted((no_environment / "data").iterdir())
    assert [file.name for file in made] == ["credential_keys", "jwt_secret"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in made} == {0o600}


def test_processes_that_start_together_agree_on_a_secret(tmp_path: Path) -> None:
    files = [tmp_path / "data" / f"secret-{number}" for number in range(20)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        first = processes.map(read_or_create_secret, files)
        second = processes.map(read_or_create_secret, files)
        assert list(first) == list(second)
    assert sorted((tmp_path / "data").iterdir()) == sorted(files)


def test_importing_the_application_reads_no_settings(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT), "WORKERS": "none", "TIMEZONE": "nowhere"}
    imported = subprocess.run(
        [sys.executable, "-c", "import app.main"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert imported.returncode == 0, imported.stderr
    assert list(tmp_path.iterdir()) == []
