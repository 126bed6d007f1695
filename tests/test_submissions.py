"""Submissions on both databases: announced before the provider is asked, and found again when its answer is lost."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from app.catalog import PriceList
from app.dashscope import (
    Credential,
    ListedTask,
    Submission,
    TaskReport,
    TaskStatus,
    TranscriptionClient,
    TranscriptionOrder,
)
from app.database import Database
from app.errors import (
    AppError,
    ConnectionLost,
    HandshakeTimeout,
    InvalidApiKey,
    InvalidModel,
    NoApiKey,
    NotReady,
    Throttled,
    UnclearAnswer,
    Unreachable,
    UpstreamError,
    UpstreamTimeout,
)
from app.inflight import InFlight
from app.jobs import CLAIM
from app.models import ApiKey, Bill, Record, SubmittedFile, Transcription, User
from app.ratelimit import RateLimiter
from app.services.accounts import AccountService
from app.services.calls import IdempotencyKey, Price
from app.services.collection import KEPT, TaskCollector
from app.services.delivery import AudioDelivery, AudioFile, AudioUrl, HeldAudio
from app.services.history import HistoryService
from app.services.records import RecordService
from app.services.seeking import LOST_FOR, LOST_FOR_GOOD, LOST_SO_FAR, TaskSeeker
from app.services.submissions import ClaimedFile, OpenSubmissions
from app.services.tasks import OpenTasks
from app.services.transcription import LOST_FOR_NOW, Submitted, TranscriptionService
from app.transcripts import Transcript

FILETRANS, PARAFORMER = "qwen3-asr-flash-filetrans", "paraformer-v2"
PRICE = Price("second", Decimal("0.0004"), "CNY")
FILE = "https://media.example.com/meeting.mp3?sign=a%2Bb"
OTHER = "https://media.example.com/meeting.mp3?sign=other"
UPLOAD = "oss://dashscope-instant/1/2026-11-22/5f0c8cb2-0c6f-4b5e-8d1f-2f6f0c1f2a77.wav"
NAME = IdempotencyKey("once", "digest")

on_sqlite = pytest.mark.parametrize("schema_url", ["sqlite"], indirect=True)


def key(api_key: str = "sk-own") -> Credential:
    return Credential(api_key, "wss://example.com", "https://example.com")


class Keys(AccountService):
    """Everybody's key, or what keeps us from it."""

    def __init__(self) -> None:
        self.given: Credential | AppError = key()

    async def credential(self, user_id: uuid.UUID, stored: ApiKey | None = None) -> Credential:
        if isinstance(self.given, AppError):
            raise self.given
        return self.given


class Provider(TranscriptionClient):
    """Has tasks that are about files, and answers submissions as it is told to."""

    def __init__(self) -> None:
        self.tasks: list[ListedTask] = []
        self.files: dict[str, tuple[str, ...]] = {}
        self.answer: AppError | None = None
        self.works = True
        self.trouble: AppError | None = None
        self.submitted = 0
        self.read: list[str] = []
        self.meanwhile: Callable[[], Awaitable[object]] | None = None

    def add(self, *files: str, model: str = FILETRANS, status: TaskStatus = "SUCCEEDED", created_in: float = 0) -> str:
        """Have a task about some files; gives its id."""
        task_id = str(uuid.uuid4())
        self.tasks.append(ListedTask(task_id, status, model, datetime.now(UTC) + timedelta(seconds=created_in)))
        self.files[task_id] = files
        return task_id

    async def submit(self, credential: Credential, order: TranscriptionOrder, file_url: str) -> Submission:
        self.submitted += 1
        task_id = self.add(file_url, model=order.model) if self.works else "-"
        if self.meanwhile:
            await self.meanwhile()
        if self.answer:
            raise self.answer
        return Submission(task_id, "PENDING", "request")

    async def find(
        self, credential: Credential, model: str, since: datetime, until: datetime, wait_for_turn: Any
    ) -> list[ListedTask]:
        await wait_for_turn()
        if self.trouble:
            raise self.trouble
        return [task for task in self.tasks if task.model == model and since <= task.created_at <= until]

    async def inspect(self, credential: Credential, task_id: str) -> TaskReport:
        if self.trouble:
            raise self.trouble
        self.read.append(task_id)
        [task] = [task for task in self.tasks if task.task_id == task_id]
        files = self.files[task_id]
        if task.model == PARAFORMER:
            return TaskReport(task.status, result_url=task_id, seconds=4, file_urls=files)
        return TaskReport(task.status, result_url=task_id if files else None, seconds=4, code="FILE_TOO_LARGE")

    async def fetch(self, credential: Credential, url: str, take: Callable[[bytes], Awaitable[None]]) -> None:
        transcript = Transcript(channel_id=0, text="你好。").model_dump()
        await take(json.dumps({"file_url": self.files[url][0], "transcripts": [transcript]}).encode())


