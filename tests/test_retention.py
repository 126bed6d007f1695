"""What was said is kept for some days, what it cost for good."""

import asyncio
import csv
import json
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select, text, update
from structlog.testing import capture_logs

from app.database import Database
from app.models import Bill, Enrollment, LongText, Record, Removal, Segment, SubmittedFile, Transcription, VoiceSample
from app.services import retention as retention_module
from app.services.removals import Remover
from app.services.retention import ERASED_AT_ONCE, Retention, due, parameters_of
from tests.conftest import Account, CreateAccount
from tests.faults import Scene, until
from tests.hearing import data_of, ended, recognize, refusal, submit
from tests.narrating import narrate, record_of
from tests.servers import Sandbox, run_backend
from tests.traces import SECRET, CountingStorage, create_every_kind, create_job, create_record, create_user, mentions

DAYS = 30
CSV = "/api/audio/history.csv"
SYNTHESIZE = "/api/audio/tts/synthesize"
SPEECH = {"model": "cosyvoice-v3-flash", "voice": "longanyang", "text": SECRET}


@pytest.fixture
async def database(schema_url: str) -> AsyncIterator[Database]:
    """A migrated database."""
    database = Database(schema_url)
    yield database
    await database.close()


@pytest.fixture
def remover(database: Database, tmp_path: Path) -> Remover:
    """Who removes objects, of a store with nothing in it."""
    return Remover(database, CountingStorage(tmp_path / "media"))


async def rows(database: Database, *columns: Any) -> list[tuple[Any, ...]]:
    """Some columns of a table, in order."""
    async with database.snapshot() as session:
        return [tuple(row) for row in await session.execute(select(*columns).order_by(columns[0]))]


async def erase_all(retention: Retention) -> list[int]:
    """Erase until nothing is due; gives the numbers of the batches."""
    batches = [await retention.erase_some()]
    while batches[-1]:
        batches.append(await retention.erase_some())
    return batches[:-1]


async def test_nothing_that_was_said_is_left_and_every_cost_is(
    database: Database, remover: Remover, schema_url: str
) -> None:
    user_id = await create_user(database, "somebody")
    records = await create_every_kind(database, user_id, days=DAYS + 1)
    objects = {key for record in records for key in (record.output_key, record.planned_key) if key}
    objects |= {key for (key,) in await rows(database, LongText.subtitle_key)}
    objects |= {key for (key,) in await rows(database, Segment.key)}
    samples = await rows(database, VoiceSample.key, VoiceSample.remove_at)
    costs = await rows(database, *Bill.__table__.columns)
    assert await mentions(schema_url, SECRET)
    assert await Retention(database, remover, DAYS).erase_some() == 4
    assert await mentions(schema_url, SECRET) == []
    assert {key for (key,) in await rows(database, Removal.key)} == objects
    assert await rows(database, VoiceSample.key, VoiceSample.remove_at) == samples
    assert await rows(database, *Bill.__table__.columns) == costs
    usage = await rows(database, Record.id, Record.type, Record.model_name, Record.status, Record.duration_ms)
    assert [row[1:] for row in usage] == [
        (kind, "cosyvoice-v3-flash", "succeeded", 1500) for kind in ("tts", "asr", "tts", "voice")
    ]
    assert json.loads((await rows(database, Record.id, Record.input_data))[0][1]) == {
        "voice": "longanyang",
        "format": "mp3",
    }


async def test_what_is_young_or_running_or_looked_after_stays(
    database: Database, remover: Remover, schema_url: str
) -> None:
    user_id = await create_user(database, "somebody")
    await create_record(database, user_id, days=DAYS - 1)
    await create_record(database, user_id, days=DAYS + 1, status="running", finished_at=None)
    for table in (Transcription, SubmittedFile, LongText, Enrollment):
        record = await create_record(database, user_id, days=DAYS + 1)
        async with database.transaction() as session:
            await create_job(session, table, record)
    before = await mentions(schema_url, SECRET)
    assert await erase_all(Retention(database, remover, DAYS)) == []
    assert await mentions(schema_url, SECRET) == before
    assert await rows(database, Removal.key) == []


