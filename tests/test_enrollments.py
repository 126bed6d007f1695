"""Voices that are being made, on both databases: how that ends, how lost ones are found, how long they are followed."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import time_machine
from sqlalchemy import inspect, select
from sqlalchemy.exc import IntegrityError
from structlog.testing import capture_logs

from app.dashscope import Credential, EnrollmentClient, VoiceReport, VoiceStatus
from app.database import Database
from app.errors import AppError, ConnectionLost, InvalidApiKey, NoApiKey, UpstreamError, VoiceNotFound
from app.inflight import InFlight
from app.jobs import CLAIM, FAILED_CHECK_SECONDS, NO_KEY_SECONDS, again_in
from app.models import ApiKey, Enrollment, Record, User, VoiceSample
from app.services.accounts import AccountService
from app.services.cloning import FREE
from app.services.enrollments import ClaimedEnrollment, OpenEnrollments
from app.services.following import (
    FOLLOWED_FOR,
    GONE_BELIEVED,
    HOPELESS,
    LONGEST_INTERVAL_SECONDS,
    LOST_FOR,
    VoiceFollower,
)
from app.services.records import RecordService
from app.services.voicebook import LAG, VoiceBook

MODEL = "cosyvoice-v3-flash"
A, B = f"{MODEL}-my-a", f"{MODEL}-my-b"
CREATED = datetime(2026, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)

on_sqlite = pytest.mark.parametrize("schema_url", ["sqlite"], indirect=True)


def key(api_key: str = "sk-own") -> Credential:
    return Credential(api_key, "wss://example.com", "https://example.com")


def report(voice_id: str, status: VoiceStatus = "DEPLOYING", modified_in: float = 0) -> VoiceReport:
    return VoiceReport(voice_id, status, CREATED, CREATED + timedelta(seconds=modified_in))


class Keys(AccountService):
    """Everybody's key, or what keeps us from it."""

    def __init__(self) -> None:
        self.given: Credential | AppError = key()

    async def credential(self, user_id: uuid.UUID, stored: ApiKey | None = None) -> Credential:
        if isinstance(self.given, AppError):
            raise self.given
        return self.given


class Provider(EnrollmentClient):
    """Says of voices what it is told to say; its list takes no notice of prefixes."""

    def __init__(self) -> None:
        self.voices: list[VoiceReport] = []
        self.trouble: AppError | None = None
        self.meanwhile: Callable[[], Awaitable[object]] | None = None

    async def find(self, credential: Credential, prefix: str | None = None) -> list[VoiceReport]:
        listed = list(self.voices)
        if self.meanwhile:
            await self.meanwhile()
        if self.trouble:
            raise self.trouble
        return listed

    async def query(self, credential: Credential, voice_id: str) -> VoiceReport:
        if self.trouble:
            raise self.trouble
        for each in self.voices:
            if each.voice_id == voice_id:
                return each
        raise VoiceNotFound


