"""The README's curl commands work as printed."""

import re
import subprocess
from pathlib import Path

from tests.servers import PROJECT, Sandbox, run_backend
from tests.sound import duration


def test_every_curl_command_works(tmp_path: Path, sandbox: Sandbox) -> None:
    readme = (PROJECT / "README.md").read_text()
    block = re.search(r"<!-- curl -->\n```sh\n(.*?)```", readme, re.DOTALL)
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
    assert duration((tmp_path / "sample.mp3").read_bytes(), "mp3", 22050) > 5
    assert duration((tmp_path / "stream.wav").read_bytes(), "wav", 24000) > 1
    assert "x-record-id: 2" in (tmp_path / "headers.txt").read_text().lower()
