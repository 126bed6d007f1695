"""The history of somebody who has a million records: pages near and far, with and without filters, and his usage.

The database is filled by bulk inserts through the product's migrations and tables; a filled SQLite file is kept in the
folder of the report and used again. Every question is asked many times, all of
them in turn. Nothing is promised of the usage: it is told.
"""

import asyncio
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import uvloop
from sqlalchemy import Table, insert, text
from sqlalchemy.ext.asyncio import create_async_engine

from app.database import Database, migrate
from app.models import Bill, Record, User
from tests.bench.client import Caller
from tests.bench.plan import Stage
from tests.bench.servers import database_url, provide_database, run_backend
from tests.bench.table import Findings, Panel, Row, p99, spread
from tests.bench.tenants import let_in

RECORDS, FEW_RECORDS = 1_000_000, 50_000
PAGE_SIZE = 20
LIMIT_MS = 20.0
ROUNDS, FEW_ROUNDS = 100, 15
QUESTION_SECONDS = 2.0  # what is slow is asked less often
BATCH_ROWS = 20_000
HEAVY_USER = uuid.UUID(int=1)
LAST_CALL = datetime(2026, 11, 20, tzinfo=UTC)
BETWEEN_CALLS = timedelta(seconds=25)
TYPES = ("tts", "tts", "tts", "asr", "tts", "tts", "asr", "voice")
MODELS = {"tts": "cosyvoice-v3-flash", "asr": "qwen3-asr-flash", "voice": "voice-enrollment"}
NO_FILTER = "no filter"
FILTERS = {
    NO_FILTER: "",
    "type=tts": "&type=tts",
    "model": "&model=qwen3-asr-flash",
    "30 days": "&from=2026-10-20&to=2026-11-18",
    "type, 30 days": "&type=asr&from=2026-10-20&to=2026-11-18",
}
PAGES = (1, 10, 100, 1000)
USAGES = {
    "usage, 30 days by day": "?from=2026-10-20&to=2026-11-18",
    "usage, a year by model": "?from=2025-11-21&to=2026-11-20&group_by=model",
}


def measure(stage: Stage) -> Findings:
    """Fill a database, and ask."""
    records = stage.pick(RECORDS, FEW_RECORDS)
    with ExitStack() as stack:
        folder = stage.folder / "backend"
        settings = stack.enter_context(provide_database(stage.plan.database))
        url = database_url(folder, settings)
        began_at = time.monotonic()
        asyncio.run(_provide(url, folder, stage.plan.report, records))
        filled_seconds = time.monotonic() - began_at
        server = stack.enter_context(run_backend(folder, stage.stand_in, settings))
        [tenant] = asyncio.run(let_in(url, [HEAVY_USER]))
        took = uvloop.run(_ask_in_turn(Caller(server.port, tenant.token), stage.pick(ROUNDS, FEW_ROUNDS)))
    size = f"{records:,} records, {stage.plan.database}"
    rows = [
        Row(
            f"history, {name} ({size}): p99 ≤ {LIMIT_MS:g} ms on every page",
            "; ".join(f"page {page}: {spread(times)}" for page, times in pages.items()),
            all(p99(times) <= LIMIT_MS for times in pages.values()),
        )
        for name, pages in took.items()
        if name in FILTERS
    ]
    rows += [Row(f"{name} ({size}): told", spread(took[name][1]), None) for name in USAGES]
    shown = {f"page {page}": times for page, times in took[NO_FILTER].items()}
    note = f"the database of {records:,} records was there after {filled_seconds:.0f} s"
    return Findings(rows, [Panel(f"history, {NO_FILTER}", "ms", shown, LIMIT_MS)], [note])


