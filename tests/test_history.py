"""The history: spec 5.1; filtered, and as a file for spreadsheets."""

import csv
import io
import json
import re
import uuid
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from app.database import Database
from app.routers.history_csv import SUMMARY_CHARS, _plain, _summary
from app.services.history import LINES_AT_ONCE, HistoryService
from app.services.period import Period
from app.services.selection import HistoryFilter
from app.services.usage import UsageService, total_of
from tests.cloning import CREATE, PUBLIC_SAMPLE
from tests.conftest import Account
from tests.databases import moment, rows
from tests.narrating import record_of
from tests.servers import Server
from tests.test_usage import add_user, fill

CSV = "/api/audio/history.csv"


async def test_an_item_holds_what_belongs_to_its_type(account: Account) -> None:
    spoken = (await account.synthesize("你好", voice="longanhuan")).json()["data"]
    history = await account.history()
    assert {name: history[name] for name in ("total", "page", "page_size")} == {"total": 1, "page": 1, "page_size": 20}
    [item] = history["items"]
    assert item.keys() == {
        "id",
        "type",
        "model_name",
        "input_data",
        "output_url",
        "duration",
        "bill",
        "created_at",
    }
    assert (item["id"], item["type"], item["model_name"]) == (spoken["record_id"], "tts", "cosyvoice-v3-flash")
    assert (item["output_url"], item["duration"]) == (spoken["audio_url"], spoken["duration"])
    assert '"text": "你好"' in item["input_data"]
    assert '"voice": "longanhuan"' in item["input_data"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", item["created_at"])
    zone = ZoneInfo("Asia/Shanghai")
    age = datetime.now(zone) - datetime.fromisoformat(item["created_at"]).replace(tzinfo=zone)
    assert 0 <= age.total_seconds() < 60
    assert f"/audio/tts/{datetime.now(zone):%Y%m%d}/" in item["output_url"]


async def test_pages_are_newest_first_and_do_not_overlap(account: Account) -> None:
    ids = [(await account.synthesize(f"第{number}句")).json()["data"]["record_id"] for number in range(5)]
    pages = [await account.history(page=page, page_size=2) for page in (1, 2, 3, 4)]
    assert [[item["id"] for item in page["items"]] for page in pages] == [ids[4:2:-1], ids[2:0:-1], ids[:1], []]
    assert {page["total"] for page in pages} == {5}


async def test_the_type_filter_counts_only_its_own(account: Account) -> None:
    await account.synthesize("你好")
    assert (await account.history(type="tts"))["total"] == 1
    for kind in ("asr", "voice"):
        assert await account.history(type=kind) == {"items": [], "total": 0, "page": 1, "page_size": 20}


@pytest.mark.parametrize("query", [{"page": 0}, {"page_size": 0}, {"page_size": 101}, {"type": "x"}, {"page": "a"}])
async def test_bounds_are_told(account: Account, query: dict[str, str]) -> None:
    answer = await account.client.get("/api/audio/history", params=query)
    assert (answer.status_code, answer.json()["error"]) == (400, "INVALID_REQUEST")
    assert next(iter(query)) in answer.json()["message"]


# ---- Filters


def shift(server: Server, record_id: int, days: int) -> None:
    """Have a record be older."""
    [(created_at,)] = rows(server, "SELECT created_at FROM records WHERE id = ?", record_id)
    moved = moment(created_at) - timedelta(days=days)
    rows(server, "UPDATE records SET created_at = ? WHERE id = ?", moved, record_id)


async def test_days_and_models_filter_together(backend: Server, account: Account) -> None:
    spoken = [(await account.synthesize(text)).json()["data"]["record_id"] for text in ("一", "二", "三")]
    models = {"model": "cosyvoice-v2", "voice": "longxiaochun_v2"}
    other = (await account.synthesize("四", **models)).json()["data"]["record_id"]
    for record_id, days in zip(spoken, (3, 2, 1), strict=True):
        shift(backend, record_id, days)
    today = datetime.now(ZoneInfo("Asia/Shanghai")).date()
    day = {ago: (today - timedelta(days=ago)).isoformat() for ago in range(5)}
    wanted: list[tuple[dict[str, str], list[int]]] = [
        ({}, [other, *reversed(spoken)]),
        ({"from": day[2]}, [other, spoken[2], spoken[1]]),
        ({"to": day[2]}, [spoken[1], spoken[0]]),
        ({"from": day[2], "to": day[1]}, [spoken[2], spoken[1]]),
        ({"from": day[4], "to": day[4]}, []),
        ({"model": "cosyvoice-v2"}, [other]),
        ({"model": "cosyvoice-v3-flash", "from": day[1], "type": "tts"}, [spoken[2]]),
        ({"model": "cosyvoice-v3-flash", "type": "asr"}, []),
        ({"model": "nothing"}, []),
    ]
    for query, expected in wanted:
        history = await account.history(**query)
        assert [item["id"] for item in history["items"]] == expected, query
        assert history["total"] == len(expected)
        assert (await account.history(**query, page=2, page_size=1))["total"] == len(expected)
        assert [int(row["记录ID"]) for row in await exported(account, **query)] == expected, query


# ---- CSV


async def exported(account: Account, **query: str) -> list[dict[str, str]]:
    """The rows of the file that the user gets, by column."""
    answer = await account.client.get(CSV, params=query)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["content-disposition"] == 'attachment; filename="history.csv"'
    assert answer.content.startswith(b"\xef\xbb\xbf")
    rows = [*csv.reader(io.StringIO(answer.content.decode("utf-8-sig"), newline=""))]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


async def test_a_row_tells_everything_of_a_call(account: Account) -> None:
    text = '他说："你好，\n世界"'
    spoken = (await account.synthesize(text)).json()["data"]
    record = await record_of(account, spoken["record_id"])
    [row] = await exported(account)
    assert row == {
        "记录ID": str(record["id"]),
        "类型": "tts",
        "模型": "cosyvoice-v3-flash",
        "状态": "succeeded",
        "输入": text,
        "输出": spoken["audio_url"],
        "音色ID": "",
        "时长（秒）": str(spoken["duration"]),
        "计费单位": "character",
        "数量": str(spoken["characters"]),
        "单价": "0.000014335",
        "精确金额": record["usage"]["amount"],
        "是否估算": "否",
        "币种": "CNY",
        "创建时间": record["created_at"].replace("T", " "),
        "结束时间": record["finished_at"].replace("T", " "),
        "百炼请求ID": record["usage"]["provider_request_id"],
    }


async def test_every_type_has_its_row_and_the_amounts_are_those_of_the_usage(account: Account) -> None:
    await account.synthesize("你好")
    heard = {"model": "qwen3-asr-flash", "audio_url": PUBLIC_SAMPLE}
    recognized = (await account.client.post("/api/audio/asr/recognize", json=heard)).json()["data"]
    voice = {"audio_url": PUBLIC_SAMPLE, "target_model": "cosyvoice-v3-flash", "prefix": "mine"}
    made = (await account.client.post(CREATE, json=voice)).json()["data"]
    rows = await exported(account)
    assert [row["类型"] for row in rows] == ["voice", "asr", "tts"]
    assert rows[0]["音色ID"] == made["voice_id"]
    assert [row["输入"] for row in rows] == [PUBLIC_SAMPLE, PUBLIC_SAMPLE, "你好"]
    assert rows[1]["输出"] == recognized["text"]
    total = (await account.client.get("/api/audio/usage")).json()["data"]["total"]
    assert sum(Decimal(row["精确金额"]) for row in rows) == Decimal(total["amount"]) > 0
    counted = {row["计费单位"]: int(row["数量"]) for row in rows[1:]}
    assert counted == {"second": total["seconds"], "character": total["characters"]}


async def test_no_text_becomes_a_formula(account: Account) -> None:
    formulas = ["=1+1", "+8613800000000好", "-2+3", "@SUM(1)", "\t=1", "\r=1"]
    for text in formulas:
        assert (await account.synthesize(text)).status_code == 200
    rows = await exported(account)
    assert [row["输入"] for row in rows] == [f"'{text}" for text in reversed(formulas)]
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for row in rows for cell in row.values())


