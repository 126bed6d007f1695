"""The provider's list of tasks: what is asked for, how it is read, and what proves whose a task is (PROTOCOL §5.3)."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from structlog.testing import capture_logs

from app.dashscope import ListedTask, TranscriptionClient, is_same_file, read_file_url
from app.dashscope.transcription import MAX_PAGES, read_report
from app.errors import AppError, ConnectionLost, InvalidApiKey, Throttled, UnclearAnswer, UpstreamError
from tests.dashscope.http_provider import Act, HttpProvider, Line, answers, refuses, throttles

MODEL = "paraformer-v2"
SENT = datetime(2026, 11, 22, 10, 30, 15, 250_000, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
UPLOAD = "oss://dashscope-instant/1/2026-11-22/5f0c8cb2.wav"


def entry(task_id: object = "task", **fields: Any) -> dict[str, Any]:
    """A task as the list shows it."""
    created = int(SENT.timestamp() * 1000)
    return {"task_id": task_id, "status": "SUCCEEDED", "model_name": MODEL, "gmt_create": created, **fields}


def page(*entries: object, **fields: Any) -> Act:
    """A page of the list."""
    return answers({"total": 9, "data": list(entries), "page_no": 1, "page_size": 100, "request_id": "r", **fields})


class Account:
    """Somebody who looks for his tasks."""

    def __init__(self, provider: HttpProvider, client: TranscriptionClient) -> None:
        self.provider, self.client, self.turns = provider, client, 0

    async def find(self) -> list[ListedTask]:
        return await self.client.find(self.provider.credential, MODEL, SENT - MINUTE, SENT + 5 * MINUTE, self.take_turn)

    async def take_turn(self) -> None:
        self.turns += 1

    @property
    def asked(self) -> list[dict[str, str]]:
        """What the provider was asked for."""
        targets = [urlsplit(request.target) for request in self.provider.requests]
        assert {target.path for target in targets} == {"/api/v1/tasks/"}
        return [{name: value for name, [value] in parse_qs(target.query).items()} for target in targets]


@pytest.fixture
async def account() -> AsyncIterator[Account]:
    """An account with a provider without a plan yet."""
    async with HttpProvider.run() as provider, provider.client() as http:
        with capture_logs():
            yield Account(provider, TranscriptionClient(http))


async def test_the_window_holds_the_time_whatever_its_zone(account: Account) -> None:
    account.provider.expect(page(entry(), total_page=1))
    assert await account.find() == [ListedTask("task", "SUCCEEDED", MODEL, SENT)]
    [asked] = account.asked
    window = {"start_time": "20261122102915", "end_time": "20261122183515"}
    assert asked == {"model_name": MODEL, **window, "page_size": "100", "page_no": "1"}


async def test_every_page_is_read_in_turn(account: Account) -> None:
    account.provider.expect(*(page(entry(f"task-{number}"), total_page=3) for number in range(3)))
    assert [task.task_id for task in await account.find()] == ["task-0", "task-1", "task-2"]
    assert [asked["page_no"] for asked in account.asked] == ["1", "2", "3"]
    assert account.turns == 3


@pytest.mark.parametrize("last", [page(), page(entry())], ids=["empty", "known"])
async def test_without_a_count_of_pages_the_last_is_the_one_without_news(account: Account, last: Act) -> None:
    account.provider.expect(page(entry()), page(entry("other")), last)
    assert len(await account.find()) == 2


async def test_a_list_without_end_is_unclear(account: Account) -> None:
    account.provider.expect(*(page(entry(f"task-{number}")) for number in range(MAX_PAGES)))
    with pytest.raises(UnclearAnswer):
        await account.find()


async def test_a_window_that_is_refused_is_left_out(account: Account) -> None:
    account.provider.expect(refuses("InvalidParameter", "start_time"), page(entry(), total_page=1))
    assert len(await account.find()) == 1
    assert account.asked[1] == {"model_name": MODEL, "page_no": "1"}


@pytest.mark.parametrize(
    ("act", "failure"),
    [
        (Line.hang_up, ConnectionLost),
        (throttles, Throttled),
        (refuses("InvalidApiKey", "", 401), InvalidApiKey),
        (answers(b"no json"), UnclearAnswer),
        (answers({"total": 0}), UnclearAnswer),
        (answers({"data": {"task_id": "a"}}), UnclearAnswer),
    ],
)
async def test_what_keeps_from_an_answer_is_raised_at_once(account: Account, act: Act, failure: type[AppError]) -> None:
    account.provider.expect(act)
    with pytest.raises(AppError) as failed:
        await account.find()
    assert type(failed.value) is failure
    assert len(account.provider.requests) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        "task",
        7,
        entry(None),
        entry(""),
        entry(".."),
        entry("a" * 129),
        entry(gmt_create=None),
        entry(gmt_create=True),
        entry(gmt_create="soon"),
        entry(gmt_create=1e300),
        entry(gmt_create=float(SENT.timestamp())),
        entry(gmt_create=int((SENT - 2 * MINUTE).timestamp() * 1000)),
        entry(gmt_create=int((SENT + 6 * MINUTE).timestamp() * 1000)),
        entry(model_name="qwen3-asr-flash-filetrans"),
        entry(model_name=None),
    ],
    ids=str,
)
async def test_what_is_unreadable_or_not_asked_for_is_left_out(account: Account, wrong: object) -> None:
    account.provider.expect(page(wrong, entry("right"), total_page=1))
    assert [task.task_id for task in await account.find()] == ["right"]


@pytest.mark.parametrize(
    ("fields", "status", "created_at"),
    [
        ({"gmt_create": str(int(SENT.timestamp() * 1000))}, "SUCCEEDED", SENT),
        ({"gmt_create": "2026-11-22 18:30:15"}, "SUCCEEDED", SENT.replace(microsecond=0)),
        ({"status": "PENDING"}, "PENDING", SENT),
        ({"status": "CANCELED"}, "FAILED", SENT),
        ({"status": "NEW"}, "RUNNING", SENT),
        ({"status": None}, "RUNNING", SENT),
    ],
)
async def test_other_spellings_are_borne(
    account: Account, fields: dict[str, Any], status: Any, created_at: datetime
) -> None:
    account.provider.expect(page(entry(**fields), total_page=1))
    assert await account.find() == [ListedTask("task", status, MODEL, created_at)]


# ---- Which file a task is about


@pytest.mark.parametrize(
    ("named", "told", "same"),
    [
        ("https://a.test/b.mp3?s=1", "https://a.test/b.mp3?s=1", True),
        ("https://a.test/b.mp3?s=1", "https://a.test/b.mp3?s=2", False),
        ("https://a.test/b.mp3?s=1", "https://a.test/b.mp3", False),
        ("https://a.test/b.mp3", "https://a.test/b.mp3?s=1", False),
        ("https://a.test/b.mp3", "https://other.test/b.mp3", False),
        ("https://a.test/b.mp3", "", False),
        (UPLOAD, UPLOAD, True),
        (UPLOAD, "https://f.test/dashscope-instant/1/2026-11-22/5f0c8cb2.wav?Expires=1&x=/a.wav", True),
        (UPLOAD, "https://f.test/dashscope-instant/1/2026-11-22/5f0c8cb3.wav", False),
        (UPLOAD, "https://f.test/x5f0c8cb2.wav", False),
        (UPLOAD, "https://f.test/a.wav?name=/5f0c8cb2.wav", False),
        (UPLOAD, "", False),
    ],
)
def test_a_file_is_known_by_its_address_and_an_upload_by_its_name(named: str, told: str, same: bool) -> None:
    assert is_same_file(named, told) is same


@pytest.mark.parametrize(
    ("results", "files"),
    [
        ([{"file_url": "a", "subtask_status": "SUCCEEDED"}], ("a",)),
        ([{"file_url": "a", "subtask_status": "FAILED"}], ("a",)),
        ([{"file_url": "a"}, {"file_url": "b"}], ("a", "b")),
        ([{"file_url": 7}, {}], ("", "")),
        (None, ()),
        ([], ()),
    ],
)
def test_a_report_tells_all_its_files(results: object, files: tuple[str, ...]) -> None:
    assert read_report({"output": {"task_status": "SUCCEEDED", "results": results}}).file_urls == files


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"transcripts": [], "file_url": "https://a.test/b.mp3"}', "https://a.test/b.mp3"),
        (b'{"file_url": ""}', None),
        (b'{"file_url": 7}', None),
        (b"{}", None),
    ],
)
def test_a_result_tells_its_file(content: bytes, told: str | None) -> None:
    assert read_file_url(content) == told


@pytest.mark.parametrize("content", [b"", b"null", b"[1]", b"\xff", b"[" * 100_000], ids=repr)
def test_a_result_that_is_none_is_told(content: bytes) -> None:
    with pytest.raises(UpstreamError):
        read_file_url(content)