async def test_a_shorter_time_takes_what_it_covers_and_nothing_twice(database: Database, remover: Remover) -> None:
    user_id = await create_user(database)
    for days in (1, 10, 100):
        await create_record(database, user_id, days=days)
    assert await erase_all(Retention(database, remover, 50)) == [1]
    first = await rows(database, Record.id, Record.erased_at)
    assert [erased_at is not None for _, erased_at in first] == [False, False, True]
    assert await erase_all(Retention(database, remover, 5)) == [1]
    second = await rows(database, Record.id, Record.erased_at)
    assert second[2] == first[2]
    assert [erased_at is not None for _, erased_at in second] == [False, True, True]


async def test_without_a_time_everything_is_kept(database: Database, remover: Remover) -> None:
    await create_record(database, await create_user(database), days=10_000)
    retention = Retention(database, remover, None)
    await asyncio.wait_for(retention.run(), 5)
    assert await retention.erase_some() == 0
    assert await rows(database, Record.erased_at) == [(None,)]


async def create_many(database: Database, number: int) -> uuid.UUID:
    """A user with so many records that are due."""
    user_id = await create_user(database)
    record = await create_record(database, user_id, days=DAYS + 1)
    columns = [column.name for column in Record.__table__.columns if column.name not in {"id", "output_key"}]
    values = {name: getattr(record, name) for name in columns}
    async with database.transaction() as session:
        session.add_all(
            Record(**values, output_key=f"audio/tts/20260101/{uuid.uuid4()}.mp3") for _ in range(number - 1)
        )
    return user_id


async def test_the_work_is_done_in_batches(database: Database, remover: Remover) -> None:
    await create_many(database, 2 * ERASED_AT_ONCE + 3)
    assert await erase_all(Retention(database, remover, DAYS)) == [ERASED_AT_ONCE, ERASED_AT_ONCE, 3]


async def test_two_processes_share_the_work(database: Database, remover: Remover, schema_url: str) -> None:
    number = 4 * ERASED_AT_ONCE
    await create_many(database, number)
    other = Database(schema_url)
    both = await asyncio.gather(*(erase_all(Retention(each, remover, DAYS)) for each in (database, other)))
    await other.close()
    assert sum(map(sum, both)) == number
    keys = await rows(database, Removal.key)
    assert len(keys) == len(set(keys)) == number


