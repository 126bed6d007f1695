"""`python -m app …` as a person runs it in a terminal."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.servers import PROJECT, free_port
from tests.sound import duration

END_SECONDS = 30


def environment(settings: Mapping[str, str] | None = None) -> dict[str, str]:
    """A shell's environment with these settings and no others."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {**kept, "PYTHONPATH": str(PROJECT), **(settings or {})}


def run_app(
    folder: Path, *arguments: str, settings: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a command that ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=folder,
        env=environment(settings),
        capture_output=True,
        text=True,
        timeout=END_SECONDS,
        start_new_session=True,
    )


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that somebody else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        yield port


class Demo:
    """A running demo, alone in its process group as under a terminal."""

    def __init__(self, folder: Path, port: int, sandbox_port: int) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "app", "demo", "--port", str(port), "--sandbox-port", str(sandbox_port)],
            cwd=folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.printed = ""

    def read_until(self, last_words: str) -> None:
        """Wait for the demo to print these words."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.printed += line
            if last_words in line:
                return
        pytest.fail(f"the demo ended early:\n{self.printed}")

    def press_ctrl_c(self) -> int:
        """Interrupt every process of the terminal, and give the demo's exit code."""
        os.killpg(self._process.pid, signal.SIGINT)
        return self.wait()

    def wait(self) -> int:
        """Wait for the demo to end, and give its exit code."""
        rest, _ = self._process.communicate(timeout=END_SECONDS)
        self.printed += rest
        return self._process.returncode

    def is_running(self) -> bool:
        """Whether any process of the demo still lives."""
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        """End whatever a failed test has left behind."""
        if self.is_running():
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


@contextmanager
def running_demo(folder: Path) -> Iterator[Demo]:
    """A demo that has spoken its first sentence."""
    demo = Demo(folder, free_port(), free_port())
    try:
        demo.read_until("Ctrl-C")
        yield demo
    finally:
        demo.kill()


def test_help_names_every_command(tmp_path: Path) -> None:
    shown = run_app(tmp_path, "--help")
    assert shown.returncode == 0
    for command in ("demo", "serve", "worker", "sandbox", "migrate", "doctor"):
        assert f"\n    {command} " in shown.stdout


@pytest.mark.parametrize("command", ["demo", "serve", "worker", "sandbox", "migrate", "doctor"])
def test_every_command_has_help(tmp_path: Path, command: str) -> None:
    shown = run_app(tmp_path, command, "--help")
    assert shown.returncode == 0
    for option in ("--host", "--port"):
        assert (option in shown.stdout) is (command not in {"migrate", "doctor"})


def test_no_command_shows_what_there_is(tmp_path: Path) -> None:
    shown = run_app(tmp_path)
    assert shown.returncode == 2
    assert "usage: python -m app" in shown.stderr


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"UPSTREAM_TIMEOUT": "-1"}, "UPSTREAM_TIMEOUT"),
        ({"TIMEZONE": "Nowhere/Nothing"}, "TIMEZONE"),
        ({"STORAGE": "oss"}, "OSS_BUCKET"),
        ({"ENVIRONMENT": "production"}, "CREDENTIAL_KEYS"),
        ({"JWT_SECRET": "short"}, "JWT_SECRET"),
        ({"DATABASE_URL": "mysql://user:secret@localhost/name"}, "DATABASE_URL"),
        ({"RATE_LIMIT": "often"}, "RATE_LIMIT"),
        ({"PRICES_FILE": "missing.json"}, "missing.json"),
        ({"DATABASE_URL": "postgresql+asyncpg://root@127.0.0.1:1/x"}, "/x cannot be used: ConnectionRefusedError"),
        ({"DATA_DIR": "/dev/null"}, "DATA_DIR"),
        ({"REDIS_URL": "http://127.0.0.1:6379"}, "REDIS_URL"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unusable_settings_are_refused_in_one_line(tmp_path: Path, settings: dict[str, str], reason: str) -> None:
    refused = run_app(tmp_path, "serve", "--port", str(free_port()), settings=settings)
    assert refused.returncode == 2
    assert refused.stderr.startswith("Cannot start")
    assert refused.stderr.count("\n") == 1
    assert reason in refused.stderr
    assert "user:secret" not in refused.stderr


@pytest.mark.parametrize("port", ["99999", "-1", "http"])
def test_what_is_no_port_is_refused_in_words(tmp_path: Path, port: str) -> None:
    refused = run_app(tmp_path, "worker", f"--port={port}")
    assert refused.returncode == 2
    assert f"{port} is no port" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_migrate_refuses_a_database_of_an_unknown_kind(tmp_path: Path) -> None:
    refused = run_app(tmp_path, "migrate", settings={"DATABASE_URL": "nonsense"})
    assert refused.returncode == 2
    assert "DATABASE_URL" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_migrate_makes_the_database_and_takes_it_back(tmp_path: Path) -> None:
    for revision in ("head", "base", "head"):
        done = run_app(tmp_path, "migrate", revision)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "app.db").exists()


@pytest.mark.parametrize("command", ["serve", "worker", "sandbox"])
def test_a_taken_port_is_told_in_one_line(tmp_path: Path, taken_port: int, command: str) -> None:
    refused = run_app(tmp_path, command, "--port", str(taken_port))
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "in use" in refused.stderr
    assert str(taken_port) in refused.stderr


@pytest.mark.parametrize("taken", ["port", "sandbox_port"])
def test_demo_without_its_port_leaves_nothing_behind(tmp_path: Path, taken_port: int, taken: str) -> None:
    demo = Demo(tmp_path, **{"port": free_port(), "sandbox_port": free_port(), taken: taken_port})
    try:
        assert demo.wait() == 2
        assert demo.printed.count("\n") == 1
        assert str(taken_port) in demo.printed
        assert not demo.is_running()
    finally:
        demo.kill()


def test_demo_speaks_shows_how_to_go_on_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    with running_demo(tmp_path) as demo:
        for part in ("/docs", "Login:", "It cost:", "CNY", "/media/audio/tts/"):
            assert part in demo.printed
        assert demo.press_ctrl_c() in {0, 130}
        assert not demo.is_running()
        assert "Traceback" not in demo.printed


@pytest.mark.skipif(shutil.which("curl") is None, reason="the printed commands need curl")
def test_commands_that_the_demo_prints_work_as_they_stand_there(tmp_path: Path) -> None:
    with running_demo(tmp_path) as demo:
        commands = demo.printed.split("in another shell:\n")[1].split("Press Ctrl-C")[0]
        done = subprocess.run(
            ["sh", "-ec", commands],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=END_SECONDS,
        )
        assert done.returncode == 0, done.stderr
        assert duration((tmp_path / "hello.mp3").read_bytes(), "mp3", 22050) > 0.5


def test_demo_runs_again_in_the_same_folder_with_the_same_login(tmp_path: Path) -> None:
    logins = []
    for _ in range(2):
        with running_demo(tmp_path) as demo:
            logins.append(next(line for line in demo.printed.splitlines() if line.startswith("Login:")))
            demo.press_ctrl_c()
    assert logins[0] == logins[1]
