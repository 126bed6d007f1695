"""Long texts on both databases: money is written down before it is spent, once, and by who holds the claim."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import func, inspect, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import undefer
from structlog.testing import capture_logs

from app.database import Database
from app.errors import UpstreamError
from app.models import Bill, LongText, Record, Segment, Table, User
from app.services import segments as segments_module
from app.services.calls import Price, Status, reopened
from app.services.history import HistoryService
from app.services.records import RecordService
from app.services.segments import ClaimedText, ClaimLost, OpenTexts, SpeechStopped, SpokenSegment

PRICE = Price("character", Decimal("0.0001"), "CNY")
TEXTS = ("第一段。", "第二段。", "第三段。")
SPOKEN = SpokenSegment("audio/work/a.pcm", 22050, '[[0,1000,["第一段。"]]]')


class Desk:
    """Texts of one user, and processes that work on them."""

    def __init__(self, database: Database, user_id: uuid.UUID) -> None:
        self.database = database
        self.user_id = user_id
        self.records = RecordService(database)
        self.texts = OpenTexts(database, self.records)

    def rows(self, record_id: int, texts: Sequence[str]) -> list[Table]:
        """A job with its segments."""
        job = LongText(
            record_id=record_id,
            user_id=self.user_id,
            next_check_at=datetime.now(UTC),
            segments_total=len(texts),
            output_key=f"audio/{record_id}.mp3",
        )
        return [job, *(Segment(record_id=record_id, number=n, text=text) for n, text in enumerate(texts))]

    async def open(self, texts: Sequence[str] = TEXTS) -> int:
        """Have a text spoken by whoever claims it; gives its record."""
        return await self.records.open_job(
            self.user_id, "tts", "cosyvoice-v3-flash", "{}", PRICE, lambda record_id: self.rows(record_id, texts)
        )

    async def claim(self, record_id: int) -> ClaimedText:
        """Claim a text that is free."""
        claimed = await self.texts.claim(record_id)
        assert claimed is not None
        return claimed

    async def begin(self, texts: Sequence[str] = TEXTS) -> ClaimedText:
        """Have a text spoken by ourselves."""
        claimed = await self.claim(await self.open(texts))
        await self.texts.resume(claimed)
        return claimed

    async def take_over(self, record_id: int) -> ClaimedText:
        """Claim a text whose process died."""
        await self.change(claimed_until=datetime.now(UTC) - timedelta(seconds=1))
        return await self.claim(record_id)

    async def stake(self, claimed: ClaimedText, number: int, characters: int) -> uuid.UUID:
        """Begin to buy a segment."""
        attempt = uuid.uuid4()
        await self.texts.stake(claimed, number, attempt, characters)
        return attempt

    async def buy(self, claimed: ClaimedText, number: int, characters: int) -> None:
        """Buy a segment."""
        attempt = await self.stake(claimed, number, characters)
        assert await self.texts.settle(claimed.record.id, number, attempt, characters, SPOKEN)

    async def end(self, claimed: ClaimedText, status: Status = "succeeded") -> bool:
        """End a text."""
        return await self.texts.end(claimed, status, None, reopened(claimed))

    async def change(self, **values: Any) -> None:
        """Change every text behind everybody's back."""
        async with self.database.transaction() as session:
            await session.execute(update(LongText).values(**values))

    async def text(self, record_id: int) -> LongText:
        """What is known of a text."""
        async with self.database.snapshot() as session:
            return await session.get_one(LongText, record_id)

    async def counts(self, record_id: int) -> tuple[int, int, int, int]:
        """Segments done, characters counted, those of them that are guessed, and the deaths in a row."""
        text = await self.text(record_id)
        return text.segments_done, text.characters, text.guessed, text.misses

    async def segments(self, record_id: int) -> list[Segment]:
        """Everything of the segments of a text."""
        wanted = select(Segment).where(Segment.record_id == record_id).order_by(Segment.number)
        async with self.database.snapshot() as session:
            return list(await session.scalars(wanted.options(undefer(Segment.text), undefer(Segment.cues))))

    async def stakes(self, record_id: int) -> list[tuple[uuid.UUID | None, int]]:
        """What is at stake for each segment."""
        return [(each.attempt, each.at_stake) for each in await self.segments(record_id)]

    async def bills(self, record_id: int) -> list[tuple[int, Decimal, bool]]:
        """Quantity and amount of every bill line of a record, and whether it is an estimate."""
        wanted = select(Bill).where(Bill.record_id == record_id)
        async with self.database.snapshot() as session:
            return [(bill.quantity, bill.amount, bill.estimated) for bill in await session.scalars(wanted)]

    async def record(self, record_id: int) -> Record:
        """What is known of its record."""
        async with self.database.snapshot() as session:
            return await session.get_one(Record, record_id)

    async def everything(self, record_id: int) -> list[Any]:
        """All that the database holds of a text, to be compared."""
        rows = [await self.text(record_id), await self.record(record_id), *await self.segments(record_id)]
        values = [{each.key: each.value for each in inspect(row).attrs} for row in rows]
        return [*values, await self.bills(record_id)]

    async def all_rows(self) -> list[int]:
        """How many records, texts, segments and bills there are."""
        async with self.database.snapshot() as session:
            tables = (Record, LongText, Segment, Bill)
            return [await session.scalar(select(func.count()).select_from(table)) or 0 for table in tables]