class Desk:
    """Orders of one user, and a process that looks after them."""

    def __init__(self, database: Database, user_id: uuid.UUID) -> None:
        self.database = database
        self.user_id = user_id
        self.records = RecordService(database)
        self.enrollments = OpenEnrollments(database, self.records)
        self.keys = Keys()
        self.provider = Provider()
        self.in_flight = InFlight()
        self.book = VoiceBook(database, self.provider, self.in_flight)
        self.follower = VoiceFollower(self.enrollments, self.book, self.keys, self.provider, self.in_flight)

    async def announce(self, model: str = MODEL, prefix: str = "my", before: list[str] | None = None) -> Any:
        """Order a voice; the answer is not there yet."""
        now = datetime.now(UTC)
        owner: dict[str, Any] = {"user_id": self.user_id, "account": key().account}
        async with self.records.running(self.user_id, "voice", model, "{}", FREE) as record:
            order = {"target_model": model, "prefix": prefix, "digest": "d", "voices_before": json.dumps(before or [])}
            row = Enrollment(record_id=record.id, **owner, **order, next_check_at=now + CLAIM)
            claimed = await self.enrollments.announce(record, row)
        async with self.database.transaction() as session:
            session.add(VoiceSample(key=f"sample-{record.id}", record_id=record.id, **owner, remove_at=now + MINUTE))
        return claimed

    async def lose(self, **order: Any) -> int:
        """Order a voice whose answer is lost; gives its record."""
        claimed = await self.announce(**order)
        await self.enrollments.lose(claimed)
        await self.enrollments.put_back(claimed, again_in(0))
        return int(claimed.record.id)

    async def make(self, voice_id: str = A, **order: Any) -> int:
        """Order a voice that is followed from now on; gives its record."""
        claimed = await self.announce(**order)
        assert await self.enrollments.succeed(claimed, voice_id)
        await self.book.note(key().account, report(voice_id), datetime.now(UTC))
        return int(claimed.record.id)

    async def seek(self, record_id: int) -> str | None:
        claimed = await self.enrollments.claim(record_id)
        assert claimed is not None
        found = await self.follower.seek(claimed, key())
        await self.enrollments.put_back(claimed, again_in(0))
        return found.voice_id

    async def check(self, record_id: int) -> AppError | None:
        return await self.follower.check(record_id)

    async def row(self, record_id: int) -> Enrollment:
        row = await self.enrollments.find(record_id)
        assert row is not None
        return row

    async def waits(self, record_id: int, since: datetime | None = None) -> float | None:
        """The seconds from now, or `since`, until somebody asks again; nothing when nobody does. Nobody holds it."""
        row = await self.row(record_id)
        assert (row.claimed_by, row.claimed_until) == (None, None)
        return (row.next_check_at - (since or datetime.now(UTC))).total_seconds() if row.next_check_at else None

    async def record(self, record_id: int) -> tuple[str, str | None, str | None]:
        async with self.database.snapshot() as session:
            record = await session.get_one(Record, record_id)
        return record.status, record.error, (await self.row(record_id)).voice_id

    async def sample(self, record_id: int) -> str:
        wanted = select(VoiceSample).where(VoiceSample.record_id == record_id)
        async with self.database.snapshot() as session:
            sample = (await session.scalars(wanted)).one()
        if sample.remove_at is None:
            return f"kept for {sample.voice_id}"
        return "removed" if sample.remove_at <= datetime.now(UTC) else "undecided"

    async def everything(self) -> list[Any]:
        async with self.database.snapshot() as session:
            rows = [row for table in (Record, Enrollment, VoiceSample) for row in await session.scalars(select(table))]
        return [{each.key: each.value for each in inspect(row).attrs} for row in rows]

    async def shown(self) -> dict[str, str]:
        return {each.voice_id: each.status for each in (await self.book.page(key().account, 0, 99)).voices}


@pytest.fixture
async def desk(schema_url: str) -> AsyncIterator[Desk]:
    """A process on an empty database, with a user."""
    database = Database(schema_url)
    user = User(username="u", username_key="u", password_hash="-", created_at=datetime.now(UTC))
    async with database.transaction() as session:
        session.add(user)
    desk = Desk(database, user.id)
    with capture_logs():
        yield desk
        await desk.in_flight.drain(1)
    await database.close()


@pytest.fixture
def clock() -> Iterator[time_machine.Traveller]:
    """A clock that can be put forward."""
    with time_machine.travel(datetime.now(UTC)) as clock:
        yield clock


# ---- How a making ends


End = Callable[[Desk, ClaimedEnrollment], Awaitable[object]]
ENDS: dict[str, End] = {
    "succeed": lambda desk, claimed: desk.enrollments.succeed(claimed, A),
    "fail": lambda desk, claimed: desk.enrollments.fail(claimed, "failed", UpstreamError("失败")),
    "interrupt": lambda desk, claimed: desk.enrollments.fail(claimed, "interrupted", asyncio.CancelledError()),
}
ACTS: dict[str, End] = {
    **ENDS,
    "lose": lambda desk, claimed: desk.enrollments.lose(claimed),
    "put back": lambda desk, claimed: desk.enrollments.put_back(claimed, {"misses": 9, "next_check_at": None}),
}
ENDED = {
    "succeed": (("succeeded", None, A), f"kept for {A}", True),
    "fail": (("failed", "UPSTREAM_ERROR", None), "removed", False),
    "interrupt": (("interrupted", "INTERNAL_ERROR", None), "removed", False),
}


async def test_an_order_ends_once_with_its_sample(desk: Desk) -> None:
    for name, end in ENDS.items():
        claimed = await desk.announce()
        await end(desk, claimed)
        record_id = claimed.record.id
        followed = await desk.waits(record_id) is not None
        assert (await desk.record(record_id), await desk.sample(record_id), followed) == ENDED[name]
        before = await desk.everything()
        for act in ACTS.values():
            assert not await act(desk, claimed)
        assert await desk.everything() == before


