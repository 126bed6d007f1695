"""Several processes on one database: `worker` apart from `serve`, several workers of one `serve`, and how they end."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from app.announcements import Announcements
from app.database import Database, is_outage, migrate, once_more
from app.preparation import prepare
from app.settings import Settings
from tests.conftest import CreateAccount
from tests.databases import create_database, drop_database, postgres_url
from tests.hearing import PATIENCE_SECONDS
from tests.narrating import begin, counted, ended, finished, narrate, only_record, padded, spoken
from tests.servers import ENDED_GRACEFULLY, NO_AUTHORITIES, Sandbox, run_backend, run_sandbox, run_worker

SPOKEN = "今天天气真好，我们一起去公园散步，看看花，听听鸟叫。"


@pytest.fixture
async def shared_url() -> AsyncIterator[str]:
    """An empty PostgreSQL database."""
    name = await create_database()
    yield postgres_url(name)
    await drop_database(name)


@pytest.fixture
def shared(tmp_path: Path, sandbox: Sandbox, shared_url: str) -> dict[str, str]:
    """What processes of one deployment have in common."""
    return {**sandbox.settings, "DATABASE_URL": shared_url, "DATA_DIR": str(tmp_path / "shared")}


async def until_gone(url: str) -> None:
    """Wait until nobody answers there."""
    client = httpx.AsyncClient(
        trust_env=False, verify=NO_AUTHORITIES
    )  # which is made in no time: what follows is timed
    async with asyncio.timeout(PATIENCE_SECONDS), client:
        while True:
            try:
                await client.get(f"{url}/health/live")
            except httpx.TransportError:
                return
            await asyncio.sleep(0.05)


def children_of(pid: int) -> list[int]:
    """The server processes that a `serve --workers N` has started."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(child) for child in listed if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]  # and not the tracker of their resources


