"""The README's curl commands work as printed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import anyio

from tests.conftest import Account
from tests.servers import PROJECT, Sandbox, Server, run_backend
from tests.sound import duration

README = (PROJECT / "README.md").read_text()


def test_every_curl_command_works(tmp_path: Path, sandbox: Sandbox) -> None:
    block = re.search(r"<!-- curl -->\n```sh\n(.*?)```", README, re.DOTALL)
    assert block is not None
    with run_backend(tmp_path / "backend", sandbox.settings) as backend:
        checked = 'curl() { command curl --fail-with-body --show-error "$@"; }\n'
        script = checked + block[1].replace("http://localhost:8000", backend.url)
        done = subprocess.run(["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "sk-****cdef" in done.stdout
    assert '"characters":26' in done.stdout
    assert done.stdout.count('"text":"你好，欢迎使用语音合成服务！"') >= 3
    assert "00:00:00," in done.stdout
    assert duration((tmp_path / "speech.mp3").read_bytes(), "mp3", 22050) > 1
    assert done.stdout.count('"target_model":"cosyvoice-v3-flash"') >= 3
    assert '"status":"OK"' in done.stdout
    assert '"segments":1' in done.stdout
    assert "event: end" in done.stdout
    assert '"subtitle_url":"' in done.stdout
    assert duration((tmp_path / "sample.mp3").read_bytes(), "mp3", 22050) > 5
    assert duration((tmp_path / "stream.wav").read_bytes(), "wav", 24000) > 1
    assert "x-record-id: 2" in (tmp_path / "headers.txt").read_text().lower()


def test_the_admins_commands_work(tmp_path: Path, sandbox: Sandbox) -> None:
    block = re.search(r"<!-- admin -->\n```sh\n(.*?)```", README, re.DOTALL)
    assert block is not None
    with run_backend(tmp_path / "backend", {**sandbox.settings, "DATA_DIR": str(tmp_path / "data")}) as backend:
        checked = 'curl() { command curl --fail-with-body --show-error "$@"; }\n'
        script = checked + block[1].replace("http://localhost:8000", backend.url).replace(
            ".venv/bin/python", sys.executable
        )
        environment = {**os.environ, "PYTHONPATH": str(PROJECT), "DATABASE_URL": backend.database_url}
        command = ["bash", "-euc", script]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "boss is made, as an administrator." in done.stdout
    assert '"invite_code":"invite-' in done.stdout
    assert '"is_active":false' in done.stdout


async def test_the_live_example_works(tmp_path: Path, backend: Server, account: Account) -> None:
    block = re.search(r"<!-- live -->\n```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    token = account.client.headers["Authorization"].removeprefix("Bearer ")
    command = [sys.executable, "-c", block[1], backend.url.replace("http", "ws"), token]
    with anyio.fail_after(30):
        done = await anyio.run_process(command, cwd=tmp_path)
    report = json.loads(done.stdout)
    assert report["type"] == "complete"
    assert report["duration"] == round(duration((tmp_path / "live.wav").read_bytes(), "wav", 22050), 3)