async def test_who_lost_the_claim_changes_nothing(desk: Desk, clock: time_machine.Traveller) -> None:
    for act in ACTS.values():
        stale = await desk.announce()
        clock.shift(CLAIM + timedelta(seconds=1))
        fresh = await desk.enrollments.claim(stale.record.id)
        assert fresh is not None
        before = await desk.everything()
        assert not await act(desk, stale)
        assert await desk.everything() == before
        await desk.enrollments.fail(fresh, "failed", UpstreamError())


async def test_of_many_ends_at_once_one_counts(desk: Desk) -> None:
    claimed = await desk.announce()
    ended = await asyncio.gather(*(end(desk, claimed) for end in [*ENDS.values()] * 3))
    now = await desk.record(claimed.record.id), await desk.sample(claimed.record.id)
    assert ended[:: len(ENDS)].count(True) == (now == ENDED["succeed"][:2])
    assert now in [each[:2] for each in ENDED.values()]


async def test_a_voice_belongs_to_one_order(desk: Desk) -> None:
    await desk.make(A)
    other = await desk.announce()
    with pytest.raises(IntegrityError):
        await desk.enrollments.succeed(other, A)


@on_sqlite
async def test_the_same_order_is_found_while_its_voice_is_lost(desk: Desk) -> None:
    find, account, in_flight = desk.enrollments.find_lost, key().account, await desk.announce()
    assert await find(desk.user_id, account, "d") is None
    record_id = await desk.lose()
    found = await find(desk.user_id, account, "d")
    assert found
    assert found.record_id == record_id != in_flight.record.id
    for other in ((uuid.uuid4(), account, "d"), (desk.user_id, key("sk-x").account, "d"), (desk.user_id, account, "e")):
        assert await find(*other) is None


# ---- Lost voices


async def test_a_lost_voice_is_the_oldest_new_one(desk: Desk) -> None:
    record_id = await desk.lose()
    assert await desk.seek(record_id) is None
    older = replace(report(B, "OK"), created_at=CREATED - MINUTE)
    desk.provider.voices = [report(A), older]
    assert await desk.seek(record_id) == B
    assert (await desk.record(record_id), await desk.sample(record_id)) == (("succeeded", None, B), f"kept for {B}")
    assert await desk.shown() == {B: "OK"}


@pytest.mark.parametrize("voices", [1, 2, 3])
async def test_lost_orders_never_get_the_same_voice(desk: Desk, clock: time_machine.Traveller, voices: int) -> None:
    lost = [await desk.lose() for _ in range(3)]
    clock.shift(LOST_FOR - MINUTE)
    desk.provider.voices = [report(f"{MODEL}-my-{number}") for number in range(voices)]
    for _ in lost:
        open_ones = [each for each in lost if (await desk.record(each))[0] == "running"]
        await asyncio.gather(*(desk.seek(each) for each in open_ones))
    found = [voice_id for each in lost if (voice_id := (await desk.record(each))[2])]
    assert sorted(found) == [each.voice_id for each in desk.provider.voices]
    assert [(await desk.record(each))[0] for each in lost].count("succeeded") == voices


@pytest.mark.parametrize("prefix", ["my", "MY"])
async def test_a_lost_order_waits_for_one_in_flight(desk: Desk, prefix: str) -> None:
    record_id = await desk.lose()
    in_flight = await desk.announce(prefix=prefix)
    desk.provider.voices = [report(A), report(B)]
    assert await desk.seek(record_id) is None
    assert await desk.enrollments.succeed(in_flight, A)
    assert await desk.seek(record_id) == B


async def test_nobody_waits_for_orders_that_cannot_be_mistaken(desk: Desk, clock: time_machine.Traveller) -> None:
    record_id = await desk.lose()
    await desk.announce()
    clock.shift(CLAIM + timedelta(seconds=1))  # its process died
    await desk.lose()
    await desk.announce(model="cosyvoice-v3-plus")
    await desk.announce(prefix="my2")
    desk.provider.voices = [replace(report(A), created_at=CREATED - MINUTE), report(B), report(f"{MODEL}-my-c")]
    assert await desk.seek(record_id) == A


@pytest.mark.parametrize(
    ("prefix", "voice_id"),
    [
        ("my", f"{MODEL}-my-before"),
        ("my", f"{MODEL}-my-attributed"),
        ("my", "cosyvoice-v3-plus-my-a"),
        ("my", "cosyvoice-v3-my-a"),
        ("my", f"{MODEL}-myvoice-a"),
        ("myvoice", f"{MODEL}-my-a"),
        ("my", f"{MODEL}-vd-my-a"),
        ("vd", f"{MODEL}-vd-announcer-a"),
    ],
)
@on_sqlite
async def test_a_voice_that_is_of_something_else_is_never_taken(desk: Desk, prefix: str, voice_id: str) -> None:
    record_id = await desk.lose(prefix=prefix, before=[f"{MODEL}-my-before"])
    await desk.make(f"{MODEL}-my-attributed")
    desk.provider.voices = [report(voice_id)]
    assert await desk.seek(record_id) is None
    desk.provider.voices += [report(f"{MODEL}-{prefix}-0123abcd")]
    assert await desk.seek(record_id) == f"{MODEL}-{prefix}-0123abcd"