def is_running(pid: int) -> bool:
    """Whether a process lives."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- A worker apart


async def test_a_worker_does_what_the_web_process_leaves_to_it_and_tells_it_at_once(
    tmp_path: Path, shared: dict[str, str], create_account: CreateAccount
) -> None:
    settings = {**shared, "BACKGROUND_JOBS": "false"}
    with run_backend(tmp_path / "web", settings) as web:
        account = await create_account(web)
        waiting = await begin(account, padded(2))
        await asyncio.sleep(1)
        assert (await account.history())["items"][0]["status"] == "running"
        with run_worker(tmp_path / "worker", shared) as worker:
            monitor = httpx.AsyncClient(base_url=worker.url)
            assert (await ended(account, waiting))["status"] == "succeeded"
            started_at = time.monotonic()
            done = await narrate(account, padded(2))
            assert time.monotonic() - started_at < 2, "both heard of it, and neither waited for its next round"
            assert done["duration"] > 0
            assert (await monitor.get("/health/live")).status_code == 200
            assert (await monitor.get("/health/ready")).json()["data"]["status"] == "ok"
            assert "http_requests_total" in (await monitor.get("/metrics")).text
            for path in ("/api/audio/history", "/docs", "/openapi.json", "/media/audio/tts/x.mp3"):
                assert (await monitor.get(path)).status_code == 404
            await monitor.aclose()
        assert "Traceback" not in web.log + worker.log
        assert worker.process.wait() in ENDED_GRACEFULLY


async def test_nothing_is_lost_or_bought_twice_when_worker_and_web_process_are_restarted(
    tmp_path: Path, shared: dict[str, str], create_account: CreateAccount
) -> None:
    with run_sandbox(tmp_path / "provider", "--speed", "15") as paced:
        settings = {**shared, **paced.settings, "LONG_TEXT_PARALLELISM": "2"}
        web_settings = {**settings, "BACKGROUND_JOBS": "false"}
        with run_worker(tmp_path / "second", settings) as second, run_backend(tmp_path / "web", web_settings) as web:
            account = await create_account(web)
            os.kill(second.process.pid, signal.SIGSTOP)  # so that the first has the text
            with run_worker(tmp_path / "first", settings) as first:
                waiting = asyncio.create_task(narrate(account, padded(6)))
                record_id = await only_record(account)
                await spoken(account, record_id, 1)
                os.kill(second.process.pid, signal.SIGCONT)
                first.process.terminate()
                web.process.terminate()
                done = await waiting
                assert await asyncio.to_thread(first.process.wait, 30) in ENDED_GRACEFULLY
            assert done["record_id"] == record_id
            bought = finished(paced.calls(account.api_key))
            assert len(bought) == len({call["text"] for call in bought}) == len(paced.calls(account.api_key))
            assert sum(entry["counted"] for entry in paced.ledger(account.api_key)) == counted(padded(6))


# ---- Several workers of one server


async def test_a_worker_of_a_server_that_dies_is_replaced_and_all_end_together(
    tmp_path: Path, shared: dict[str, str], create_account: CreateAccount
) -> None:
    with run_backend(tmp_path / "web", {**shared, "WORKERS": "2"}) as web:
        account = await create_account(web)
        first = await asyncio.to_thread(children_of, web.process.pid)
        assert len(first) == 2
        os.kill(first[0], signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(now := await asyncio.to_thread(children_of, web.process.pid)) < 2 or first[0] in now:
                await asyncio.sleep(0.1)
        for _ in range(4):
            account.client.headers["Connection"] = "close"  # so that both are asked
            assert (await account.synthesize(SPOKEN)).status_code == 200
        assert (await account.history())["total"] == 4
        assert await asyncio.to_thread(web.stop) in ENDED_GRACEFULLY
        assert not any(is_running(pid) for pid in now)


async def test_the_workers_of_a_server_that_was_killed_do_not_serve_on(
    tmp_path: Path, shared: dict[str, str], create_account: CreateAccount
) -> None:
    with run_backend(tmp_path / "web", {**shared, "WORKERS": "2"}) as web:
        await create_account(web)
        children = await asyncio.to_thread(children_of, web.process.pid)
        await asyncio.to_thread(web.kill)
        await until_gone(web.url)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while any(is_running(pid) for pid in children):
                await asyncio.sleep(0.05)


# ---- An orderly end


async def test_a_server_that_is_about_to_end_says_so_before_it_refuses_anybody(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    with run_backend(tmp_path, {**sandbox.settings, "DRAIN_DELAY_SECONDS": "1.5"}) as backend:
        account = await create_account(backend)
        assert (await account.client.get("/health/ready")).status_code == 200
        backend.process.terminate()
        async with asyncio.timeout(1):
            while (ready := await account.client.get("/health/ready")).status_code == 200:
                await asyncio.sleep(0.02)
        assert (ready.status_code, ready.json()["error"]) == (503, "NOT_READY")
        assert (await account.client.get("/health/live")).status_code == 200
        assert (await account.synthesize(SPOKEN)).status_code == 200
        assert backend.process.poll() is None
        assert await asyncio.to_thread(backend.process.wait, 20) in ENDED_GRACEFULLY


async def test_a_request_that_is_on_its_way_when_the_server_stops_is_answered(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    with run_backend(tmp_path, sandbox.settings) as backend:
        await create_account(backend)
        host, _, port = backend.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        idle_reader, idle_writer = await asyncio.open_connection(host, int(port))
        await asyncio.sleep(0.1)
        backend.process.terminate()
        await until_gone(backend.url)
        writer.write(b"GET /health/live HTTP/1.1\r\nHost: here\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), PATIENCE_SECONDS)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert await asyncio.wait_for(idle_reader.read(), PATIENCE_SECONDS) == b""
        for each in (writer, idle_writer):
            each.close()
            await each.wait_closed()
        assert await asyncio.to_thread(backend.process.wait, 20) in ENDED_GRACEFULLY


# ---- Secrets that machines make themselves


def settings_of(folder: Path, url: str, **changes: str) -> Settings:
    """Settings of a machine with a data folder of its own."""
    given: dict[str, Any] = {"data_dir": folder, "database_url": url, **changes}
    return Settings(**given)


async def test_machines_of_one_database_must_have_the_same_secrets(tmp_path: Path, shared_url: str) -> None:
    secret = "s" * 40
    await prepare(settings_of(tmp_path / "first", shared_url))
    await prepare(settings_of(tmp_path / "first", shared_url))
    with pytest.raises(RuntimeError, match="set JWT_SECRET to the same value on every machine"):
        await prepare(settings_of(tmp_path / "second", shared_url))
    with pytest.raises(RuntimeError, match="set CREDENTIAL_KEYS to the same value"):
        await prepare(settings_of(tmp_path / "second", shared_url, jwt_secret=secret))
    await prepare(settings_of(tmp_path / "second", shared_url, jwt_secret=secret, credential_keys=secret))


async def test_machines_that_start_together_agree_on_who_was_first(tmp_path: Path, shared_url: str) -> None:
    await migrate(shared_url)
    machines = [tmp_path / str(number) for number in range(4)]
    starts = [prepare(settings_of(machine, shared_url, auto_migrate="false")) for machine in machines]
    ends = await asyncio.gather(*starts, return_exceptions=True)
    assert [type(end) for end in ends].count(RuntimeError) == 3, ends
    assert ends.count(None) == 1


# ---- What PostgreSQL does when several write at once


@pytest.fixture
async def database(shared_url: str) -> AsyncIterator[Database]:
    """A database with two rows to fight over, which is set to another isolation than ours."""
    database = Database(shared_url)
    async with database.transaction() as session:
        await session.execute(text("CREATE TABLE apples (id integer PRIMARY KEY, bites integer NOT NULL)"))
        await session.execute(text("INSERT INTO apples VALUES (1, 0), (2, 0)"))
        name = make_url(shared_url).database
        await session.execute(text(f"ALTER DATABASE {name} SET default_transaction_isolation TO 'serializable'"))
    await database.close()
    database = Database(shared_url)
    yield database
    await database.close()


async def test_transactions_that_wait_for_each_other_are_done_again(database: Database) -> None:
    both_began = asyncio.Barrier(2)
    tries = 0

    @once_more
    async def bite(first: int, second: int) -> None:
        nonlocal tries
        tries += 1
        async with database.transaction() as session:
            await session.execute(text("UPDATE apples SET bites = bites + 1 WHERE id = :id"), {"id": first})
            if tries <= 2:
                await both_began.wait()
            await session.execute(text("UPDATE apples SET bites = bites + 1 WHERE id = :id"), {"id": second})

    await asyncio.gather(bite(1, 2), bite(2, 1))
    assert tries == 3
    async with database.snapshot() as session:
        assert list(await session.scalars(text("SELECT bites FROM apples ORDER BY id"))) == [2, 2]


async def test_a_transaction_that_gives_way_each_time_is_an_outage_in_the_end(database: Database) -> None:
    tries = 0

    @once_more
    async def give_way() -> None:
        nonlocal tries
        tries += 1
        async with database.transaction() as session:
            await session.execute(text("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$"))

    with pytest.raises(DBAPIError, match="40001") as caught:
        await give_way()
    assert tries == 5
    assert is_outage(caught.value)


async def test_what_the_code_relies_on_holds_whatever_the_database_is_set_to(database: Database) -> None:
    async with database.snapshot() as session:
        settings = {
            name: await session.scalar(text(f"SHOW {name}"))
            for name in ("transaction_isolation", "lock_timeout", "idle_in_transaction_session_timeout")
        }
    assert settings == {
        "transaction_isolation": "read committed",
        "lock_timeout": "15s",
        "idle_in_transaction_session_timeout": "15s",
    }


# ---- Word among processes


@pytest.fixture
def pair(shared_url: str) -> tuple[Announcements, Announcements]:
    """Two processes of one database."""
    return Announcements(shared_url), Announcements(shared_url)


async def heard_by(announcements: Announcements, topic: str) -> list[str]:
    """What comes in about a topic; the first word is empty and tells that it listens."""
    words: list[str] = []
    announcements.hear(topic, words.append)
    return words


async def until_heard(words: list[str], count: int) -> None:
    """Wait for so many words."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len(words) < count:
            await asyncio.sleep(0.01)


