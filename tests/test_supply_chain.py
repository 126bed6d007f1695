"""What is installed and how it runs: locked, audited, without rights, on a disk that cannot be written."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.servers import NO_AUTHORITIES, PROJECT, Sandbox, free_port
from tests.test_recordings import encode

AUDIT = PROJECT / ".ci" / "audit"
DOCKERFILE = (PROJECT / "Dockerfile").read_text()
USER = 10001
MODEL = "cosyvoice-v3-flash"
START_SECONDS = 30.0


# ---- Locks


@pytest.mark.parametrize("file", ["requirements.lock", "tests/requirements.lock", "tests/bench/requirements.lock"])
def test_every_locked_package_has_its_hashes(file: str) -> None:
    lines = [line for line in (PROJECT / file).read_text().splitlines() if not re.match(r"\s*#", line)]
    requirements = re.split(r"\n(?=\S)", "\n".join(lines))
    assert len(requirements) > 20
    for requirement in requirements:
        assert re.match(r"[a-z0-9._-]+==\S+( ; [^\\]+)? \\\n", requirement), requirement
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", requirement), requirement
        assert not re.search(r"--hash=(?!sha256:)", requirement), requirement


# ---- The audit of the locks


def audited(tmp_path: Path, answer: str, exit_code: int, *, seconds: float = 20) -> tuple[int, str, int]:
    """Audit with a stand-in of pip-audit; gives exit code, output, and how often it was called."""
    calls = tmp_path / "calls"
    tool = tmp_path / "pip-audit"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{answer}\nexit {exit_code}\n')
    tool.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PIP_AUDIT": str(tool), "AUDIT_SECONDS": str(seconds)}
    done = subprocess.run([sys.executable, AUDIT], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    asked = calls.read_text().splitlines()
    assert all("--require-hashes --disable-pip" in each for each in asked)
    assert all(each.count("--requirement ") == 3 for each in asked)
    return done.returncode, done.stdout, len(asked)


def told(*dependencies: dict[str, Any]) -> str:
    """pip-audit's report."""
    return f"echo '{json.dumps({'dependencies': dependencies, 'fixes': []})}'"


CLEAN = {"name": "anyio", "version": "4.16.0", "vulns": []}
VULNERABLE = {
    "name": "starlette",
    "version": "1.0",
    "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-2026-1"], "fix_versions": ["1.1"], "description": "bad"}],
}
UNKNOWN = {"name": "limits", "skip_reason": "Dependency not found"}


def test_locks_without_known_vulnerabilities_pass(tmp_path: Path) -> None:
    assert audited(tmp_path, told(CLEAN, CLEAN), 0) == (0, "audited 2 locked packages: no known vulnerability\n", 1)


def test_a_vulnerability_fails_with_its_names_whatever_else_is_not_known(tmp_path: Path) -> None:
    code, output, _ = audited(tmp_path, told(CLEAN, UNKNOWN, VULNERABLE), 1)
    assert (code, output) == (1, "VULNERABLE: starlette 1.0: PYSEC-1, CVE-2026-1; mended in 1.1\n")


@pytest.mark.parametrize(
    ("answer", "exit_code", "reason", "calls"),
    [
        ("echo Traceback >&2; echo 'no route to host' >&2", 1, "no route to host", 2),
        ("echo '<html>' ; echo proxy >&2", 0, "proxy", 2),
        (told(CLEAN, UNKNOWN), 0, "could not look up 1 packages limits", 1),
        (told(), 0, "could not look up any packages", 1),
    ],
)
def test_what_cannot_be_known_is_said_aloud(
    tmp_path: Path, answer: str, exit_code: int, reason: str, calls: int
) -> None:
    code, output, asked = audited(tmp_path, answer, exit_code)
    assert (code, asked) == (0, calls)
    assert "NOT AUDITED: " in output
    assert reason in output
    assert output.count("!" * 60) >= 2


def test_an_audit_that_hangs_is_given_up(tmp_path: Path) -> None:
    code, output, asked = audited(tmp_path, "exec sleep 30", 0, seconds=1)
    assert (code, asked) == (0, 1)
    assert "NOT AUDITED: pip-audit took longer than the 1 seconds" in output


def test_the_checks_include_the_audit() -> None:
    assert re.search(r"^\.ci/audit$", (PROJECT / ".ci" / "run").read_text(), re.MULTILINE)


# ---- The image


def test_the_image_runs_as_nobody_in_particular_and_can_install_nothing() -> None:
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.*)$", last, re.MULTILINE) == ["app"]
    assert f"--uid {USER}" in last
    assert last.index("pip uninstall --yes pip setuptools") < last.index("\nUSER app")
    assert "ensurepip" in last
    assert "--require-hashes" in DOCKERFILE
    assert not re.search(r"^ADD |curl|wget|apt-get", DOCKERFILE, re.MULTILINE)