async def test_the_background_goes_on_until_nothing_is_due_and_outlasts_a_failure(
    database: Database, remover: Remover, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention_module, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(retention_module, "FAILED_ROUND_SECONDS", 0.01)
    await create_many(database, ERASED_AT_ONCE + 1)
    retention = Retention(database, remover, DAYS)
    failures = iter([OSError()])
    erase_some = retention.erase_some

    async def stumble() -> int:
        for failure in failures:
            raise failure
        return await erase_some()

    monkeypatch.setattr(retention, "erase_some", stumble)
    with capture_logs() as logs:
        working = asyncio.create_task(retention.run())

        async def is_done() -> bool:
            return await rows(database, func.count(Record.erased_at)) == [(ERASED_AT_ONCE + 1,)]

        await until(is_done, "some are left")
        working.cancel()
        await asyncio.wait([working])
    assert [log["event"] for log in logs] == ["records_not_erased", "records_erased", "records_erased"]


async def test_what_is_due_is_found_by_an_index(database: Database) -> None:
    is_sqlite = database.engine.dialect.name == "sqlite"
    await create_many(database, 300)
    async with database.transaction() as session:
        await session.execute(update(Record).where(Record.id % 10 != 0).values(erased_at=datetime.now(UTC)))
        if not is_sqlite:
            await session.execute(text("ANALYZE records"))
        wanted = due(datetime.now(UTC) - timedelta(days=DAYS)).compile(
            dialect=database.engine.dialect, compile_kwargs={"literal_binds": True}
        )
        explain = "EXPLAIN QUERY PLAN" if is_sqlite else "EXPLAIN"
        if not is_sqlite:
            await session.execute(text("SET LOCAL enable_seqscan = off"))
        plan = "\n".join(str(row) for row in await session.execute(text(f"{explain} {wanted}".replace(":", "\\:"))))
    assert "ix_records_finished_at" in plan, plan
    assert "SCAN records" not in plan, plan
    assert "Seq Scan on records" not in plan, plan


def test_parameters_are_kept_by_name_and_nothing_else_is() -> None:
    asked = {
        "text": SECRET,
        "voice": "longanyang",
        "format": "mp3",
        "sample_rate": 24000,
        "volume": 50,
        "speech_rate": 1.0,
        "pitch_rate": 1.0,
        "instruction": SECRET,
        "file": SECRET,
        "audio_url": SECRET,
        "file_url": SECRET,
        "context": SECRET,
        "language": "zh",
        "language_hints": ["zh"],
        "prefix": SECRET,
        "bytes": 17,
        "audio_format": "wav",
        "enable_itn": False,
        "enable_words": True,
        "channel_id": [0, 1],
        "something new": SECRET,
    }
    kept = json.loads(parameters_of(json.dumps(asked)))
    assert kept.keys() == {
        "voice", "format", "sample_rate", "volume", "speech_rate", "pitch_rate", "bytes", "audio_format",
        "enable_itn", "enable_words", "channel_id",
    }  # fmt: skip
    assert kept == {name: asked[name] for name in kept}
    assert [parameters_of(odd) for odd in ("", "no JSON", "[]", '"text"')] == ["{}"] * 4


async def test_a_client_sees_what_it_cost_and_no_more(
    tmp_path: Path, sandbox: Sandbox, create_account: CreateAccount
) -> None:
    name = {"Idempotency-Key": "a-greeting"}
    with run_backend(tmp_path, sandbox.settings) as backend:
        account = await create_account(backend)
        spoken = data_of(await account.client.post(SYNTHESIZE, json=SPEECH, headers=name))
        long = await narrate(account, SECRET, subtitle="srt", format="mp3")
        data_of(await recognize(account, audio_url=spoken["audio_url"], context=SECRET))
        task_id = await submit(account, spoken["audio_url"], context=SECRET)
        await ended(account, task_id, hurried=backend)
        await Scene(backend, sandbox).rows("UPDATE records SET finished_at = '2026-01-01 00:00:00.000000'")
        before, usage, costs = await account.history(), await used(account), await exported(account)
        assert len(before["items"]) == 4
        backend.kill()
    with run_backend(tmp_path, {**sandbox.settings, "RETENTION_DAYS": "1"}) as backend:
        account.client.base_url = httpx.URL(backend.url)
        scene = Scene(backend, sandbox)
        await until(lambda: not scene.media, "something lies in the store")
        after = await account.history()
        assert [(item["id"], item["bill"]) for item in after["items"]] == [
            (item["id"], item["bill"]) for item in before["items"]
        ]
        assert not any(item.keys() & {"output_url", "output_text", "error_message"} for item in after["items"])
        shown = await record_of(account, long["record_id"])
        assert shown["erased_at"]
        assert shown["usage"]["amount"]
        assert not shown.keys() & {"output_url", "subtitle_url", "details", "transcripts", "audio_info"}
        for path in (f"/api/audio/asr/task/{task_id}", f"/api/audio/asr/task/{task_id}/subtitle"):
            assert refusal(await account.client.get(path)) == (404, "TASK_NOT_FOUND")
        assert (await account.client.get(httpx.URL(spoken["audio_url"]).path)).status_code == 404
        assert await used(account) == usage
        assert await exported(account) == costs
        everything = json.dumps([after, shown], ensure_ascii=False) + (await account.client.get(CSV)).text
        assert SECRET not in everything
        renewed = await account.client.post(SYNTHESIZE, json=SPEECH, headers=name)
        assert renewed.status_code == 200
        assert "idempotency-replayed" not in renewed.headers


async def used(account: Account) -> dict[str, Any]:
    """What the user's calls cost, by model."""
    return data_of(await account.client.get("/api/audio/usage", params={"group_by": "model"}))


async def exported(account: Account) -> list[list[str]]:
    """The lines of the file for spreadsheets, but for what was asked and heard: its fifth and sixth columns."""
    lines = csv.reader((await account.client.get(CSV)).text.splitlines())
    return [[*line[:4], *line[6:]] for line in lines]
