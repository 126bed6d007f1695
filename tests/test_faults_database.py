"""The database is locked, or gone, for five seconds, in the middle of calls."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest

from tests.auditing import audit
from tests.cloning import CUSTOMIZATION
from tests.conftest import Account, CreateAccount
from tests.databases import POSTGRES, locked, postgres_url
from tests.faults import EVERY, SPEECH, Scene, let_claims_run_out, saying, until
from tests.hearing import RECOGNITION, TRANSCRIPTION
from tests.servers import Sandbox, run_backend, run_special_sandbox
from tests.tunnels import tunnel_to

AWAY_SECONDS = 5.0
PATHS = {"recognize": RECOGNITION, "transcribe": TRANSCRIPTION, "voice": CUSTOMIZATION}
SLOW = [{"path": path, "method": "POST", "how": "delay", "seconds": 1.0} for path in (RECOGNITION, TRANSCRIPTION)] + [
    {"path": CUSTOMIZATION, "action": "create_voice", "how": "delay", "seconds": 1.0}
]
WHOLE = 38


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A provider whose tasks are soon done."""
    with run_special_sandbox(tmp_path_factory.mktemp("provider"), task_seconds=0.1, voice_seconds=0.1) as running:
        yield running


Begun = dict[str, asyncio.Task[str]]


async def begin_everything(scene: Scene, callers: dict[str, Account]) -> Begun:
    """Begin a call of every route, up to the moment when the provider has all of them; it answers none yet."""
    begun = {route: asyncio.create_task(EVERY[route](scene, callers[route], saying())) for route in EVERY}

    async def all_are_there() -> bool:
        spoken = [any(call["text"] for call in scene.sandbox.calls(callers[route].api_key)) for route in SPEECH]
        struck = [
            any(each["fault"] for each in scene.sandbox.requests(callers[route].api_key) if each["path"] == path)
            for route, path in PATHS.items()
        ]
        return all(spoken) and all(struck)

    await until(all_are_there, "the provider was not asked for everything")
    return begun


async def test_a_database_that_is_locked_for_a_while_only_takes_its_time(
    tmp_path_factory: pytest.TempPathFactory, provider: Sandbox, create_account: CreateAccount
) -> None:
    with run_backend(tmp_path_factory.mktemp("product"), provider.settings) as product:
        scene = Scene(product, provider)
        callers = {route: await create_account(product) for route in EVERY}
        newcomer = await create_account(product)
        async with AsyncExitStack() as lock:
            with provider.faults(hold_tasks=-1, requests=SLOW):
                begun = await begin_everything(scene, callers)
                await lock.enter_async_context(locked(product))
            late = asyncio.create_task(EVERY["synthesize"](scene, newcomer, saying()))
            await asyncio.sleep(AWAY_SECONDS)
            assert not late.done()
        assert {route: await call for route, call in begun.items()} == dict.fromkeys(EVERY, "200")
        assert await late == "200"
        found = await audit(scene, *callers.values(), newcomer)
        assert found.statuses == ["succeeded"] * (len(EVERY) + 1)
        assert sum(quantity for quantity, _ in found.bills) == found.counted


async def test_a_database_that_is_gone_for_a_while_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    provider: Sandbox,
    schema_copy: str,
    create_account: CreateAccount,
) -> None:
    host, _, port = POSTGRES.partition(":")
    with tunnel_to(host, int(port)) as way:
        settings = {"DATABASE_URL": f"postgresql+asyncpg://root@127.0.0.1:{way.port}/{schema_copy}"}
        with run_backend(tmp_path_factory.mktemp("product"), {**provider.settings, **settings}) as product:
            scene = Scene(product, provider, way=postgres_url(schema_copy))
            callers = {route: await create_account(product) for route in EVERY}
            newcomer = await create_account(product)
            with provider.faults(hold_tasks=-1, requests=SLOW):
                begun = await begin_everything(scene, callers)
                way.block()
            gone_until = asyncio.get_running_loop().time() + AWAY_SECONDS
            refusals = {route: await EVERY[route](scene, newcomer, saying()) for route in EVERY}
            refused = await newcomer.synthesize(saying())
            assert (refused.status_code, refused.json()["error"]) == (503, "NOT_READY")
            assert int(refused.headers["retry-after"]) > 0
            assert (await newcomer.client.get("/health/ready")).status_code == 503
            assert (await newcomer.client.get("/health/live")).status_code == 200
            await asyncio.sleep(gone_until - asyncio.get_running_loop().time())
            way.open()
            ends = {route: await call for route, call in begun.items()}
            await let_claims_run_out(scene, "enrollments")  # that of a voice could not be given back
            found = await audit(scene, *callers.values(), newcomer, surprises=True)
            assert found.statuses == ["succeeded"] * len(EVERY)
            assert sum(quantity for quantity, _ in found.bills) == found.counted
            # Who waits for a job is told to look later, where the database was gone when he was to be told of its end.
            assert ends == {**dict.fromkeys(EVERY, "200"), **{route: ends[route] for route in ("long", "voice")}}
            assert {ends["long"], ends["voice"]} <= {"200", "503 NOT_READY"}
            assert refusals == dict.fromkeys(EVERY, "503 NOT_READY")
