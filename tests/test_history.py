"""The history: spec 5.1."""

import re
from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from tests.conftest import Account


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