CONTAINER = """
set -eu
mount -t tmpfs -o mode=755 tmpfs "$ROOT"
for place in $PLACES; do
    mkdir -p "$ROOT$place"
    mount --bind "$place" "$ROOT$place"
    mount -o remount,bind,ro "$ROOT$place"
done
for link in $LINKS; do ln -s "$(readlink "$link")" "$ROOT$link"; done
mkdir "$ROOT/data" "$ROOT/scratch"
mount --bind "$DATA" "$ROOT/data"
mount --bind "$SCRATCH" "$ROOT/scratch"
mount -o remount,ro "$ROOT"
exec chroot "$ROOT" setpriv --reuid "$USER_ID" --regid "$USER_ID" --clear-groups --no-new-privs --bounding-set=-all \\
    env --ignore-environment --chdir "$PROJECT" DATA_DIR=/data TMPDIR=/scratch "$@"
"""


@pytest.fixture
def contained(tmp_path: Path, sandbox: Sandbox) -> Iterator[tuple[str, int]]:
    """The product as the image has it: no rights, and two folders to write to. Gives its address and process id."""
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode
    ):
        pytest.skip("no right to mount here: unshare --mount")
    folders = {name: tmp_path / name for name in ("root", "data", "scratch")}
    for folder in folders.values():
        folder.mkdir()
    for name in ("data", "scratch"):
        os.chown(folders[name], USER, USER)
    system = [Path(name) for name in ("/usr", "/etc", "/dev", "/proc", "/bin", "/sbin", "/lib", "/lib64")]
    python = [Path(sys.base_prefix), Path(sys.prefix)]
    places = [place for place in (*system, *python, PROJECT) if place.exists() and not place.is_symlink()]
    apart = [place for place in dict.fromkeys(places) if not any(other in place.parents for other in places)]
    port = free_port()
    environment = {
        "PATH": os.environ["PATH"],
        "PLACES": " ".join(map(str, apart)),
        "LINKS": " ".join(str(place) for place in system if place.is_symlink()),
        "PROJECT": str(PROJECT),
        "USER_ID": str(USER),
        **{name.upper(): str(folder) for name, folder in folders.items()},
    }
    settings = [f"{name}={value}" for name, value in sandbox.settings.items()]
    serve = [sys.executable, "-B", "-m", "app", "serve", "--port", str(port)]
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", CONTAINER, "sh", *settings, *serve]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        while not is_ready(url):
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()
            time.sleep(0.05)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(timeout=START_SECONDS)


def is_ready(url: str) -> bool:
    """Whether a server can serve by now."""
    try:
        return httpx.get(f"{url}/health/ready", verify=NO_AUTHORITIES, trust_env=False).is_success
    except httpx.TransportError:
        return False


def test_it_works_without_rights_on_a_file_system_that_cannot_be_written(
    contained: tuple[str, int], tmp_path: Path
) -> None:
    url, pid = contained
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {str(USER)}
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")} == {0}
    mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    below = {mount[4]: mount[5].split(",") for mount in mounts}
    assert {place for place, options in below.items() if "ro" not in options} <= {"/data", "/scratch"}
    assert {"/", "/data", "/scratch"} <= below.keys()

    login = {"username": "somebody", "password": "correct-horse-battery"}
    with httpx.Client(base_url=f"{url}/api", trust_env=False, verify=NO_AUTHORITIES, timeout=30) as client:
        assert client.post("/auth/register", json=login).status_code == 200
        token = client.post("/auth/login", json=login).json()["data"]["access_token"]
        client.headers["Authorization"] = f"Bearer {token}"
        assert client.put("/user/apikey", json={"api_key": "sk-test-0123456789abcdef"}).status_code == 200
        speech = {
            "model": MODEL,
            "voice": "longanyang",
            "text": "今天天气真好，我们去公园。",
            "format": "wav",
        }
        spoken = client.post("/audio/tts/synthesize", json=speech)
        assert spoken.status_code == 200, spoken.text
        long = client.post(
            "/audio/tts/synthesize-long", json={**speech, "format": "mp3", "text": "今天天气真好。" * 40}
        )
        assert long.status_code == 200, long.text
        audio = client.get(url + httpx.URL(spoken.json()["data"]["audio_url"]).path)
        assert audio.headers["content-type"] == "audio/wav"
        form, file = {"model": "qwen3-asr-flash"}, {"file": ("a.wav", audio.content)}
        heard = client.post("/audio/asr/recognize", data=form, files=file)
        assert heard.status_code == 200, heard.text
        # M4A is looked at in a process of its own.
        form, file = {"target_model": MODEL, "prefix": "mine"}, {"file": ("a", encode("aac", "ipod", 16000, seconds=6))}
        voice = client.post("/audio/voice/create", data=form, files=file)
        assert voice.status_code == 200, voice.text
    assert {path.stat().st_uid for path in (tmp_path / "data").rglob("*")} == {USER}
    assert "jwt_secret" in {path.name for path in (tmp_path / "data").iterdir()}
