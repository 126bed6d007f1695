"""What belongs to one user exists for nobody else: every route is asked with every id of another one."""

import re
import uuid
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from app.main import create_app
from app.settings import Settings
from tests.cloning import PUBLIC_SAMPLE, made
from tests.conftest import Account, CreateAccount
from tests.hearing import data_of, recognize, speak, submit
from tests.narrating import narrate
from tests.servers import NO_AUTHORITIES, Server
from tests.talking import talking

SCHEMA = create_app(Settings(_env_file=None, environment="development", storage="local")).openapi()
OPERATIONS = [(method.upper(), path) for path, methods in SCHEMA["paths"].items() for method in methods]
WITH_IDS = [
    (method, path) for method, path in OPERATIONS if "{" in path and not path.startswith(("/media", "/api/admin"))
]
BODIES: dict[tuple[str, str], Any] = {("PUT", "/api/audio/voice/{voice_id}"): {"audio_url": PUBLIC_SAMPLE}}
OPEN = {"/api/auth/register", "/api/auth/login", "/api/auth/token", "/api/auth/refresh"}
ABSENT = {"record_id": "9007199254740991", "task_id": str(uuid.uuid4()), "voice_id": "cosyvoice-v3-flash-mine-0a1b2c3d"}


@dataclass
class Belongings:
    """Somebody's ids, by the names that routes have for them, and where his audio is."""

    ids: dict[str, list[str]]
    audio_url: str


@pytest.fixture(scope="module")
def names_of_ids() -> set[str]:
    """What routes ask for in their paths."""
    return {name for _, path in WITH_IDS for name in re.findall(r"{(\w+)}", path)}


async def furnish(owner: Account) -> Belongings:
    """Everything that a user can have."""
    audio_url, _ = await speak(owner, "这是我的声音")
    assert (await recognize(owner, audio_url=audio_url)).status_code == 200
    await narrate(owner, "这是我的长文本。")
    voice_id = await made(owner)
    task_id = await submit(owner)
    records = [str(item["id"]) for item in (await owner.history(page_size=100))["items"]]
    assert len(records) == 5
    ids = {"record_id": records, "task_id": [task_id], "voice_id": [voice_id]}
    return Belongings(ids, audio_url)


async def ask(client: httpx.AsyncClient, method: str, path: str, ids: dict[str, str]) -> httpx.Response:
    """Ask a route for something."""
    return await client.request(method, path.format(**ids), json=BODIES.get((method, path)))


async def test_every_route_takes_another_users_ids_for_ids_of_nothing(
    backend: Server, create_account: CreateAccount, names_of_ids: set[str]
) -> None:
    owner, other = await create_account(backend), await create_account(backend)
    his = await furnish(owner)
    assert his.ids.keys() == ABSENT.keys() == names_of_ids
    before = await owner.history(page_size=100)
    for method, path in WITH_IDS:
        [name] = re.findall(r"{(\w+)}", path)
        nothing = await ask(other.client, method, path, ABSENT)
        assert nothing.status_code == 404, (method, path, nothing.text)
        for each in his.ids[name]:
            answer = await ask(other.client, method, path, {name: each})
            assert answer.status_code == 404, (method, path)
            assert answer.json() == nothing.json(), (method, path)
    assert await owner.history(page_size=100) == before
    for voice_id in his.ids["voice_id"]:
        assert (await owner.client.get(f"/api/audio/voice/{voice_id}")).status_code == 200


async def test_another_users_voice_speaks_for_its_owner_only(backend: Server, create_account: CreateAccount) -> None:
    owner, other = await create_account(backend), await create_account(backend)
    voice_id = await made(owner)
    plain = await other.synthesize("你好", voice=voice_id)
    assert plain.json()["error"] in {"INVALID_VOICE", "VOICE_NOT_FOUND"}
    async with talking(backend, other, voice=voice_id) as talk:
        await talk.say("你好。")
        await talk.end()
        assert (await talk.refusal()).message["error"] == plain.json()["error"]


async def test_lists_sums_and_files_show_ones_own_only(backend: Server, create_account: CreateAccount) -> None:
    owner, other = await create_account(backend), await create_account(backend)
    his = await furnish(owner)
    assert (await other.history())["total"] == 0
    assert data_of(await other.client.get("/api/audio/voice/list")) == {"total": 0, "voices": []}
    spreadsheet = (await other.client.get("/api/audio/history.csv")).text
    usage = (await other.client.get("/api/audio/usage")).text
    for each in (*his.ids["record_id"], *his.ids["task_id"], *his.ids["voice_id"], his.audio_url):
        assert f'"{each}"' not in usage
        assert each not in spreadsheet.splitlines()[1:]
    assert len(spreadsheet.splitlines()) == 1


async def test_a_key_that_names_a_request_names_it_for_one_user(backend: Server, create_account: CreateAccount) -> None:
    owner, other = await create_account(backend), await create_account(backend)
    headers = {"Idempotency-Key": "the-same-key"}
    body = {"model": "cosyvoice-v3-flash", "voice": "longanyang", "text": "早上好"}
    path = "/api/audio/tts/synthesize"
    first, second = [await each.client.post(path, json=body, headers=headers) for each in (owner, other)]
    assert first.json()["data"]["record_id"] != second.json()["data"]["record_id"]
    assert "Idempotency-Replayed" not in second.headers


@pytest.mark.parametrize("token", [None, "Bearer x.y.z"])
async def test_every_route_but_the_doors_is_closed_to_strangers(backend: Server, token: str | None) -> None:
    async with httpx.AsyncClient(base_url=backend.url, trust_env=False, verify=NO_AUTHORITIES) as stranger:
        if token:
            stranger.headers["Authorization"] = token
        ids = {**ABSENT, "user_id": str(uuid.uuid4()), "invite_id": str(uuid.uuid4())}
        for method, path in OPERATIONS:
            if path.startswith("/api/") and path not in OPEN:
                answer = await ask(stranger, method, path, ids)
                assert (answer.status_code, answer.json()["error"]) == (401, "UNAUTHORIZED"), (method, path)
