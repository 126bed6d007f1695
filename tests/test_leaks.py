"""What is written anywhere holds no key, token, password or spoken text."""

import uuid
from pathlib import Path

import httpx
import pytest

from tests.conftest import PASSWORD, CreateAccount
from tests.databases import written
from tests.servers import ENDED_GRACEFULLY, Sandbox, run_backend


async def test_secrets_are_nowhere_in_clear(tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount) -> None:
    key = f"sk-test-{uuid.uuid4().hex}"
    bad_key = f"sk-bad-{uuid.uuid4().hex}"
    text = "这句话不该出现在日志里"
    with run_backend(tmp_path, {**sandbox.settings, "LOG_LEVEL": "DEBUG"}) as backend:
        account = await create_account(backend, api_key=key)
        token = account.client.headers["Authorization"].removeprefix("Bearer ")
        assert (await account.synthesize(text)).status_code == 200
        assert (await account.synthesize(text, stream=True)).status_code == 200
        assert (await account.synthesize(text, voice=key)).status_code == 400
        with sandbox.faults(break_tasks=1, break_after_frames=0, break_how="close"):
            assert (await account.synthesize(text)).status_code == 502
        for verify in (True, False):
            await account.client.put("/api/user/apikey", params={"verify": verify}, json={"api_key": bad_key})
            await account.client.put("/api/user/apikey", params={"verify": verify}, json={"api_key": f"{key} x"})
        refused = await account.synthesize(text)
        assert refused.status_code == 401
        assert bad_key not in refused.text
        await account.client.get("/api/user/me", params={"token": "x"}, headers={"Authorization": f"Bearer {token}x"})
        assert backend.stop() in ENDED_GRACEFULLY
        log, database = backend.log, written(backend)
    assert database
    assert '"event": "record_settled"' in log
    for secret in (key, bad_key, token, PASSWORD, text):
        assert secret not in log
        spelled = secret.encode()
        for file in (path for path in (tmp_path / "data").rglob("*") if path.is_file()):
            if not file.name.startswith("app.db"):
                assert spelled not in file.read_bytes(), f"{file.name} holds a secret in clear"
        for name, content in database.items():
            if secret is not text:  # the history shows the text to its owner
                assert spelled not in content, f"{name} holds a secret in clear"


@pytest.mark.parametrize("name", ["jwt_secret", "credential_keys"])
async def test_generated_secrets_are_for_their_owner_only(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount, name: str
) -> None:
    with run_backend(tmp_path, sandbox.settings) as backend:
        file = tmp_path / "data" / name
        assert file.stat().st_mode & 0o777 == 0o600
        secret = file.read_text()
        assert len(secret) >= 32
        account = await create_account(backend)
        backend.stop()
    with run_backend(tmp_path, sandbox.settings) as restarted:
        assert file.read_text() == secret
        account.client.base_url = httpx.URL(restarted.url)
        assert (await account.synthesize("你好")).status_code == 200