class Delivery(AudioDelivery):
    """Every file is where the provider can read it."""

    def __init__(self) -> None:
        self.address = FILE

    @asynccontextmanager
    async def admitted(
        self, user_id: uuid.UUID, audio: AudioUrl | AudioFile, max_bytes: int, max_ms: int | None
    ) -> AsyncIterator[HeldAudio | str]:
        yield self.address

    @asynccontextmanager
    async def addressed(
        self, credential: Credential, model: str, audio: HeldAudio | str, *, fetched_later: bool = False
    ) -> AsyncIterator[str]:
        yield self.address


class Desk:
    """A user who has files transcribed, and a process that works for him."""

    def __init__(self, database: Database, user_id: uuid.UUID) -> None:
        self.database, self.user_id = database, user_id
        self.keys, self.provider, self.delivery, self.in_flight = Keys(), Provider(), Delivery(), InFlight()
        self.records = RecordService(database)
        self.submissions = OpenSubmissions(database, self.records)
        self.collector = TaskCollector(
            OpenTasks(database, self.records), self.keys, self.records, self.provider, RateLimiter(), self.in_flight
        )
        self.seeker = TaskSeeker(self.submissions, self.keys, self.provider, self.collector, self.in_flight)
        prices = PriceList(
            currency="CNY",
            per_10k_characters={},
            per_second={FILETRANS: PRICE.per_unit, PARAFORMER: PRICE.per_unit},
        )
        self.service = TranscriptionService(
            prices,
            database,
            self.keys,
            self.records,
            self.provider,
            self.delivery,
            self.collector,
            self.in_flight,
            self.submissions,
            self.seeker,
        )

    async def submit(self, model: str = FILETRANS, name: IdempotencyKey | None = NAME) -> Submitted:
        return await self.service.submit(self.user_id, TranscriptionOrder(model), FILE, name)

    async def lose(self, failure: AppError | None = None, *, works: bool = False) -> int:
        """Submit a file whose answer is lost, and of which there is nothing in the list; gives its record."""
        self.provider.answer, self.provider.works = failure or ConnectionLost(), works
        with pytest.raises(AppError):
            await self.submit(name=None)
        async with self.database.snapshot() as session:
            return int(await session.scalar(select(func.max(Record.id))) or 0)

    async def announce(self, file_url: str = FILE, model: str = FILETRANS) -> ClaimedFile:
        """Ask as a process that dies before it hears of an answer, or that does not hear of it yet."""
        async with self.records.running(self.user_id, "asr", model, '{"channel_id": [0]}', PRICE) as record:
            file = SubmittedFile(
                record_id=record.id,
                user_id=self.user_id,
                key_fingerprint=key().fingerprint,
                file_url=file_url,
                next_check_at=datetime.now(UTC) + CLAIM,
            )
            return await self.submissions.announce(record, file)

    async def die(self, file_url: str = FILE, model: str = FILETRANS) -> int:
        """Ask as a process that died a while ago; gives the record."""
        claimed = await self.announce(file_url, model)
        await self.change(claimed_until=datetime.now(UTC) - timedelta(seconds=1))
        return claimed.record.id

    async def change(self, **values: Any) -> None:
        async with self.database.transaction() as session:
            await session.execute(update(SubmittedFile).values(**values))

    async def grow_old(self, age: timedelta = LOST_FOR + timedelta(seconds=1)) -> None:
        """Let everything have been sent that long ago; tasks are as old."""
        sent_at = datetime.now(UTC) - age
        async with self.database.transaction() as session:
            await session.execute(update(Record).values(sent_at=sent_at, created_at=sent_at))

    async def record(self, record_id: int) -> Record:
        async with self.database.snapshot() as session:
            return await session.get_one(Record, record_id)

    async def state(self, record_id: int) -> tuple[str, str | None, str | None, bool]:
        """A record's status and error, its task, and whether that is looked for."""
        async with self.database.snapshot() as session:
            record = await session.get_one(Record, record_id)
            task = await session.get(Transcription, record_id)
            file = await session.get(SubmittedFile, record_id)
        return record.status, record.error, task.task_id if task else None, file is not None

    async def collect(self, record_id: int) -> list[tuple[int, bool]]:
        """Have the task's end looked at; gives the bills."""
        assert await self.collector.check(record_id) is None
        async with self.database.snapshot() as session:
            bills = await session.scalars(select(Bill).where(Bill.record_id == record_id))
            return [(bill.quantity, bill.estimated) for bill in bills]


