"""A start is quick and small: what it does not need is not loaded, and what it loads is not looked through again."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from alembic.script import ScriptDirectory

from app.database import alembic_config, head_revision
from tests.servers import NO_AUTHORITIES, PROJECT, START_SECONDS, free_port
from tests.skipping import skip_without

# Large, or slow to load; each has a user who comes later, in a thread, or never.
LATE = {
    "aiosqlite",
    "alembic",
    "asyncpg",
    "av",
    "mako",
    "numpy",
    "opentelemetry.exporter",
    "opentelemetry.sdk",
    "oss2",
    "passlib",
    "redis",
    "requests",
    "zxcvbn",
    "app.access",
    "app.demo",
    "app.doctor",
    "app.otlp",
    "app.sandbox",
    "app.storage.oss",
}
# What shows tracebacks in colours is loaded where it happens to be installed.
COLOURS = re.compile(r"(rich|pygments|markdown_it|mdurl)(\.|$)")
MOST_MODULES = 1150
MOST_MEGABYTES = 150
LEAST_KEPT_OBJECTS = 100_000

_START = """
import asyncio, gc, json, sys
from app.main import create_app

async def start():
    app = create_app()
    async with app.router.lifespan_context(app):
        return sorted(sys.modules), gc.get_freeze_count()

modules, kept = asyncio.run(start())
print(json.dumps({"modules": modules, "kept": kept}))
"""


def run(program: str, folder: Path) -> Any:
    """What a fresh interpreter prints as JSON at the end of a program, in an empty environment."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT)}
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def loaded_by(imports: str, folder: Path) -> set[str]:
    """The modules that are there after an import."""
    return set(run(f"import {imports}, json, sys; print(json.dumps(sorted(sys.modules)))", folder))


def test_importing_the_application_loads_little(tmp_path: Path) -> None:
    modules = loaded_by("app.main", tmp_path)
    assert not LATE & modules
    assert len([name for name in modules if not COLOURS.match(name)]) <= MOST_MODULES


def test_a_process_that_only_starts_others_loads_no_application(tmp_path: Path) -> None:
    modules = loaded_by("app.__main__, app.preparation, app.observability", tmp_path)
    assert not (LATE | {"fastapi", "httpx", "app.main", "app.routers", "app.services", "app.dashscope"}) & modules


def test_a_start_on_a_current_schema_loads_no_migrations_and_keeps_what_it_loads(tmp_path: Path) -> None:
    assert "alembic" in run(_START, tmp_path)["modules"]
    again = run(_START, tmp_path)
    assert (LATE - {"aiosqlite"}) & set(again["modules"]) == set()
    assert again["kept"] > LEAST_KEPT_OBJECTS


def test_the_revision_that_is_needed_is_told_by_the_names_of_the_migrations() -> None:
    assert head_revision() == ScriptDirectory.from_config(alembic_config("")).get_current_head()


@pytest.fixture
def fresh_server(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`serve` as an operator starts it: not forked from anything that has loaded more."""
    port = free_port()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "app", "serve", "--port", str(port)]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}/health/ready")
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    """Come back when the server says that it is ready."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=5, verify=NO_AUTHORITIES, trust_env=False).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    pytest.fail(f"the server is not ready; exit code {process.poll()}")


def test_an_idle_server_is_small_and_has_no_decoder(fresh_server: subprocess.Popen[bytes]) -> None:
    facts = Path(f"/proc/{fresh_server.pid}")
    if not facts.exists():
        skip_without("/proc")
    [kilobytes] = re.findall(r"^VmRSS:\s+(\d+) kB", (facts / "status").read_text(), re.MULTILINE)
    assert int(kilobytes) / 1024 <= MOST_MEGABYTES
    assert "libavcodec" not in (facts / "maps").read_text()
