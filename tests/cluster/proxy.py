"""nginx as compose.yaml runs it: the same configuration, on a port of the loopback in front of other backends."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.servers import NO_AUTHORITIES, PROJECT, free_port

OPERATIONS = PROJECT / "app" / "operations"
START_SECONDS = 10.0


@dataclass
class Proxy:
    """A running nginx."""

    port: int
    folder: Path
    process: "subprocess.Popen[bytes]"

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """Everything that it has written."""
        return (self.folder / "nginx.log").read_text()

    @property
    def requests(self) -> list[dict[str, Any]]:
        """Its access log."""
        return [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]


def render(folder: Path, port: int, backends: Sequence[int], at_once: int | None = None) -> Path:
    """Write the shipped configuration with other ports, and `at_once` requests for each address; gives the file.

    Backends have addresses here instead of names, which nginx before 1.27.3 cannot ask for again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shipped = (OPERATIONS / "nginx.conf").read_text()
    rendered, listens = re.subn(r"\blisten 8080;", f"listen 127.0.0.1:{port};", shipped)
    assert listens == 1
    if at_once is not None:
        rendered, limits = re.subn(r"\blimit_conn addresses \d+;", f"limit_conn addresses {at_once};", rendered)
        assert limits == 1
    upstream = (OPERATIONS / "backends.conf").read_text()
    upstream, resolvers = re.subn(r"^resolver .*\n", "", upstream, flags=re.MULTILINE)
    assert resolvers == 1
    for number, backend in enumerate(backends, 1):
        upstream, servers = re.subn(rf"\bbackend-{number}:8000 resolve\b", f"127.0.0.1:{backend}", upstream)
        assert servers == 1
    (folder / "backends.conf").write_text(upstream)
    file = folder / "nginx.conf"
    file.write_text(rendered)
    return file


def command(file: Path) -> list[str]:
    """How nginx is started with a configuration, below its folder and in the foreground."""
    is_root = os.geteuid() == 0
    directives = "daemon off;" + ("user root;" if is_root else "")  # nobody else may enter the folders of a test
    found = shutil.which("nginx") or "/usr/sbin/nginx"
    return [found, "-p", f"{file.parent}/", "-c", str(file), "-g", directives]


def is_installed() -> bool:
    """Whether there is an nginx on this machine."""
    return Path(command(Path("nginx.conf"))[0]).exists()


@contextmanager
def run_proxy(folder: Path, backends: Sequence[int], at_once: int | None = None) -> Iterator[Proxy]:
    """Run nginx in front of two ports of the loopback."""
    port = free_port()
    file = render(folder, port, backends, at_once)
    with (folder / "nginx.log").open("ab") as log:
        process = subprocess.Popen(command(file), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    proxy = Proxy(port, folder, process)
    try:
        _wait_until_up(proxy)
        yield proxy
    finally:
        process.terminate()
        process.wait(timeout=START_SECONDS)


def _wait_until_up(proxy: Proxy) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if proxy.process.poll() is not None:
            break
        try:
            httpx.get(f"{proxy.url}/metrics", verify=NO_AUTHORITIES)
        except httpx.TransportError:
            time.sleep(0.02)
        else:
            return
    raise RuntimeError(f"nginx did not come up:\n{proxy.log}")