@on_sqlite
@pytest.mark.parametrize(("asked", "made"), [("My", "my"), ("my", "MY"), ("vd", "vd")])
async def test_the_provider_may_write_a_prefix_its_own_way(desk: Desk, asked: str, made: str) -> None:
    record_id = await desk.lose(prefix=asked)
    desk.provider.voices = [report(f"{MODEL}-{made}-0123abcd")]
    assert await desk.seek(record_id) == f"{MODEL}-{made}-0123abcd"


async def test_a_lost_voice_that_is_deleted_while_it_is_found_stays_deleted(desk: Desk) -> None:
    record_id = await desk.lose()
    desk.provider.voices = [report(A)]
    await desk.book.note(key().account, report(A), datetime.now(UTC))
    desk.provider.meanwhile = lambda: desk.book.forget(key().account, A)
    await desk.seek(record_id)
    assert await desk.shown() == {}


# ---- Following


@on_sqlite
async def test_a_voice_is_asked_about_ever_less_often(desk: Desk, clock: time_machine.Traveller) -> None:
    record_id = await desk.make()
    desk.provider.voices = [report(A)]
    waits = [await desk.waits(record_id)]
    for seconds in (1, 19, 80, 500):
        clock.shift(seconds)
        asked_at = datetime.now(UTC)
        assert await desk.check(record_id) is None
        waits.append(await desk.waits(record_id, asked_at))
    assert waits == [pytest.approx(each, abs=0.9) for each in (2, 2, 4, 20, LONGEST_INTERVAL_SECONDS)]


@pytest.mark.parametrize("status", ["OK", "UNDEPLOYED"])
async def test_a_voice_is_followed_until_it_is_ready_or_rejected_and_again_after_an_update(
    desk: Desk, clock: time_machine.Traveller, status: VoiceStatus
) -> None:
    record_id = await desk.make()
    for change in (0, 9):
        desk.provider.voices = [report(A, status, modified_in=change)]
        clock.shift(HOPELESS)
        assert await desk.check(record_id) is None
        assert (await desk.waits(record_id), (await desk.row(record_id)).status) == (None, status)
        assert await desk.shown() == {A: status}
        clock.shift(FOLLOWED_FOR)
        noted_at = datetime.now(UTC)
        await desk.book.note(key().account, report(A, modified_in=9), noted_at)
        assert await desk.waits(record_id, noted_at) == pytest.approx(2, abs=0.9)
        assert (await desk.row(record_id)).status == "DEPLOYING"
    assert (await desk.record(record_id), await desk.sample(record_id)) == (("succeeded", None, A), f"kept for {A}")


async def test_a_voice_is_gone_after_three_misses_in_a_row(desk: Desk, clock: time_machine.Traveller) -> None:
    record_id = await desk.make()
    for voices in ([], [], [report(A)], [], []):
        desk.provider.voices = list[VoiceReport](voices)
        clock.shift(5)
        assert await desk.check(record_id) is None
    assert ((await desk.row(record_id)).misses, await desk.shown()) == (GONE_BELIEVED - 1, {A: "DEPLOYING"})
    assert await desk.check(record_id) is None
    assert (await desk.waits(record_id), await desk.shown()) == (None, {})
    assert (await desk.record(record_id), await desk.sample(record_id)) == (("succeeded", None, A), "removed")


async def test_a_voice_that_was_deleted_elsewhere_is_not_followed_and_leaves_no_sample(
    desk: Desk, clock: time_machine.Traveller
) -> None:
    gone, kept = await desk.make(A), await desk.make(B)
    desk.provider.voices = [report(A), report(B)]
    for _ in range(2):
        await desk.book.refresh(key())
        desk.provider.voices = [report(B)]
        clock.shift(2 * LAG)
    assert (await desk.waits(gone), await desk.sample(gone)) == (None, "removed")
    assert (await desk.waits(kept) is None, await desk.sample(kept)) == (False, f"kept for {B}")