@pytest.fixture
async def desk(schema_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    """A process on an empty database, with a user."""
    monkeypatch.setattr("app.services.collection.QUERY_RATE", "1000/second")
    monkeypatch.setattr("app.services.transcription.SEEK_PAUSES_SECONDS", (0.0, 0.01))
    database = Database(schema_url)
    user = User(username="u", username_key="u", password_hash="-", created_at=datetime.now(UTC))
    async with database.transaction() as session:
        session.add(user)
    desk = Desk(database, user.id)
    with capture_logs():
        yield desk
        await desk.in_flight.drain(1)
    await database.close()


# ---- While the provider is asked


async def test_a_submission_is_written_down_before_the_provider_is_asked(desk: Desk) -> None:
    seen: list[Any] = []

    async def look() -> None:
        async with desk.database.snapshot() as session:
            [record], [file] = await session.scalars(select(Record)), await session.scalars(select(SubmittedFile))
        seen.append((record.status, record.lease_expires_at, record.sent_at is None, file.record_id, file.file_url))
        assert file.claimed_until is not None
        assert await desk.submissions.claim(record.id) is None

    desk.provider.meanwhile = look
    submitted = await desk.submit()
    assert seen == [("running", None, False, submitted.record_id, FILE)]
    assert submitted == Submitted(submitted.record_id, desk.provider.tasks[0].task_id, "PENDING")
    assert await desk.state(submitted.record_id) == ("running", None, submitted.task_id, False)
    assert await desk.collect(submitted.record_id) == [(4, False)]


@pytest.mark.parametrize(
    "refusal", [InvalidModel("没有"), InvalidApiKey(), Throttled(), Unreachable(), HandshakeTimeout()]
)
async def test_a_refusal_ends_the_record_and_is_not_looked_for(desk: Desk, refusal: AppError) -> None:
    desk.provider.answer, desk.provider.works = refusal, False
    with pytest.raises(type(refusal)) as told:
        await desk.submit()
    assert told.value.message == refusal.message
    async with desk.database.snapshot() as session:
        [record] = await session.scalars(select(Record))
    assert await desk.state(record.id) == ("failed", refusal.code, None, False)
    assert (record.error_message, record.idempotency_key) == (refusal.message, None)


@on_sqlite
async def test_who_blames_himself_for_an_error_is_not_looked_at(desk: Desk) -> None:
    blamed = UpstreamError("百炼平台内部错误")
    blamed.is_its_fault = True
    record_id = await desk.lose(blamed)
    assert await desk.state(record_id) == ("failed", "UPSTREAM_ERROR", None, False)
    assert (await desk.record(record_id)).error_message == blamed.message


@pytest.mark.parametrize("model", [FILETRANS, PARAFORMER])
@pytest.mark.parametrize("failure", [ConnectionLost(), UpstreamTimeout(), UnclearAnswer()])
async def test_a_task_whose_answer_is_lost_is_found_while_the_client_waits(
    desk: Desk, failure: AppError, model: str
) -> None:
    desk.provider.answer = failure
    submitted = await desk.submit(model)
    assert submitted == Submitted(submitted.record_id, desk.provider.tasks[0].task_id, "PENDING")
    assert await desk.state(submitted.record_id) == ("running", None, submitted.task_id, False)
    assert await desk.collect(submitted.record_id) == [(4, False)]
    assert await desk.state(submitted.record_id) == ("succeeded", None, submitted.task_id, False)
    assert desk.provider.submitted == 1


@pytest.mark.parametrize("failure", [ConnectionLost(), UpstreamTimeout(), UnclearAnswer()])
async def test_a_task_that_turns_up_later_corrects_what_was_told(desk: Desk, failure: AppError) -> None:
    desk.provider.answer, desk.provider.works = failure, False
    with pytest.raises(type(failure), match=LOST_FOR_NOW) as told:
        await desk.submit()
    assert told.value.status == failure.status
    async with desk.database.snapshot() as session:
        [record] = await session.scalars(select(Record))
    history = HistoryService(desk.database)
    assert await desk.state(record.id) == ("failed", failure.code, None, True)
    assert (record.error_message, record.idempotency_key) == (LOST_FOR_NOW, "once")
    with pytest.raises(AppError) as repeated:
        desk.service.recall(await history.find(desk.user_id, record.id))
    assert (repeated.value.code, repeated.value.message) == (failure.code, LOST_FOR_NOW)
    task_id = desk.provider.add(FILE)
    assert await desk.seeker.check(record.id) is None
    assert await desk.state(record.id) == ("running", None, task_id, False)
    assert desk.service.recall(await history.find(desk.user_id, record.id)).task_id == task_id
    assert await desk.collect(record.id) == [(4, False)]
    found = await desk.record(record.id)
    assert (found.status, found.error, found.error_message, found.output_text) == ("succeeded", None, None, "你好。")


@on_sqlite
async def test_a_process_that_is_about_to_end_leaves_the_search_to_others(desk: Desk) -> None:
    asked = asyncio.Event()

    async def hang() -> None:
        asked.set()
        await asyncio.sleep(3600)

    desk.provider.meanwhile = hang
    working = asyncio.create_task(desk.submit())
    await asked.wait()
    for task in list(desk.in_flight._tasks):
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    async with desk.database.snapshot() as session:
        [record] = await session.scalars(select(Record))
    assert await desk.state(record.id) == ("interrupted", "NOT_READY", None, True)
    await desk.seeker.check(record.id)
    assert await desk.state(record.id) == ("running", None, desk.provider.tasks[0].task_id, False)


async def test_a_database_that_is_away_when_the_answer_comes_loses_no_task(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.database.WRITE_RETRY_SECONDS", (0.0, 0.0))
    settle, away = desk.submissions.settle, OperationalError("DELETE", None, Exception("away"))

    async def refuse(*_: object) -> None:
        raise away

    monkeypatch.setattr(desk.submissions, "settle", refuse)
    with pytest.raises(OperationalError):
        await desk.submit()
    monkeypatch.setattr(desk.submissions, "settle", settle)
    async with desk.database.snapshot() as session:
        [record_id] = await session.scalars(select(Record.id))
    assert await desk.state(record_id) == ("running", None, None, True)
    await desk.change(claimed_until=datetime.now(UTC) - timedelta(seconds=1))
    await desk.seeker.check(record_id)
    assert await desk.state(record_id) == ("running", None, desk.provider.tasks[0].task_id, False)
    assert await desk.collect(record_id) == [(4, False)]


# ---- What dead processes leave behind


@pytest.mark.parametrize(("file_url", "model"), [(FILE, FILETRANS), (FILE, PARAFORMER), (UPLOAD, FILETRANS)])
async def test_the_task_of_a_dead_process_is_found(desk: Desk, file_url: str, model: str) -> None:
    told = f"https://dashscope-file.example.com/{UPLOAD[6:]}?Expires=1" if file_url == UPLOAD else FILE
    desk.provider.add(OTHER, model=model)
    task_id = desk.provider.add(told, model=model)
    record_id = await desk.die(file_url, model)
    assert await desk.seeker.check(record_id) is None
    assert await desk.state(record_id) == ("running", None, task_id, False)
    assert await desk.collect(record_id) == [(4, False)]


async def test_a_record_is_told_interrupted_until_its_task_turns_up(desk: Desk) -> None:
    record_id = await desk.die()
    assert await desk.seeker.check(record_id) is None
    assert await desk.state(record_id) == ("interrupted", "NOT_READY", None, True)
    assert (await desk.record(record_id)).error_message == LOST_SO_FAR
    task_id = desk.provider.add(FILE, created_in=30)
    assert await desk.seeker.check(record_id) is None
    assert await desk.state(record_id) == ("running", None, task_id, False)


@pytest.mark.parametrize("lost", [False, True])
async def test_what_does_not_turn_up_is_given_up_with_the_truth(desk: Desk, lost: bool) -> None:
    record_id = await desk.lose() if lost else await desk.die()
    assert await desk.seeker.check(record_id) is None
    assert (await desk.state(record_id))[3]
    await desk.grow_old()
    assert await desk.seeker.check(record_id) is None
    assert await desk.state(record_id) == ("failed" if lost else "interrupted", "TIMEOUT", None, False)
    assert (await desk.record(record_id)).error_message == LOST_FOR_GOOD
    assert await desk.submissions.due(10) == []


@on_sqlite
@pytest.mark.parametrize("trouble", [ConnectionLost(), Throttled(), NoApiKey()])
async def test_trouble_ends_the_record_but_not_the_search(desk: Desk, trouble: AppError) -> None:
    record_id = await desk.die()
    if isinstance(trouble, NoApiKey):
        desk.keys.given = trouble
    desk.provider.trouble = trouble
    await desk.grow_old()
    for _ in range(2):
        assert await desk.seeker.check(record_id) is trouble
        assert await desk.state(record_id) == ("interrupted", "NOT_READY", None, True)
    desk.keys.given, desk.provider.trouble = key(), None
    task_id = desk.provider.add(FILE, created_in=-LOST_FOR.total_seconds())
    assert await desk.seeker.check(record_id) is None
    assert await desk.state(record_id) == ("running", None, task_id, False)


@on_sqlite
async def test_trouble_without_end_ends_the_search(desk: Desk) -> None:
    record_id = await desk.die()
    desk.provider.trouble = ConnectionLost()
    await desk.grow_old(KEPT + timedelta(seconds=1))
    await desk.seeker.check(record_id)
    assert (await desk.state(record_id))[2:] == (None, False)


@on_sqlite
async def test_a_silent_provider_does_not_keep_the_record_open(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.services.seeking.FIRST_LOOK_SECONDS", 0.05)

    async def hang(*_: object) -> list[ListedTask]:
        await asyncio.sleep(3600)
        return []

    monkeypatch.setattr(desk.provider, "find", hang)
    record_id = await desk.die()
    assert isinstance(await desk.seeker.check(record_id), UpstreamTimeout)
    assert await desk.state(record_id) == ("interrupted", "NOT_READY", None, True)


@on_sqlite
async def test_that_another_key_sees_nothing_says_nothing(desk: Desk) -> None:
    record_id = await desk.die()
    desk.keys.given = key("sk-of-another-account")
    await desk.grow_old()
    await desk.seeker.check(record_id)
    assert (await desk.state(record_id))[3]
    await desk.grow_old(KEPT + timedelta(seconds=1))
    await desk.seeker.check(record_id)
    assert not (await desk.state(record_id))[3]


# ---- Other people's tasks


STRANGERS: dict[str, Callable[[Provider], str]] = {
    "another file": lambda provider: provider.add(OTHER),
    "another model": lambda provider: provider.add(FILE, model=PARAFORMER),
    "long before": lambda provider: provider.add(FILE, created_in=-400),
    "long after": lambda provider: provider.add(FILE, created_in=600),
    "failed without a word": lambda provider: provider.add(status="FAILED"),
    "unknown": lambda provider: provider.add(FILE, status="UNKNOWN"),
}


@on_sqlite
@pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS.keys())
async def test_a_task_that_is_not_surely_ours_is_nobody_s(desk: Desk, stranger: Callable[[Provider], str]) -> None:
    stranger(desk.provider)
    record_id = await desk.die()
    await desk.seeker.check(record_id)
    assert (await desk.state(record_id))[2:] == (None, True)
    await desk.grow_old()
    await desk.seeker.check(record_id)
    assert (await desk.state(record_id))[2:] == (None, False)


@on_sqlite
async def test_a_task_of_several_files_is_not_ours(desk: Desk) -> None:
    desk.provider.add(FILE, OTHER, model=PARAFORMER)
    record_id = await desk.die(model=PARAFORMER)
    await desk.seeker.check(record_id)
    assert (await desk.state(record_id))[2:] == (None, True)


@on_sqlite
async def test_an_upload_of_another_name_is_not_ours(desk: Desk) -> None:
    desk.provider.add(UPLOAD.replace("5f0c8cb2", "5f0c8cb3"))
    record_id = await desk.die(UPLOAD)
    await desk.seeker.check(record_id)
    assert (await desk.state(record_id))[2:] == (None, True)


@on_sqlite
async def test_a_task_under_way_is_waited_for(desk: Desk) -> None:
    task_id = desk.provider.add(FILE, status="RUNNING")
    record_id = await desk.die()
    await desk.grow_old()
    [running] = desk.provider.tasks
    old = running.created_at - LOST_FOR
    desk.provider.tasks = [ListedTask(task_id, "RUNNING", FILETRANS, old)]
    await desk.seeker.check(record_id)
    assert await desk.state(record_id) == ("interrupted", "NOT_READY", None, True)
    assert desk.provider.read == []
    desk.provider.tasks = [ListedTask(task_id, "SUCCEEDED", FILETRANS, old)]
    await desk.seeker.check(record_id)
    assert await desk.state(record_id) == ("running", None, task_id, False)


@on_sqlite
async def test_what_a_stranger_is_about_is_asked_once(desk: Desk) -> None:
    strangers = {desk.provider.add(OTHER) for _ in range(3)}
    record_id = await desk.die()
    for _ in range(3):
        await desk.seeker.check(record_id)
    assert sorted(desk.provider.read) == sorted(strangers)


@on_sqlite
async def test_many_strangers_are_looked_at_by_and_by(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.services.seeking.READ_AT_ONCE", 2)
    for _ in range(4):
        desk.provider.add(OTHER)
    task_id = desk.provider.add(FILE)
    record_id = await desk.die()
    await desk.grow_old(timedelta(seconds=30))
    for _ in range(2):
        await desk.seeker.check(record_id)
        assert (await desk.state(record_id))[2:] == (None, True)
    await desk.seeker.check(record_id)
    assert (await desk.state(record_id))[2:] == (task_id, False)


# ---- Several submissions of one file


async def test_each_of_two_lost_submissions_of_a_file_gets_one_task(desk: Desk) -> None:
    records = [await desk.die() for _ in range(2)]
    task_ids = {desk.provider.add(FILE) for _ in range(2)}
    for record_id in records:
        await desk.seeker.check(record_id)
    assert {(await desk.state(record_id))[2] for record_id in records} == task_ids


async def test_of_two_who_find_one_task_at_once_one_gets_it(desk: Desk) -> None:
    records = [await desk.die() for _ in range(2)]
    task_id, now = desk.provider.add(FILE), datetime.now(UTC)
    claims = [claimed for record_id in records if (claimed := await desk.submissions.claim(record_id))]

    def task(claimed: ClaimedFile) -> Transcription:
        owner: dict[str, Any] = {"record_id": claimed.record.id, "user_id": desk.user_id, "key_fingerprint": "-"}
        return Transcription(**owner, task_id=task_id, status="RUNNING", submitted_at=now, next_check_at=now)

    got = await asyncio.gather(*(desk.submissions.adopt(claimed, task(claimed)) for claimed in claims))
    assert sorted(got) == [False, True]
    async with desk.database.snapshot() as session:
        assert list(await session.scalars(select(Transcription.task_id))) == [task_id]


async def test_a_task_whose_answer_may_yet_come_is_left_to_it(desk: Desk) -> None:
    lost = await desk.die()
    waiting = await desk.announce()
    task_id = desk.provider.add(FILE)
    await desk.seeker.check(lost)
    assert (await desk.state(lost))[2:] == (None, True)
    now = datetime.now(UTC)
    answered = Transcription(
        record_id=waiting.record.id,
        user_id=desk.user_id,
        task_id=task_id,
        key_fingerprint="-",
        status="PENDING",
        submitted_at=now,
        next_check_at=now,
    )
    await desk.submissions.settle(waiting, answered)
    await desk.seeker.check(lost)
    assert (await desk.state(lost))[2:] == (None, True)
    assert (await desk.state(waiting.record.id))[2:] == (task_id, False)


async def test_an_answer_that_comes_after_all_counts(desk: Desk) -> None:
    claimed = await desk.announce()
    await desk.change(claimed_until=datetime.now(UTC) - timedelta(seconds=1))
    await desk.seeker.check(claimed.record.id)
    assert (await desk.state(claimed.record.id))[0] == "interrupted"
    for _ in range(2):
        now = datetime.now(UTC)
        task = Transcription(
            record_id=claimed.record.id,
            user_id=desk.user_id,
            task_id="task",
            key_fingerprint="-",
            status="PENDING",
            submitted_at=now,
            next_check_at=now,
        )
        await desk.submissions.settle(claimed, task)
        assert await desk.state(claimed.record.id) == ("running", None, "task", False)
    await desk.submissions.fail(claimed, "failed", NotReady())
    await desk.submissions.despair(claimed, "failed", NotReady())
    assert await desk.state(claimed.record.id) == ("running", None, "task", False)