@pytest.fixture
async def desk(schema_url: str) -> AsyncIterator[Desk]:
    """An empty database with a user."""
    database = Database(schema_url)
    user = User(username="u", username_key="u", password_hash="-", created_at=datetime.now(UTC))
    async with database.transaction() as session:
        session.add(user)
    with capture_logs():
        yield Desk(database, user.id)
    await database.close()


# ---- Opening


async def test_a_job_is_opened_with_all_of_its_rows(desk: Desk) -> None:
    record_id = await desk.open()
    record = await desk.record(record_id)
    assert (record.status, record.type, record.model_name) == ("running", "tts", "cosyvoice-v3-flash")
    assert (record.unit, record.unit_price, record.currency) == ("character", PRICE.per_unit, "CNY")
    assert (record.lease_expires_at, record.finished_at) == (None, None)
    assert [(each.number, each.text, each.key) for each in await desk.segments(record_id)] == [
        (number, text, None) for number, text in enumerate(TEXTS)
    ]
    assert await desk.stakes(record_id) == [(None, 0)] * 3
    assert await desk.counts(record_id) == (0, 0, 0, 0)
    assert [due.record_id for due in await desk.texts.due(10)] == [record_id]
    assert await desk.records.settle_orphans() == 0


async def test_a_job_with_a_row_that_is_refused_leaves_nothing(desk: Desk) -> None:
    def with_a_hole(record_id: int) -> list[Table]:
        return [*desk.rows(record_id, TEXTS), Segment(record_id=record_id, number=3, text=None)]

    def of_no_record(record_id: int) -> list[Table]:
        return [*desk.rows(record_id, TEXTS), Segment(record_id=record_id + 999, number=0, text="四")]

    def broken(record_id: int) -> list[Table]:
        raise ZeroDivisionError

    for rows in (with_a_hole, of_no_record, broken):
        with pytest.raises((IntegrityError, ZeroDivisionError)):
            await desk.records.open_job(desk.user_id, "tts", "m", "{}", PRICE, rows)
        assert await desk.all_rows() == [0, 0, 0, 0]


# ---- Stakes


async def test_a_stake_is_noted_for_a_segment_that_may_be_bought(desk: Desk) -> None:
    claimed, other = await desk.begin(), await desk.begin()
    attempt = await desk.stake(claimed, 1, 8)
    assert await desk.stakes(claimed.record.id) == [(None, 0), (attempt, 8), (None, 0)]
    assert await desk.stakes(other.record.id) == [(None, 0)] * 3
    assert await desk.counts(claimed.record.id) == (0, 0, 0, 0)
    await desk.buy(claimed, 0, 8)
    for number in (0, len(TEXTS)):  # spoken already, and none at all
        with pytest.raises((ClaimLost, SpeechStopped)):
            await desk.stake(claimed, number, 8)
    await desk.texts.cancel(claimed.record.id)
    before = await desk.everything(claimed.record.id)
    with pytest.raises(SpeechStopped):
        await desk.stake(claimed, 2, 8)
    assert await desk.everything(claimed.record.id) == before
    await desk.stake(other, 0, 8)


async def test_only_who_holds_the_claim_may_buy(desk: Desk) -> None:
    stale = await desk.begin()
    record_id = stale.record.id
    stranger = replace(stale, token=uuid.uuid4())
    before = await desk.everything(record_id)
    with pytest.raises(ClaimLost):
        await desk.stake(stranger, 0, 8)
    assert await desk.everything(record_id) == before
    fresh = await desk.take_over(record_id)
    attempt = await desk.stake(fresh, 0, 8)
    for number in (0, 1):
        with pytest.raises(ClaimLost):
            await desk.stake(stale, number, 9)
    assert await desk.stakes(record_id) == [(attempt, 8), (None, 0), (None, 0)]