CANNOT_BE_ASKED: list[tuple[Credential | AppError, AppError | None, type[AppError], float]] = [
    (key("sk-new"), None, NoApiKey, NO_KEY_SECONDS),
    (replace(key(), workspace="ws"), None, NoApiKey, NO_KEY_SECONDS),
    (NoApiKey(), None, NoApiKey, NO_KEY_SECONDS),
    (key(), InvalidApiKey(), InvalidApiKey, NO_KEY_SECONDS),
    (key(), ConnectionLost(), ConnectionLost, FAILED_CHECK_SECONDS),
]


@on_sqlite
@pytest.mark.parametrize("is_lost", [True, False])
@pytest.mark.parametrize("cause", CANNOT_BE_ASKED)
async def test_a_voice_that_cannot_be_asked_about_waits_for_long_and_is_given_up_in_the_end(
    desk: Desk, clock: time_machine.Traveller, is_lost: bool, cause: tuple[Any, Any, type[AppError], float]
) -> None:
    record_id = await (desk.lose() if is_lost else desk.make())
    desk.keys.given, desk.provider.trouble, told, wait = cause
    open_end = ("running", None, None) if is_lost else ("succeeded", None, A)
    clock.shift((HOPELESS if is_lost else FOLLOWED_FOR) - MINUTE)
    assert type(await desk.check(record_id)) is told
    assert await desk.waits(record_id) == pytest.approx(wait, abs=2)
    assert await desk.record(record_id) == open_end
    clock.shift(2 * MINUTE)
    assert type(await desk.check(record_id)) is told
    assert await desk.waits(record_id) is None
    assert await desk.record(record_id) == (("failed", told.code, None) if is_lost else open_end)
    assert await desk.sample(record_id) == ("removed" if is_lost else f"kept for {A}")


async def test_a_lost_voice_that_does_not_turn_up_is_given_up(desk: Desk, clock: time_machine.Traveller) -> None:
    record_id = await desk.lose()
    clock.shift(LOST_FOR - MINUTE)
    assert await desk.check(record_id) is None
    assert await desk.waits(record_id) == pytest.approx(LONGEST_INTERVAL_SECONDS, abs=2)
    clock.shift(2 * MINUTE)
    assert await desk.check(record_id) is None
    assert (await desk.waits(record_id), await desk.sample(record_id)) == (None, "removed")
    assert await desk.record(record_id) == ("failed", "TIMEOUT", None)


async def test_a_lost_voice_may_turn_up_late(desk: Desk, clock: time_machine.Traveller) -> None:
    record_id = await desk.lose()
    clock.shift(LOST_FOR - MINUTE)
    assert await desk.check(record_id) is None
    desk.provider.voices = [report(A)]
    assert await desk.check(record_id) is None
    assert (await desk.record(record_id), await desk.sample(record_id)) == (("succeeded", None, A), f"kept for {A}")


async def test_a_lost_voice_that_is_there_is_not_given_up_for_one_in_flight(
    desk: Desk, clock: time_machine.Traveller
) -> None:
    record_id = await desk.lose()
    clock.shift(LOST_FOR + MINUTE)
    in_flight = await desk.announce()
    desk.provider.voices = [report(A)]
    assert await desk.check(record_id) is None
    assert await desk.waits(record_id) is not None
    await desk.enrollments.succeed(in_flight, B)
    assert await desk.check(record_id) is None
    assert await desk.record(record_id) == ("succeeded", None, A)


async def test_the_voice_of_a_process_that_died_is_found(desk: Desk, clock: time_machine.Traveller) -> None:
    claimed = await desk.announce()
    assert await desk.check(claimed.record.id) is None
    clock.shift(CLAIM + timedelta(seconds=1))
    assert await desk.check(claimed.record.id) is None
    assert (await desk.row(claimed.record.id)).lost_at is not None
    desk.provider.voices = [report(A)]
    assert await desk.check(claimed.record.id) is None
    assert await desk.record(claimed.record.id) == ("succeeded", None, A)


@on_sqlite
async def test_a_voice_that_stays_in_review_is_not_followed_for_ever(desk: Desk, clock: time_machine.Traveller) -> None:
    record_id = await desk.make()
    desk.provider.voices = [report(A)]
    for already, followed in ((FOLLOWED_FOR - MINUTE, True), (2 * MINUTE, False)):
        clock.shift(already)
        assert await desk.check(record_id) is None
        assert (await desk.waits(record_id) is not None) == followed
    assert (await desk.waits(record_id), (await desk.row(record_id)).status) == (None, "DEPLOYING")
    assert await desk.record(record_id) == ("succeeded", None, A)