async def _ask_in_turn(caller: Caller, rounds: int) -> dict[str, dict[int, list[float]]]:
    """Milliseconds of each answer, by question and page."""
    questions: dict[tuple[str, int], str] = {}
    for name, condition in FILTERS.items():
        path = f"/api/audio/history?page_size={PAGE_SIZE}{condition}"
        total = (await caller.get(path)).data["total"]
        last = -(-total // PAGE_SIZE)
        questions |= {(name, page): f"{path}&page={page}" for page in (*PAGES, last) if page <= last}
    questions |= {(name, 1): f"/api/audio/usage{condition}" for name, condition in USAGES.items()}
    took: dict[str, dict[int, list[float]]] = {}
    for _ in range(rounds):
        for (name, page), path in questions.items():
            times = took.setdefault(name, {}).setdefault(page, [])
            if sum(times) < QUESTION_SECONDS * 1000:
                times.append((await caller.get(path)).heard.whole_ms)
    caller.hang_up()
    return took


# ---- Filling


async def _provide(url: str, folder: Path, report: Path | None, records: int) -> None:
    file = folder / "data" / "app.db"
    kept = report / f"history-{records}.db" if report and url.startswith("sqlite") else None
    file.parent.mkdir(parents=True)
    if kept is not None and kept.exists():
        shutil.copyfile(kept, file)
        return
    await migrate(url)
    await _fill(url, records)
    if kept is not None:
        shutil.copyfile(file, kept)


async def _fill(url: str, records: int) -> None:
    database = Database(url)
    user = {"id": HEAVY_USER, "username": "heavy", "username_key": "heavy", "password_hash": "none", "is_active": True}
    async with database.transaction() as session:
        await session.execute(insert(User), [{**user, "created_at": LAST_CALL}])
    for first in range(1, records + 1, BATCH_ROWS):
        async with database.transaction() as session:
            connection = await session.connection()
            numbers = range(first, min(first + BATCH_ROWS, records + 1))
            await connection.execute(cast(Table, Record.__table__).insert(), list(_records(numbers, records)))
            await connection.execute(cast(Table, Bill.__table__).insert(), list(_bills(numbers, records)))
    await database.close()
    await _finish(url)


async def _finish(url: str) -> None:
    """Do what the database would do by itself some time later."""
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        if url.startswith("sqlite"):
            await connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
        else:
            await connection.execute(
                text("SELECT setval(pg_get_serial_sequence('records', 'id'), max(id)) FROM records")
            )
            await connection.execute(text("VACUUM ANALYZE"))
    await engine.dispose()


def _records(numbers: range, records: int) -> Iterator[dict[str, Any]]:
    price = Decimal("0.000014335")
    for number in numbers:
        kind = TYPES[number % len(TYPES)]
        at = LAST_CALL - BETWEEN_CALLS * (records - number)
        yield {
            "id": number,
            "user_id": HEAVY_USER,
            "type": kind,
            "model_name": MODELS[kind],
            "status": "succeeded" if number % 50 else "failed",
            "input_data": '{"text": "你好，欢迎使用语音合成服务！今天天气怎么样？", "voice": "longanyang"}',
            "output_key": f"audio/tts/{number}.mp3" if kind == "tts" else None,
            "output_text": "今天天气怎么样？" if kind == "asr" else None,
            "duration_ms": 3500,
            "unit": "second" if kind == "asr" else "character",
            "unit_price": price,
            "currency": "CNY",
            "expected_quantity": 40,
            "created_at": at,
            "sent_at": at,
            "finished_at": at,
        }


def _bills(numbers: range, records: int) -> Iterator[dict[str, Any]]:
    price = Decimal("0.000014335")
    for number in numbers:
        kind = TYPES[number % len(TYPES)]
        yield {
            "id": uuid.UUID(int=number),
            "record_id": number,
            "user_id": HEAVY_USER,
            "model": MODELS[kind],
            "unit": "second" if kind == "asr" else "character",
            "quantity": 40,
            "unit_price": price,
            "amount": 40 * price,
            "currency": "CNY",
            "estimated": False,
            "created_at": LAST_CALL - BETWEEN_CALLS * (records - number),
        }
