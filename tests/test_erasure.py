"""A user who leaves: nothing of him is left, in no table and in no store, whatever goes wrong on the way."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select, update
from structlog.testing import capture_logs

from app.dashscope import ConnectionPool, SpeechClient
from app.database import Database
from app.errors import NotReady, Unauthorized
from app.inflight import InFlight
from app.models import (
    ApiKey,
    Enrollment,
    Erasure,
    LongText,
    Record,
    Removal,
    SubmittedFile,
    Transcription,
    User,
    Voice,
    VoiceListing,
    VoiceSample,
)
from app.ratelimit import RateLimiter
from app.security import KeySealer, TokenSigner
from app.services import erasure as erasure_module
from app.services import removals as removals_module
from app.services.accounts import AccountService
from app.services.calls import OpenRecord, Price
from app.services.erasure import ErasureLost, ErasureService
from app.services.logins import LoginService
from app.services.passwords import Passwords
from app.services.records import RecordService
from app.services.removals import AGAIN_AFTER, REMOVED_AT_ONCE, Remover, remove_later
from app.services.submissions import OpenSubmissions
from app.settings import Settings
from tests.cloning import clone_file, ids
from tests.conftest import PASSWORD, Account, CreateAccount
from tests.faults import HASTY, Scene, oss_settings, saying, until
from tests.hearing import data_of, ended, recognize_file, refusal, submit, tone
from tests.logins import begin_login
from tests.narrating import audio_of, begin, narrate, padded
from tests.servers import Sandbox, Server, run_backend, run_special_sandbox
from tests.talking import talking
from tests.traces import (
    SECRET,
    UNIT_PRICE,
    CountingStorage,
    create_every_kind,
    create_job,
    create_key,
    create_record,
    create_user,
    create_voice,
    mentions,
)
from tests.tunnels import Tunnel, tunnel_to

PRICE = Price("character", UNIT_PRICE, "CNY")
ME = "/api/user/me"
REMOVALS = "SELECT key, removed_at IS NOT NULL FROM removals"
LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)
SEALER = KeySealer(("k" * 43,))


class Office:
    """A process that erases users, and its store."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.database = Database(url)
        self.storage = CountingStorage(folder)
        self.in_flight = InFlight()
        self.remover = Remover(self.database, self.storage)
        settings, pool = Settings(_env_file=None), ConnectionPool(handshake_seconds=1.0)
        speech = SpeechClient(pool, lambda *_: asyncio.sleep(0), 1, 1.0)
        signer = TokenSigner(("s" * 43,), 60)
        self.logins = LoginService(settings, self.database, signer, RateLimiter(None), Passwords(0))
        self.accounts = AccountService(settings, self.database, SEALER, pool, speech)
        self.erasure = ErasureService(self.database, self.accounts, self.remover, self.in_flight)

    async def rows(self, *columns: Any) -> list[tuple[Any, ...]]:
        """Some columns of a table, in order."""
        async with self.database.snapshot() as session:
            return [tuple(row) for row in await session.execute(select(*columns).order_by(columns[0]))]

    async def let_time_pass(self) -> None:
        """Let the claims on erasures run out, and the time come for what is to be removed again."""
        async with self.database.transaction() as session:
            await session.execute(update(Erasure).values(next_at=LONG_AGO))
            await session.execute(update(Removal).values(remove_at=LONG_AGO))

    async def shut_out(self, user_id: uuid.UUID) -> tuple[uuid.UUID, uuid.UUID]:
        """Begin an erasure as a process does that dies right after it; gives the erasure and the claim."""
        token = uuid.uuid4()
        return await self.erasure._shut_out(user_id, token), token


@pytest.fixture
async def office(schema_url: str, tmp_path: Path) -> AsyncIterator[Office]:
    """A process that erases users."""
    office = Office(schema_url, tmp_path / "media")
    yield office
    await office.database.close()