@pytest.mark.parametrize("text", ["a=1", "1+1", "", "'=1", " =1", "好-"])
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert _plain(text) == text


async def test_who_has_done_nothing_gets_the_columns_alone(account: Account) -> None:
    assert await exported(account) == []
    assert len((await account.client.get(CSV)).content.decode("utf-8-sig").splitlines()) == 1


@pytest.mark.parametrize("query", [{"type": "x"}, {"model": "m" * 65}])
async def test_the_filters_have_bounds(account: Account, query: dict[str, str]) -> None:
    answer = await account.client.get(CSV, params=query)
    assert (answer.status_code, answer.json()["error"]) == (400, "INVALID_REQUEST")
    assert next(iter(query)) in answer.json()["message"]


def test_the_beginning_of_what_was_asked_is_understood_wherever_it_is_cut() -> None:
    text = '“引"号\\反斜\n换行\x7f\u2028🙂' * 2
    asked = json.dumps({"text": text, "voice": "v"}, ensure_ascii=False)
    begun = len('{"text": "')
    for cut in range(begun, len(asked)):
        shown = _summary(asked[:cut])
        assert text.startswith(shown)
        assert len(shown) >= min(len(text), (cut - begun) // 6)
    assert _summary(asked) == text


def test_a_long_text_is_cut() -> None:
    shown = _summary(json.dumps({"text": "好" * 10_000}, ensure_ascii=False)[:5000])
    assert shown == "好" * SUMMARY_CHARS + "……"


@pytest.mark.parametrize("period", [None, Period(None, None, UTC)])
async def test_all_records_come_once_and_nothing_stays_open_between(schema_url: str, period: Period | None) -> None:
    database = Database(schema_url)
    try:
        now = datetime(2026, 11, 20, 12, tzinfo=UTC)
        mine, others = await add_user(database), await add_user(database)
        moments = [now - timedelta(hours=number // 7) for number in range(LINES_AT_ONCE * 2 + 50)]
        await fill(database, mine, moments)
        await fill(database, others, moments[:20])
        seen: list[Any] = []
        batches = 0
        async for lines in HistoryService(database).lines(mine, HistoryFilter(period=period)):
            assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
            seen += lines
            batches += 1
            await fill(database, mine, [now + timedelta(days=1)])
        assert batches == 3
        assert len({line.call.record.id for line in seen}) == len(seen) == len(moments)
        order = [(line.call.record.created_at, line.call.record.id) for line in seen]
        assert order == sorted(order, reverse=True)
        whole = Period((now - timedelta(days=60)).date(), now.date(), ZoneInfo("UTC"))
        usage = total_of((await UsageService(database).sum_up(mine, whole, "type")).values())
        assert sum((line.call.amount for line in seen), Decimal(0)) == usage.amount
    finally:
        await database.close()


async def test_one_sees_only_his_own(account: Account) -> None:
    await account.synthesize("你好")
    stranger = {"Authorization": f"Bearer {uuid.uuid4()}"}
    assert (await account.client.get(CSV, headers=stranger)).status_code == 401