# ---- Settlements


async def test_a_settlement_counts_once(desk: Desk) -> None:
    claimed, other = await desk.begin(), await desk.begin()
    record_id = claimed.record.id
    await desk.change(misses=5)
    attempt = await desk.stake(claimed, 0, 8)
    before = await desk.everything(other.record.id)
    assert not await desk.texts.settle(record_id, 1, attempt, 7, SPOKEN)
    assert not await desk.texts.settle(other.record.id, 0, attempt, 7, SPOKEN)
    assert not await desk.texts.settle(record_id, 0, uuid.uuid4(), 7, SPOKEN)
    assert await desk.counts(record_id) == (0, 0, 0, 5)
    settled = await asyncio.gather(*(desk.texts.settle(record_id, 0, attempt, 7, SPOKEN) for _ in range(5)))
    assert sorted(settled) == [False] * 4 + [True]
    assert await desk.counts(record_id) == (1, 7, 0, 0)
    first, second, _ = await desk.segments(record_id)
    assert (first.attempt, first.at_stake) == (None, 0)
    assert SpokenSegment(first.key or "", first.samples or 0, first.cues) == SPOKEN
    assert (second.key, second.samples, second.cues) == (None, None, None)
    assert await desk.everything(other.record.id) == before
    assert (await HistoryService(desk.database).find(desk.user_id, record_id)).amount == 7 * PRICE.per_unit


async def test_a_try_that_failed_is_counted_and_can_be_made_again(desk: Desk) -> None:
    claimed = await desk.begin()
    record_id = claimed.record.id
    await desk.change(misses=5)
    attempt = await desk.stake(claimed, 0, 8)
    assert await desk.texts.settle(record_id, 0, attempt, 3, None)
    assert not await desk.texts.settle(record_id, 0, attempt, 3, None)
    assert await desk.counts(record_id) == (0, 3, 0, 5)
    assert await desk.stakes(record_id) == [(None, 0)] * 3
    assert {each.key for each in await desk.segments(record_id)} == {None}
    await desk.buy(claimed, 0, 8)
    assert await desk.counts(record_id) == (1, 11, 0, 0)


async def test_settlements_at_once_lose_nothing(desk: Desk) -> None:
    claimed = await desk.begin([f"第{number}段。" for number in range(20)])
    attempts = [await desk.stake(claimed, number, 100) for number in range(20)]
    settling = (desk.texts.settle(claimed.record.id, n, each, 2**n, SPOKEN) for n, each in enumerate(attempts))
    assert await asyncio.gather(*settling) == [True] * 20
    assert await desk.counts(claimed.record.id) == (20, 2**20 - 1, 0, 0)


# ---- Deaths


async def test_what_a_dead_process_had_at_stake_is_a_guess_once(desk: Desk) -> None:
    dead, other = await desk.begin(), await desk.begin()
    record_id = dead.record.id
    await desk.buy(dead, 0, 7)
    await desk.stake(dead, 1, 8)
    await desk.stake(dead, 2, 9)
    elsewhere = await desk.stake(other, 0, 100)
    for deaths, counts in [(1, (1, 24, 17, 1)), (2, (1, 34, 27, 2))]:
        fresh = await desk.take_over(record_id)
        at_once = await asyncio.gather(*(desk.texts.resume(fresh) for _ in range(3)))
        for segments in [*at_once, await desk.texts.resume(fresh)]:
            assert [(each.number, each.key, each.attempt) for each in segments] == [
                (0, SPOKEN.key, None),
                (1, None, None),
                (2, None, None),
            ]
            assert await desk.counts(record_id) == counts
            assert await desk.stakes(record_id) == [(None, 0)] * 3
        await desk.stake(fresh, 1, 10 * deaths)
    assert (await desk.stakes(other.record.id))[0] == (elsewhere, 100)
    assert await desk.counts(other.record.id) == (0, 0, 0, 0)


async def test_who_was_taken_for_dead_settles_nothing(desk: Desk) -> None:
    zombie = await desk.begin()
    record_id = zombie.record.id
    late = await desk.stake(zombie, 0, 8)
    fresh = await desk.take_over(record_id)
    await desk.texts.resume(fresh)

    async def settle_late() -> None:
        before = await desk.everything(record_id)
        for spoken in (SPOKEN, None):
            assert not await desk.texts.settle(record_id, 0, late, 7, spoken)
        assert await desk.everything(record_id) == before

    await settle_late()
    attempt = await desk.stake(fresh, 0, 8)
    await settle_late()
    assert await desk.texts.settle(record_id, 0, attempt, 8, SPOKEN)
    await settle_late()
    assert await desk.counts(record_id) == (1, 16, 8, 0)