async def test_everybody_hears_what_one_announces(pair: tuple[Announcements, Announcements]) -> None:
    teller, listener = pair
    mine, theirs = await heard_by(teller, "news"), await heard_by(listener, "news")
    other = await heard_by(listener, "other")
    running = [asyncio.create_task(each.run()) for each in pair]
    await until_heard(mine, 1)
    await until_heard(theirs, 1)
    for word in ("1", "2", "2"):
        teller.announce("news", word)
    await until_heard(theirs, 3)
    await until_heard(mine, 3)
    assert (mine, theirs, other) == (["", "1", "2"], ["", "1", "2"], [""])
    for task in running:
        task.cancel()
    await asyncio.wait(running)


async def test_who_lost_the_connection_looks_again_and_hears_on(
    pair: tuple[Announcements, Announcements], shared_url: str
) -> None:
    teller, listener = pair
    words = await heard_by(listener, "news")
    running = [asyncio.create_task(each.run()) for each in pair]
    await until_heard(words, 1)
    breaker = await asyncpg.connect(shared_url.replace("+asyncpg", ""))
    cut = await breaker.fetchval(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    assert cut == 2
    await until_heard(words, 2)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while words[-1] != "again":
            teller.announce("news", "again")
            await asyncio.sleep(0.1)
    await breaker.close()
    for task in running:
        task.cancel()
    await asyncio.wait(running)


async def test_nobody_waits_for_words_on_sqlite(tmp_path: Path) -> None:
    alone = Announcements(f"sqlite+aiosqlite:///{tmp_path / 'app.db'}")
    alone.announce("news")
    await asyncio.wait_for(alone.run(), 1)