@pytest.fixture
async def colleague(schema_url: str, tmp_path: Path) -> AsyncIterator[Office]:
    """Another process on the same database."""
    colleague = Office(schema_url, tmp_path / "media")
    yield colleague
    await colleague.database.close()


# ---- Removals


async def order(office: Office, number: int) -> list[str]:
    """Have so many objects removed that lie in the store."""
    keys = [f"audio/tts/20260101/{uuid.uuid4()}.mp3" for _ in range(number)]
    async with office.database.transaction() as session:
        remove_later(session, keys)
    return keys


async def remove_all(office: Office) -> None:
    """Remove what is due."""
    while (await office.remover.remove_some()).gone:
        pass


async def test_each_object_is_removed_at_once_and_once_more_a_day_later(office: Office) -> None:
    keys = await order(office, 3)
    await remove_all(office)
    assert sorted(office.storage.removed) == sorted(keys)
    due = [remove_at - removed_at for remove_at, removed_at in await office.rows(Removal.remove_at, Removal.removed_at)]
    assert due == [AGAIN_AFTER] * 3
    await remove_all(office)
    assert len(office.storage.removed) == 3
    await office.let_time_pass()
    await remove_all(office)
    assert sorted(office.storage.removed) == sorted(keys * 2)
    assert await office.rows(Removal.key) == []


async def test_two_processes_do_not_remove_the_same(office: Office, colleague: Office) -> None:
    keys = await order(office, 3 * REMOVED_AT_ONCE)
    await asyncio.gather(remove_all(office), remove_all(colleague))
    assert sorted(office.storage.removed + colleague.storage.removed) == sorted(keys)


async def test_what_a_dead_process_took_on_is_removed_by_another(office: Office, colleague: Office) -> None:
    keys = await order(office, 2)
    assert len(await office.remover._claim(uuid.uuid4(), None)) == 2
    await remove_all(colleague)
    assert colleague.storage.removed == []
    await office.let_time_pass()
    await remove_all(colleague)
    assert sorted(colleague.storage.removed) == sorted(keys)


async def test_who_comes_late_writes_nothing(office: Office, colleague: Office) -> None:
    await order(office, 1)
    token = uuid.uuid4()
    claimed = await office.remover._claim(token, None)
    await office.let_time_pass()
    await remove_all(colleague)
    known = await office.rows(Removal.remove_at, Removal.removed_at, Removal.misses)
    await office.remover._note(token, [], claimed)
    assert await office.rows(Removal.remove_at, Removal.removed_at, Removal.misses) == known