async def test_who_settles_before_he_is_taken_for_dead_is_not_guessed(desk: Desk) -> None:
    slow = await desk.begin()
    record_id = slow.record.id
    attempt = await desk.stake(slow, 0, 8)
    fresh = await desk.take_over(record_id)
    assert await desk.texts.settle(record_id, 0, attempt, 7, SPOKEN)
    segments = await desk.texts.resume(fresh)
    assert [each.key for each in segments] == [SPOKEN.key, None, None]
    assert await desk.counts(record_id) == (1, 7, 0, 0)


async def test_what_is_settled_while_stock_is_taken_is_counted_or_guessed(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = segments_module._count

    async def count_slowly(*counted: Any, **changes: Any) -> None:
        await asyncio.sleep(0.1)  # so that the others have begun
        await count(*counted, **changes)

    monkeypatch.setattr(segments_module, "_count", count_slowly)
    slow = await desk.begin([f"第{number}段。" for number in range(4)])
    record_id = slow.record.id
    attempts = [await desk.stake(slow, number, 2**number) for number in range(4)]
    fresh = await desk.take_over(record_id)
    settling = [desk.texts.settle(record_id, n, each, 2**n, SPOKEN) for n, each in enumerate(attempts)]
    settled, segments = await asyncio.gather(asyncio.gather(*settling), desk.texts.resume(fresh))
    guessed = sum(2**number for number, is_counted in enumerate(settled) if not is_counted)
    done, characters, guess, _ = await desk.counts(record_id)
    assert (done, characters, guess) == (sum(settled), 2**4 - 1, guessed)
    assert await desk.stakes(record_id) == [(None, 0)] * 4
    assert [each.key for each in segments if each.key and not settled[each.number]] == []


async def test_who_lost_the_claim_takes_no_stock(desk: Desk) -> None:
    record_id = await desk.open()
    stale = await desk.claim(record_id)
    fresh = await desk.take_over(record_id)
    await desk.texts.resume(fresh)
    attempt = await desk.stake(fresh, 0, 8)
    for stranger in (stale, replace(stale, token=uuid.uuid4())):
        with pytest.raises(ClaimLost):
            await desk.texts.resume(stranger)
    assert await desk.counts(record_id) == (0, 0, 0, 0)
    assert await desk.texts.settle(record_id, 0, attempt, 8, SPOKEN)
    assert await desk.counts(record_id) == (1, 8, 0, 0)


# ---- Ends


async def test_the_bill_is_of_all_tries(desk: Desk) -> None:
    other = await desk.begin()
    await desk.buy(other, 0, 100)
    for guessed in (0, 8):
        claimed = await desk.begin()
        record_id = claimed.record.id
        await desk.buy(claimed, 0, 7)
        assert await desk.texts.settle(record_id, 1, await desk.stake(claimed, 1, 8), 5, None)
        if guessed:
            await desk.stake(claimed, 1, guessed)
            claimed = await desk.take_over(record_id)
            await desk.texts.resume(claimed)
        record = reopened(claimed)
        record.output_key, record.duration_ms = "audio/whole.mp3", 1000
        assert await desk.texts.end(claimed, "failed", UpstreamError("失败"), record)
        quantity = 12 + guessed
        assert await desk.bills(record_id) == [(quantity, quantity * PRICE.per_unit, guessed > 0)]
        ended = await desk.record(record_id)
        assert (ended.status, ended.error, ended.error_message) == ("failed", UpstreamError.code, "失败")
        assert (ended.output_key, ended.duration_ms) == ("audio/whole.mp3", 1000)
        assert ended.finished_at is not None
    assert await desk.bills(other.record.id) == []


async def test_only_who_holds_the_claim_ends_a_text_and_he_once(desk: Desk) -> None:
    stale = await desk.begin()
    record_id = stale.record.id
    await desk.buy(stale, 0, 7)
    fresh = await desk.take_over(record_id)
    before = await desk.everything(record_id)
    assert not await desk.end(stale, "failed")
    assert await desk.everything(record_id) == before
    assert (await desk.record(record_id)).status == "running"
    ends: list[Status] = ["succeeded", "failed", "cancelled"]
    ended = await asyncio.gather(*(desk.end(fresh, status) for status in ends))
    assert sorted(ended) == [False, False, True]
    assert (await desk.record(record_id)).status == ends[ended.index(True)]
    assert await desk.bills(record_id) == [(7, 7 * PRICE.per_unit, False)]
    before = await desk.everything(record_id)
    assert not await desk.end(fresh)
    assert not await desk.end(await desk.take_over(record_id))
    assert (await desk.everything(record_id))[1:] == before[1:]


async def test_a_text_without_any_count_has_no_bill(desk: Desk) -> None:
    claimed = await desk.begin()
    assert await desk.end(claimed, "cancelled")
    assert (await desk.record(claimed.record.id)).status == "cancelled"
    assert await desk.bills(claimed.record.id) == []


async def test_a_text_is_cancelled_at_one_moment(desk: Desk) -> None:
    record_id, other = await desk.open(), await desk.open()
    assert not await desk.texts.is_cancelled(record_id)
    await desk.texts.cancel(record_id)
    first = (await desk.text(record_id)).cancelled_at
    assert first is not None
    assert timedelta(0) <= datetime.now(UTC) - first < timedelta(minutes=1)
    await asyncio.sleep(0.01)
    await desk.texts.cancel(record_id)
    assert (await desk.text(record_id)).cancelled_at == first
    assert [await desk.texts.is_cancelled(each) for each in (record_id, other)] == [True, False]


# ---- Clearing away


async def test_a_text_that_ended_stays_claimed_until_it_is_cleared(desk: Desk) -> None:
    claimed, other = await desk.begin(), await desk.begin()
    record_id = claimed.record.id
    await desk.buy(claimed, 0, 8)
    assert await desk.end(claimed)
    text = await desk.text(record_id)
    assert (text.claimed_by, text.next_check_at is None) == (claimed.token, False)
    assert await desk.texts.claim(record_id) is None
    claimed = await desk.take_over(record_id)  # whoever died before he had cleared it away
    assert claimed.record.status == "succeeded"
    for _ in range(2):
        await desk.texts.clear(claimed)
        assert await desk.segments(record_id) == []
        text = await desk.text(record_id)
        assert (text.next_check_at, text.claimed_by) == (None, None)
        assert (text.segments_done, text.characters) == (1, 8)
    await desk.change(claimed_until=None)
    assert [due.record_id for due in await desk.texts.due(10)] == [other.record.id]
    assert await desk.texts.claim(record_id) is None
    assert len(await desk.segments(other.record.id)) == len(TEXTS)
    with pytest.raises(ClaimLost):
        await desk.stake(claimed, 1, 8)


async def test_a_stranger_clears_nothing(desk: Desk) -> None:
    stale = await desk.begin()
    record_id = stale.record.id
    await desk.buy(stale, 0, 8)
    await desk.take_over(record_id)
    before = await desk.everything(record_id)
    await desk.texts.clear(stale)
    await desk.texts.clear(replace(stale, token=uuid.uuid4()))
    assert await desk.everything(record_id) == before


# ---- Reading


async def test_what_was_said_and_spoken_is_found_by_number(desk: Desk) -> None:
    claimed, other = await desk.begin(), await desk.begin(["别的。"] * 3)
    record_id = claimed.record.id
    for owner, number in [(claimed, 0), (claimed, 2), (other, 1)]:
        attempt = await desk.stake(owner, number, 8)
        spoken = SpokenSegment(f"{owner.record.id}-{number}.pcm", 100, {0: "[]", 1: "[1]", 2: None}[number])
        assert await desk.texts.settle(owner.record.id, number, attempt, 8, spoken)
    assert [await desk.texts.text(record_id, number) for number in range(3)] == list(TEXTS)
    assert [await desk.texts.cues(record_id, number) for number in range(3)] == ["[]", None, None]
    assert [await desk.texts.text(other.record.id, number) for number in range(3)] == ["别的。"] * 3
    assert [await desk.texts.cues(other.record.id, number) for number in range(3)] == [None, "[1]", None]


async def test_stock_is_taken_without_the_texts(desk: Desk) -> None:
    claimed = await desk.claim(await desk.open(["好" * 2000] * 300))
    await desk.stake(claimed, 7, 4000)
    segments = await desk.texts.resume(await desk.take_over(claimed.record.id))
    assert [each.number for each in segments] == list(range(300))
    for each in segments:
        assert inspect(each).unloaded >= {"text", "cues"}
        assert (each.attempt, each.at_stake, each.key, each.samples) == (None, 0, None, None)
