"""What is under fuzz: a backend with a stand-in provider, and users who may come in."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.conftest import PASSWORD, copy_user
from tests.databases import rows
from tests.fuzz.tally import Tally
from tests.servers import NO_AUTHORITIES, Sandbox, Server, run_backend, run_sandbox

# uvicorn's word for a stream that is broken off on purpose, so that nobody takes it for whole.
BROKEN_OFF = "ASGI callable returned without completing response."
SETTINGS = {"LOGIN_LIMIT": "1000000/minute", "UPSTREAM_TIMEOUT": "5", "HANDSHAKE_TIMEOUT": "2"}


@dataclass
class House:
    """A backend, and where it gets its speech from."""

    server: Server
    sandbox: Sandbox
    _token: str = ""

    def take_token(self) -> str:
        """The token of an admin whom nobody else is: another one, once the last was logged out, shut out or erased."""
        headers = {"Authorization": f"Bearer {self._token}"}
        if not self._token or httpx.get(f"{self.server.url}/api/user/me", headers=headers).status_code != 200:
            self._token = take_token(self.server, is_admin=True)
        return self._token


@contextmanager
def open_house(folder: Path) -> Iterator[House]:
    """Run both with their data in a folder."""
    with (
        run_sandbox(folder / "sandbox") as sandbox,
        run_backend(folder / "backend", {**sandbox.settings, **SETTINGS}) as server,
    ):
        yield House(server, sandbox)


def take_token(server: Server, api_key: str | None = None, *, is_admin: bool = False) -> str:
    """The token of a user whom nobody else is, with this key, if any."""
    name = f"fuzz-{uuid.uuid4().hex}"
    user_id = copy_user(server, name)
    assert user_id is not None
    if is_admin:
        rows(server, "UPDATE users SET is_admin = TRUE WHERE id = ? RETURNING id", uuid.UUID(user_id))
    with httpx.Client(base_url=server.url, verify=NO_AUTHORITIES, trust_env=False, timeout=30) as client:
        login = client.post("/api/auth/login", json={"username": name, "password": PASSWORD}).raise_for_status()
        token: str = login.json()["data"]["access_token"]
        if api_key is not None:
            client.headers["Authorization"] = f"Bearer {token}"
            client.put("/api/user/apikey", json={"api_key": api_key}).raise_for_status()
    return token


def note_log(server: Server, tally: Tally, but: tuple[str, ...] = ()) -> None:
    """Count what a log tells of bugs for a failure, except for these."""
    tally.checks["the log tells no bug"] += 1
    for line in _wrong_lines(server):
        if not any(known in line for known in but):
            tally.fail("the server", "the log tells no bug", line[:2000])


def _wrong_lines(server: Server) -> list[str]:
    signs = ("exc_type", "Traceback", "never retrieved", "ResourceWarning", '"level": "error"', '"level":"error"')
    return [line for line in server.log.splitlines() if any(sign in line for sign in signs) and BROKEN_OFF not in line]