async def test_a_store_that_is_away_is_waited_for_longer_and_longer(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.uniform", lambda _, longest: longest)
    pauses = [removals_module._pause_seconds(failures) for failures in (1, 2, 3, 20)]
    assert pauses == [4.0, 8.0, 16.0, removals_module.LONGEST_PAUSE_SECONDS]
    keys = await order(office, 1)
    office.storage.is_away = True
    for misses in (1, 2, 3):
        removed = await office.remover.remove_some()
        assert (removed.gone, removed.is_refused) == (0, True)
        [(remove_at, known)] = await office.rows(Removal.remove_at, Removal.misses)
        assert known == misses
        assert remove_at > datetime.now(UTC) + timedelta(seconds=pauses[misses - 1] - 2)
        await office.let_time_pass()
    others = await order(office, REMOVED_AT_ONCE)
    await office.remover.remove_some()  # of which not many are asked for in vain
    assert sum(misses for (misses,) in await office.rows(Removal.misses)) <= 3 + removals_module.CALLS_AT_ONCE
    office.storage.is_away = False
    await office.let_time_pass()
    await remove_all(office)
    assert sorted(office.storage.removed) == sorted(keys + others)


async def test_a_key_that_no_store_takes_keeps_nothing_else_from_its_removal(office: Office) -> None:
    async with office.database.transaction() as session:
        session.add(Removal(key="../no key", remove_at=LONG_AGO))
    keys = await order(office, 3)
    await office.remover.remove_some()
    await office.remover.remove_some()
    assert sorted(office.storage.removed) == sorted(keys)


async def test_the_background_removes_what_it_is_told_of_and_outlasts_a_failure(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removals_module, "SHORTEST_PAUSE_SECONDS", 0.01)
    remove_some, failures = office.remover.remove_some, iter([OSError()])

    async def stumble() -> Any:
        for failure in failures:
            raise failure
        return await remove_some()

    monkeypatch.setattr(office.remover, "remove_some", stumble)
    with capture_logs() as logs:
        working = asyncio.create_task(office.remover.run())
        await until(lambda: bool(logs), "nothing went wrong")
        await asyncio.sleep(0.1)
        keys = await order(office, 1)
        office.remover.wake()
        await until(lambda: office.storage.removed == keys, "nothing is removed", 5)
        working.cancel()
        await asyncio.wait([working])
    assert [log["event"] for log in logs] == ["objects_not_removed"]


# ---- Erasures


async def test_nothing_is_left_of_who_leaves_and_everything_of_who_stays(office: Office) -> None:
    leaving, staying = await create_user(office.database), await create_user(office.database, "stays")
    records = await create_every_kind(office.database, leaving)
    others = await create_every_kind(office.database, staying)
    await create_key(office.database, leaving)
    await create_key(office.database, staying)
    async with office.database.transaction() as session:
        session.add(VoiceSample(key="audio/voice/20260101/update.wav", user_id=leaving, account="account"))
        for record in records:
            record.output_key = record.output_key and office.storage.lay(record.output_key)
        [subtitle] = await session.scalars(select(LongText.subtitle_key).where(LongText.record_id == records[2].id))
        samples = list(await session.scalars(select(VoiceSample.key).where(VoiceSample.user_id == leaving)))
    for key in (subtitle, *samples, *(f"audio/work/{records[2].id}-{number}.pcm" for number in range(2))):
        office.storage.lay(str(key))
    kept = office.storage.lay(str(others[0].output_key))
    before = await mentions(office.url, str(staying))
    assert await office.erasure.erase(leaving)
    assert await mentions(office.url, str(leaving)) == []
    assert await mentions(office.url, str(staying)) == before
    assert office.storage.keys == {kept}
    assert len(await office.rows(Record.id)) == len(others)


async def test_who_leaves_is_out_at_once_and_his_name_is_free(office: Office) -> None:
    user_id = await create_user(office.database, "xiaoming")
    await create_key(office.database, user_id)
    async with office.database.transaction() as session:
        session.add(login := begin_login(user_id))
    token = office.logins._signer.issue(user_id, login.id)
    assert (await office.logins.authenticate(token)).user.id == user_id
    await office.shut_out(user_id)
    with pytest.raises(Unauthorized):
        await office.logins.authenticate(token)
    with pytest.raises(Unauthorized):
        await office.shut_out(user_id)
    with pytest.raises(Unauthorized):
        await office.accounts.store_api_key(user_id, "sk-test-new", "beijing", None, verify=False)
    with pytest.raises(Unauthorized):
        async with RecordService(office.database).running(user_id, "tts", "m", "{}", PRICE):
            pass
    assert await office.rows(ApiKey.user_id) == []
    assert await office.rows(Record.id) == []
    again = await create_user(office.database, "xiaoming")
    assert [row[1:] for row in await office.rows(User.id, User.username) if row[0] == again] == [("xiaoming",)]


async def test_what_is_looked_after_is_let_go_of(office: Office) -> None:
    user_id = await create_user(office.database)
    for table in (Transcription, SubmittedFile, Enrollment, LongText):
        record = await create_record(office.database, user_id, status="running", finished_at=None)
        async with office.database.transaction() as session:
            claim = {"claimed_by": uuid.uuid4(), "claimed_until": datetime.now(UTC) + timedelta(hours=1)}
            await create_job(session, table, record, **claim)
    erasure_id, token = await office.shut_out(user_id)
    for table in (Transcription, SubmittedFile, Enrollment):
        assert await office.rows(table.next_check_at, table.claimed_by) == [(None, None)]
    [(cancelled_at, claimed_by)] = await office.rows(LongText.cancelled_at, LongText.claimed_by)
    assert cancelled_at
    assert claimed_by
    assert not await office.erasure._advance(erasure_id, token)  # a text is waited for while somebody speaks it
    assert len(await office.rows(Record.id)) == 1
    async with office.database.transaction() as session:
        await session.execute(update(LongText).values(claimed_until=LONG_AGO))
    assert await office.erasure._advance(erasure_id, token)
    assert await mentions(office.url, str(user_id)) == []


async def test_a_call_under_way_is_waited_for_and_its_audio_goes_too(office: Office) -> None:
    user_id = await create_user(office.database)
    records = RecordService(office.database)
    key = "audio/tts/20260101/late.mp3"
    async with records.running(user_id, "tts", "m", "{}", PRICE) as record:
        erasing = asyncio.create_task(office.erasure.erase(user_id))
        await until(lambda: office.rows(Erasure.id), "nobody is shut out")
        record.output_key, record.quantity = office.storage.lay(key), 7
        assert await office.rows(Record.status) == [("running",)]
    assert await erasing
    assert office.storage.keys == set()
    assert await mentions(office.url, str(user_id)) == []


async def test_the_dead_are_waited_for_until_their_lease_runs_out(office: Office) -> None:
    user_id = await create_user(office.database)
    lease = {"status": "running", "lease_expires_at": datetime.now(UTC) + timedelta(seconds=20)}
    planned_key = office.storage.lay("audio/tts/planned.mp3")
    record = await create_record(office.database, user_id, output_key=None, planned_key=planned_key)
    async with office.database.transaction() as session:
        await session.execute(update(Record).where(Record.id == record.id).values(**lease))
    erasure_id, token = await office.shut_out(user_id)
    assert not await office.erasure._advance(erasure_id, token)
    async with office.database.transaction() as session:
        await session.execute(update(Record).values(lease_expires_at=LONG_AGO))
    assert await office.erasure._advance(erasure_id, token)
    assert await office.remover.remove_all(erasure_id)
    assert office.storage.keys == set()


async def test_who_wakes_up_late_brings_nothing_back(office: Office) -> None:
    user_id = await create_user(office.database)
    records = RecordService(office.database)
    submissions = OpenSubmissions(office.database, records)
    ran = OpenRecord((await create_record(office.database, user_id, status="running", finished_at=None)).id, PRICE, 7)
    handed = await create_record(office.database, user_id, status="running", finished_at=None)
    async with office.database.transaction() as session:
        await create_job(session, SubmittedFile, handed)
    claimed = await submissions.claim(handed.id)
    assert claimed
    assert await office.erasure.erase(user_id)
    assert not await records.end(ran, "succeeded", None)
    with pytest.raises(NotReady):
        await records.foresee(ran, 7)
    now = datetime.now(UTC)
    values: dict[str, Any] = {"user_id": user_id, "key_fingerprint": "0", "next_check_at": now}
    await records.hand_over(ran, SubmittedFile(record_id=ran.id, file_url="https://example.com/a.mp3", **values))
    task = Transcription(record_id=handed.id, task_id="t", status="RUNNING", submitted_at=now, **values)
    await submissions.settle(claimed, task)
    await submissions.fail(claimed, "failed", NotReady())
    assert await mentions(office.url, str(user_id)) == []
    assert await office.rows(SubmittedFile.record_id) == await office.rows(Transcription.record_id) == []


async def test_another_process_goes_on_wherever_the_first_one_died(
    office: Office, colleague: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure_module, "RECORDS_AT_ONCE", 2)
    user_id = await create_user(office.database)
    await create_every_kind(office.database, user_id)
    erasure_id, token = await office.shut_out(user_id)
    assert await office.erasure._erase_records(erasure_id, token) == 2
    await colleague.erasure.go_on()
    assert len(await office.rows(Record.id)) == 2  # the first one may live
    await office.let_time_pass()
    await colleague.erasure.go_on()
    assert await mentions(office.url, str(user_id)) == []
    with pytest.raises(ErasureLost):
        await office.erasure._erase_records(erasure_id, token)
    assert len(await office.rows(Removal.key)) == 7
    await remove_all(colleague)
    assert len(colleague.storage.removed) == 7


async def test_two_processes_at_once_end_where_one_does(office: Office, colleague: Office) -> None:
    users = [await create_user(office.database) for _ in range(4)]
    for user_id in users:
        await create_every_kind(office.database, user_id)
        await office.shut_out(user_id)
    await office.let_time_pass()
    await asyncio.gather(office.erasure.go_on(), colleague.erasure.go_on(), office.erasure.go_on())
    assert await mentions(office.url, *map(str, users)) == []
    assert await office.rows(Erasure.id) == []
    assert await office.rows(func.count(Removal.key)) == [(4 * 7,)]


async def test_what_takes_long_goes_on_in_the_background(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erasure_module, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(erasure_module, "ROUND_SECONDS", 0.1)
    monkeypatch.setattr(erasure_module, "WAIT", timedelta(seconds=0.1))
    user_id = await create_user(office.database)
    async with RecordService(office.database).running(user_id, "tts", "m", "{}", PRICE):
        assert not await office.erasure.erase(user_id)
    working = asyncio.create_task(office.erasure.run())

    async def is_gone() -> bool:
        return not await office.rows(User.id)

    await until(is_gone, "the user stays")
    working.cancel()
    await asyncio.wait([working])


async def test_a_store_that_is_away_gets_its_turn_later(office: Office) -> None:
    user_id = await create_user(office.database)
    [record, *_] = await create_every_kind(office.database, user_id)
    office.storage.lay(str(record.output_key))
    office.storage.is_away = True
    assert not await office.erasure.erase(user_id)
    assert await mentions(office.url, str(user_id)) == []
    office.storage.is_away = False
    await office.let_time_pass()
    await remove_all(office)
    assert office.storage.keys == set()


async def test_the_voices_of_an_account_are_forgotten_unless_somebody_else_reaches_it(office: Office) -> None:
    first, second = await create_user(office.database), await create_user(office.database)
    for user_id in (first, second):
        await create_key(office.database, user_id, SEALER.seal("sk-test-shared", user_id))
    await create_key(office.database, await create_user(office.database))  # one that cannot be opened
    async with office.database.snapshot() as session:
        key = await session.get(ApiKey, first)
    account = office.accounts.account_of(key) if key else None
    assert account
    await create_voice(office.database, account)
    assert await office.erasure.erase(first)
    assert len(await office.rows(Voice.voice_id)) == len(await office.rows(VoiceListing.account)) == 1
    assert await office.erasure.erase(second)
    assert await office.rows(Voice.voice_id) == await office.rows(VoiceListing.account) == []


# ---- The route


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A provider that is also the store."""
    with run_special_sandbox(tmp_path_factory.mktemp("provider"), task_seconds=0.1, voice_seconds=0.1) as running:
        yield running


@pytest.fixture(scope="module")
def way(provider: Sandbox) -> Iterator[Tunnel]:
    """The way to the store, which knows what was put there."""
    host, _, port = provider.url.removeprefix("http://").partition(":")
    with tunnel_to(host, int(port)) as tunnel:
        yield tunnel


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory, provider: Sandbox, way: Tunnel) -> Iterator[Server]:
    """The product that keeps its audio there."""
    settings = {**provider.settings, **oss_settings(way.url), **HASTY, "UPSTREAM_TIMEOUT": "20"}
    with run_backend(tmp_path_factory.mktemp("product"), settings) as running:
        yield running


@pytest.fixture
async def scene(product: Server, provider: Sandbox, way: Tunnel) -> Scene:
    """All of it."""
    return Scene(product, provider, store=way)


def database_of(server: Server) -> str:
    """Where a server's database is."""
    return f"sqlite+aiosqlite:///{server.folder / 'data' / 'app.db'}"


async def left(scene: Scene) -> set[str]:
    """What lies in the store, or is held for it, of what the test has put there."""
    assert scene.store
    async with httpx.AsyncClient(base_url=scene.store.url, trust_env=False) as client:
        put = scene.store.put_keys - scene.before
        return {key for key in put if (await client.get(f"/voices/{key}")).status_code != 404} | scene.held


async def leave(account: Account) -> bool:
    """Ask to be erased; gives whether something is still to be done."""
    told = data_of(await account.client.delete(ME, timeout=40))
    assert told.keys() == {"deleted", "pending"}
    assert told["deleted"] is True
    assert refusal(await account.client.get(ME)) == (401, "UNAUTHORIZED")
    return bool(told["pending"])


async def use_everything(scene: Scene, account: Account) -> None:
    """Leave a trace wherever one can be left."""
    spoken = data_of(await account.synthesize(saying(), format="mp3"))
    await account.synthesize(saying(), format="wav", stream=True)
    await narrate(account, padded(2), subtitle="srt", format="mp3")
    async with talking(scene.server, account, format="pcm") as session:
        await session.speak(saying())
    data_of(await recognize_file(account, tone(2), f"{SECRET}.wav"))
    data_of(await recognize_file(account, tone(50, channels="tt", rate=44100), f"{SECRET}.wav"))
    await ended(account, await submit(account, spoken["audio_url"], context=SECRET), hurried=scene.server)
    data_of(await clone_file(account, prefix="mine"))
    data_of(await account.client.put("/api/user/budget", json={"monthly": "10"}))
    assert await ids(account)


async def test_who_leaves_leaves_nothing(scene: Scene, create_account: CreateAccount) -> None:
    account = await create_account(scene.server, username=f"leaver-{uuid.uuid4().hex[:8]}")
    before = set(await scene.rows(REMOVALS))
    await use_everything(scene, account)
    assert await left(scene)
    assert sorted((key[:10], not is_removed) for key, is_removed in set(await scene.rows(REMOVALS)) - before) == [
        ("audio/asr/", True),  # what was lent to the provider is removed even if this process dies
        ("audio/work", False),  # what another machine may hold of a text comes to the store after its end
        ("audio/work", False),
    ]
    assert not await leave(account)
    assert await left(scene) == set()
    assert await mentions(database_of(scene.server), account.user_id, account.username, SECRET) == []
    login = {"username": account.username, "password": PASSWORD}
    assert refusal(await account.client.post("/api/auth/login", json=login)) == (401, "UNAUTHORIZED")
    assert refusal(await account.client.delete(ME)) == (401, "UNAUTHORIZED")
    again = data_of(await account.client.post("/api/auth/register", json=login))
    assert again["user_id"] != account.user_id
    assert scene.sandbox.voices(account.api_key)  # that is the user's own account


async def test_who_shares_a_key_with_him_notices_nothing(scene: Scene, create_account: CreateAccount) -> None:
    staying = await create_account(scene.server)
    leaving = await create_account(scene.server, api_key=staying.api_key)
    voice_id = data_of(await clone_file(leaving))["voice_id"]
    spoken = data_of(await staying.synthesize(saying()))
    await leaving.synthesize(saying())
    before, audio = await staying.history(), await audio_of(staying, spoken["audio_url"])
    assert not await leave(leaving)
    assert await mentions(database_of(scene.server), leaving.user_id) == []
    assert await staying.history() == before
    assert await audio_of(staying, spoken["audio_url"]) == audio
    assert await ids(staying) == [voice_id]
    assert (await staying.synthesize(saying(), voice=voice_id)).status_code == 200


async def test_calls_under_way_end_and_then_go_as_well(scene: Scene, create_account: CreateAccount) -> None:
    account = await create_account(scene.server)
    begun = len(scene.sandbox.calls(account.api_key))
    with scene.sandbox.faults(hold_tasks=2):
        calls = [asyncio.create_task(account.synthesize(saying(), stream=is_streamed)) for is_streamed in (True, False)]
        await until(lambda: len(scene.sandbox.calls(account.api_key)) == begun + 2, "nothing is begun")
        leaving = asyncio.create_task(leave(account))
        await asyncio.sleep(0.5)
        assert not leaving.done()
    assert [answer.status_code for answer in await asyncio.gather(*calls)] == [200, 200]
    assert not await leaving
    assert await left(scene) == set()
    assert await mentions(database_of(scene.server), account.user_id) == []


async def test_long_texts_are_stopped(scene: Scene, create_account: CreateAccount) -> None:
    account = await create_account(scene.server)
    with scene.sandbox.faults(hold_tasks=100):
        await begin(account, padded(3), subtitle="srt")
        await until(lambda: bool(scene.sandbox.calls(account.api_key)), "nothing is begun")
        waiting = asyncio.create_task(narrate_anyhow(account))
        await asyncio.sleep(0.3)
        assert not await leave(account)
    assert (await waiting).status_code in {404, 409}
    assert await left(scene) == set()
    assert await mentions(database_of(scene.server), account.user_id) == []


async def narrate_anyhow(account: Account) -> httpx.Response:
    """Wait for a long text, whatever becomes of it."""
    body = {"model": "cosyvoice-v3-flash", "voice": "longanyang", "text": padded(2), "format": "pcm"}
    return await account.client.post("/api/audio/tts/synthesize-long", json=body)


async def test_a_store_that_is_away_keeps_nothing_either(scene: Scene, create_account: CreateAccount) -> None:
    account = await create_account(scene.server)
    data_of(await account.synthesize(saying()))
    with scene.sandbox.faults(oss_unavailable=-1):
        data_of(await account.synthesize(saying()))
        assert await leave(account)
        assert await mentions(database_of(scene.server), account.user_id) == []
    await scene.rows("UPDATE removals SET remove_at = '2026-01-01 00:00:00.000000' WHERE removed_at IS NULL")

    async def is_empty() -> bool:
        return not await left(scene)

    await until(is_empty, "something is left")


async def test_an_erasure_outlives_its_process(
    tmp_path: Path, provider: Sandbox, create_account: CreateAccount
) -> None:
    with run_backend(tmp_path, provider.settings) as backend:
        account = await create_account(backend)
        data_of(await account.synthesize(saying()))
        with provider.faults(hold_tasks=1):
            call = asyncio.create_task(account.synthesize(saying()))
            await until(lambda: len(provider.calls(account.api_key)) == 2, "nothing is begun")
            leaving = asyncio.create_task(account.client.delete(ME))
            scene = Scene(backend, provider)

            async def is_waiting() -> bool:
                return len(await scene.rows("SELECT 1 FROM erasures")) == len(await scene.rows("SELECT 1 FROM records"))

            await until(is_waiting, "the erasure does not come to the call")
            backend.kill()
            assert all(
                isinstance(each, httpx.HTTPError)
                for each in await asyncio.gather(call, leaving, return_exceptions=True)
            )
    await scene.rows("UPDATE records SET lease_expires_at = '2026-01-01 00:00:00.000000'")
    await scene.rows("UPDATE erasures SET next_at = '2026-01-01 00:00:00.000000'")
    await scene.rows("UPDATE removals SET remove_at = '2026-01-01 00:00:00.000000' WHERE removed_at IS NULL")
    with run_backend(tmp_path, provider.settings) as backend:

        async def is_gone() -> bool:
            return not await mentions(database_of(backend), account.user_id) and not scene.media

        await until(is_gone, "something is left")
