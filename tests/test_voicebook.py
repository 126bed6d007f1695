"""What is known of an account's voices, on both databases: lists that lag, that fail, and that many ask for at once."""

import asyncio
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import time_machine
from sqlalchemy import event, select
from sqlalchemy.ext.asyncio import AsyncSession
from structlog.testing import capture_logs

from app.dashscope import Credential, EnrollmentClient, HttpClient, VoiceReport, VoiceStatus
from app.database import Database
from app.errors import AppError, InvalidApiKey, NotReady, UpstreamTimeout, VoiceNotFound
from app.inflight import InFlight
from app.models import VoiceListing
from app.services import voicebook
from app.services.voicebook import LAG, LISTED_FOR, VoiceBook

PATIENCE_SECONDS = 10.0
LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)
STRANGE = "made-elsewhere"
MODEL = "cosyvoice-v3-flash"

on_sqlite = pytest.mark.parametrize("schema_url", ["sqlite"], indirect=True)
on_postgresql = pytest.mark.parametrize("schema_url", ["postgresql"], indirect=True)


def key(api_key: str = "sk-own") -> Credential:
    return Credential(api_key, "wss://example.com", "https://example.com")


def voice(name: str, model: str = MODEL, prefix: str = "my") -> str:
    return f"{model}-{prefix}-{name}"


def report(
    voice_id: str, status: VoiceStatus = "OK", *, age: timedelta | None = None, modified_in: float = 0
) -> VoiceReport:
    """What the provider says of a voice; it is old unless told otherwise."""
    created_at = LONG_AGO if age is None else datetime.now(UTC) - age
    return VoiceReport(voice_id, status, created_at, created_at + timedelta(seconds=modified_in))


class Provider(EnrollmentClient):
    """Lists the voices of each key as they were when it was asked, once the test lets it."""

    def __init__(self) -> None:
        self.voices: dict[str, dict[str, VoiceReport]] = {}
        self.hidden: set[str] = set()
        self.models: dict[str, str | AppError] = {}
        self.finds = 0
        self.queried: list[str] = []
        self.trouble: AppError | None = None
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def find(self, credential: Credential, prefix: str | None = None) -> list[VoiceReport]:
        self.finds += 1
        there = self.voices.get(credential.account, {})
        listed = [told for told in there.values() if told.voice_id not in self.hidden]
        self.asked.set()
        await self.may_answer.wait()
        if self.trouble:
            raise self.trouble
        return listed

    async def query(self, credential: Credential, voice_id: str) -> VoiceReport:
        self.queried.append(voice_id)
        model, told = self.models.get(voice_id, MODEL), self.voices.get(credential.account, {}).get(voice_id)
        if isinstance(model, AppError) or told is None:
            raise model if isinstance(model, AppError) else VoiceNotFound
        return replace(told, target_model=model)


class Desk:
    """A database, a provider, and a process that knows the voices."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.provider = Provider()
        self.in_flight = InFlight()
        self.book = self.another_book()

    def another_book(self) -> VoiceBook:
        return VoiceBook(self.database, self.provider, self.in_flight)

    def lists(self, *reports: VoiceReport, credential: Credential | None = None) -> None:
        self.provider.voices[(credential or key()).account] = {each.voice_id: each for each in reports}

    async def note(self, told: VoiceReport, ago: float = 0) -> None:
        await self.book.note(key().account, told, datetime.now(UTC) - timedelta(seconds=ago))

    async def listing(self) -> VoiceListing:
        async with self.database.snapshot() as session:
            return (await session.scalars(select(VoiceListing))).one()

    async def relist(self) -> dict[str, str]:
        """List anew, whenever that was done last; gives what is shown then."""
        async with self.database.transaction() as session:
            for listing in await session.scalars(select(VoiceListing)):
                listing.listed_at = None
        await self.book.refresh(key())
        return await self.shown()

    async def shown(self, credential: Credential | None = None) -> dict[str, str]:
        """The voices that are shown with their status."""
        page = await self.book.page((credential or key()).account, 0, 10_000)
        assert page.total == len(page.voices)
        return {each.voice_id: each.status for each in page.voices}


@pytest.fixture
async def desk(schema_url: str) -> AsyncIterator[Desk]:
    """A process on an empty database."""
    database = Database(schema_url)
    desk = Desk(database)
    with capture_logs():  # tracebacks are slow to lay out
        yield desk
        await desk.in_flight.drain(PATIENCE_SECONDS)
    await database.close()


@pytest.fixture
def clock() -> Iterator[time_machine.Traveller]:
    with time_machine.travel(datetime.now(UTC)) as clock:
        yield clock


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voicebook, "OTHERS_ROUND_POLL_SECONDS", 0.01)


@pytest.fixture
async def unheard() -> AsyncIterator[list[dict[str, Any]]]:
    loop, broken = asyncio.get_running_loop(), list[dict[str, Any]]()
    loop.set_exception_handler(lambda _, context: broken.append(context))
    yield broken
    loop.set_exception_handler(None)


# ---- When it is listed


async def test_voices_are_listed_once_a_minute(desk: Desk, clock: time_machine.Traveller) -> None:
    desk.lists(report(voice("a")))
    for book in (desk.book, desk.another_book(), desk.book):
        await book.refresh(key())
    assert (desk.provider.finds, await desk.shown()) == (1, {voice("a"): "OK"})
    clock.shift(LISTED_FOR - timedelta(seconds=5))
    await desk.book.refresh(key())
    clock.shift(6)
    await desk.another_book().refresh(key())
    assert desk.provider.finds == 2


@pytest.mark.parametrize("known", [False, True])
async def test_processes_that_list_at_once_make_one_round(
    desk: Desk, clock: time_machine.Traveller, known: bool
) -> None:
    if known:
        await desk.book.refresh(key())
        clock.shift(LISTED_FOR)
    desk.lists(report(voice("a")))
    before = desk.provider.finds
    desk.provider.asked.clear()
    desk.provider.may_answer.clear()
    rounds = [asyncio.create_task(book.refresh(key())) for book in (desk.book, desk.another_book())]
    await desk.provider.asked.wait()
    done, _ = await asyncio.wait(rounds, timeout=0.1)
    assert not done
    desk.provider.may_answer.set()
    await asyncio.gather(*rounds)
    assert desk.provider.finds == before + 1
    assert await desk.shown() == {voice("a"): "OK"}


@pytest.mark.parametrize("trouble", [None, InvalidApiKey()])
async def test_all_who_ask_a_process_at_once_hear_of_one_round(
    desk: Desk, trouble: AppError | None, unheard: list[dict[str, Any]]
) -> None:
    desk.provider.trouble = trouble
    desk.provider.may_answer.clear()
    asking = asyncio.gather(*(desk.book.refresh(key()) for _ in range(5)), return_exceptions=True)
    await asyncio.wait([asking], timeout=2)
    desk.provider.may_answer.set()
    assert (await asking, desk.provider.finds, unheard) == ([trouble] * 5, 1, [])


async def test_a_round_that_fails_leaves_its_turn_to_whoever_waits(desk: Desk) -> None:
    desk.provider.trouble = InvalidApiKey()
    desk.provider.may_answer.clear()
    rounds = [asyncio.create_task(book.refresh(key())) for book in (desk.book, desk.another_book())]
    await desk.provider.asked.wait()
    desk.provider.may_answer.set()
    assert await asyncio.gather(*rounds, return_exceptions=True) == [desk.provider.trouble] * 2
    assert (await desk.listing()).claimed_until is None
    desk.provider.trouble = None
    await desk.book.refresh(key())
    assert (desk.provider.finds, (await desk.listing()).listed_at is None) == (3, False)


async def test_a_process_that_died_while_listing_is_taken_over(desk: Desk, clock: time_machine.Traveller) -> None:
    until = datetime.now(UTC) + timedelta(seconds=30)
    async with desk.database.transaction() as session:
        session.add(VoiceListing(account=key().account, claimed_by=uuid.uuid4(), claimed_until=until))
    waiting = asyncio.create_task(desk.book.refresh(key()))
    await asyncio.wait([waiting], timeout=0.1)
    assert (waiting.done(), desk.provider.finds) == (False, 0)
    clock.shift(31)
    await asyncio.wait_for(waiting, PATIENCE_SECONDS)
    assert desk.provider.finds == 1


@on_sqlite
async def test_a_round_that_takes_too_long_ends(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voicebook, "ROUND_SECONDS", 0.05)
    desk.provider.may_answer.clear()
    with pytest.raises(UpstreamTimeout):
        await desk.book.refresh(key())
    assert (await desk.listing()).claimed_by is None


# ---- Lists that lag behind


async def test_a_voice_that_was_just_made_is_kept_until_the_list_must_know(
    desk: Desk, clock: time_machine.Traveller
) -> None:
    desk.lists(new := report(voice("new"), "DEPLOYING", age=timedelta(0)))
    desk.provider.hidden = {new.voice_id}
    await desk.note(new)
    for seconds in (0, LAG.total_seconds() - 5):
        clock.shift(seconds)
        assert await desk.relist() == {voice("new"): "DEPLOYING"}
    desk.lists()
    clock.shift(6)
    assert await desk.relist() == {}


@pytest.mark.parametrize("known", [True, False])
async def test_a_deleted_voice_does_not_come_back_until_the_list_must_know(
    desk: Desk, clock: time_machine.Traveller, known: bool
) -> None:
    if known:
        await desk.note(report(voice("a")))
    await desk.book.forget(key().account, voice("a"), was_ours=not known)
    desk.lists(report(voice("a")))
    for seconds in (0, LAG.total_seconds() - 5):
        clock.shift(seconds)
        assert await desk.relist() == {}
    clock.shift(6)
    assert await desk.relist() == {voice("a"): "OK"}


@pytest.mark.parametrize("known", [True, False])
async def test_a_look_that_began_before_a_deletion_does_not_undo_it(desk: Desk, known: bool) -> None:
    if known:
        await desk.note(report(voice("a")), ago=2)
    await desk.book.forget(key().account, voice("a"), was_ours=not known)
    await desk.note(report(voice("a")), ago=1)
    assert await desk.shown() == {}


async def test_a_list_that_began_before_a_deletion_or_a_look_does_not_undo_it(desk: Desk) -> None:
    for name in ("a", "b"):
        await desk.note(report(voice(name), "DEPLOYING"), ago=2)
    desk.lists(report(voice("a")), report(voice("b"), "UNDEPLOYED", modified_in=9))
    desk.provider.may_answer.clear()
    listing = asyncio.create_task(desk.relist())
    await desk.provider.asked.wait()
    await desk.book.forget(key().account, voice("a"))
    await desk.note(report(voice("b"), "OK"))
    desk.provider.may_answer.set()
    assert await listing == {voice("b"): "OK"}


async def test_a_look_that_began_before_an_update_does_not_undo_it(desk: Desk) -> None:
    await desk.note(report(voice("a"), "OK"), ago=9)
    await desk.note(report(voice("a"), "DEPLOYING", modified_in=5), ago=5)
    await desk.note(report(voice("a"), "OK"), ago=6)
    assert await desk.shown() == {voice("a"): "DEPLOYING"}
    await desk.note(report(voice("a"), "UNDEPLOYED", modified_in=5), ago=4)
    assert await desk.shown() == {voice("a"): "UNDEPLOYED"}


@pytest.mark.parametrize("status", ["OK", "UNDEPLOYED"])
async def test_a_status_goes_on_by_the_list_and_goes_back_only_for_a_later_change(
    desk: Desk, clock: time_machine.Traveller, status: VoiceStatus
) -> None:
    await desk.note(report(voice("a"), "DEPLOYING"))
    desk.lists(report(voice("a"), status))
    clock.shift(1)
    assert await desk.relist() == {voice("a"): status}
    for modified_in, shown in ((0, status), (1, "DEPLOYING")):
        desk.lists(report(voice("a"), "DEPLOYING", modified_in=modified_in))
        clock.shift(1)
        assert await desk.relist() == {voice("a"): shown}


class OddHttp(HttpClient):
    """A provider that lists one voice, with a status that nobody knows yet."""

    def __init__(self) -> None: ...

    async def post(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"output": {"voice_list": [{"voice_id": voice("a"), "status": "REVIEWING"}]}}


@on_sqlite
async def test_a_voice_that_is_listed_with_a_status_that_nobody_knows_is_not_gone(desk: Desk) -> None:
    async def at_once(_: Credential) -> None:
        return

    await desk.note(report(voice("a")), ago=600)
    await VoiceBook(desk.database, EnrollmentClient(OddHttp(), at_once), desk.in_flight).refresh(key())
    assert (await desk.shown()).keys() == {voice("a")}


# ---- Voices of unknown models


async def test_an_id_that_does_not_tell_the_model_is_asked_about_once(desk: Desk) -> None:
    desk.provider.models = {STRANGE: "cosyvoice-v1", "gone-already": VoiceNotFound()}
    desk.lists(report(voice("a")), report(STRANGE), report("gone-already"))
    for _ in range(3):
        assert (await desk.relist()).keys() == {voice("a"), STRANGE, "gone-already"}
    assert [desk.provider.queried.count(each) for each in (STRANGE, voice("a"))] == [1, 0]
    known = [await desk.book.find(key().account, each) for each in (voice("a"), STRANGE, "gone-already")]
    told = [(each.target_model, each.prefix) for each in known if each]
    assert told == [(MODEL, "my"), ("cosyvoice-v1", ""), ("", "")]


@on_sqlite
async def test_a_voice_that_the_provider_cannot_tell_of_does_not_cost_the_list(desk: Desk) -> None:
    desk.provider.models = {STRANGE: UpstreamTimeout()}
    desk.lists(report(voice("a")), report(STRANGE))
    assert voice("a") in await desk.relist()


@pytest.mark.parametrize("odd", [f"cosyvoice-v{'1' * 100}-my-a", STRANGE, f"{MODEL}-{'p' * 100}-a"])
async def test_names_of_any_length_can_be_stored(desk: Desk, odd: str) -> None:
    desk.provider.models = {STRANGE: "m" * 100}
    desk.lists(report(odd), report(voice("a")))
    assert (await desk.relist()).keys() == {odd, voice("a")}


# ---- Pages


async def test_pages_are_newest_first_and_stable_and_show_nothing_deleted(desk: Desk) -> None:
    names = [voice(f"{number:02}") for number in range(25)]
    newest = [voice("a-newest"), voice("new")]
    desk.lists(*map(report, names), report(newest[0], age=timedelta(0)), report(newest[1], age=timedelta(days=1)))
    await desk.relist()
    await desk.book.forget(key().account, voice("07"))
    pages = [await desk.book.page(key().account, number, 10) for number in range(4)]
    oldest = [name for name in sorted(names, reverse=True) if name != voice("07")]
    assert [each.voice_id for page in pages for each in page.voices] == newest + oldest
    assert [(len(page.voices), page.total) for page in pages] == [(10, 26), (10, 26), (6, 26), (0, 26)]


async def test_pages_are_filtered_by_whole_prefix_and_model(desk: Desk) -> None:
    plus = "cosyvoice-v3-plus"
    names = [voice("1"), voice("2", plus), voice("3", prefix="my2"), voice("4", plus, "MY"), voice("5", prefix="vd-my")]
    desk.lists(*map(report, names))
    await desk.book.refresh(key())
    wanted: list[tuple[str | None, str | None, set[str]]] = [
        (None, None, {*names}),
        ("my", None, {names[0], names[1], names[3], names[4]}),
        ("my", MODEL, {names[0], names[4]}),
        (None, plus, {names[1], names[3]}),
        ("m", None, set()),
    ]
    for prefix, model, found in wanted:
        page = await desk.book.page(key().account, 0, 100, prefix, model)
        assert ({each.voice_id for each in page.voices}, page.total) == (found, len(found))


async def test_accounts_never_mix(desk: Desk) -> None:
    other = key("sk-other")
    desk.lists(report(voice("a")), report(voice("mine")))
    desk.lists(report(voice("a"), "DEPLOYING"), report(voice("theirs")), credential=other)
    await asyncio.gather(desk.book.refresh(key()), desk.book.refresh(other))
    await desk.book.forget(other.account, voice("mine"))
    await desk.book.note(other.account, report(voice("a"), "UNDEPLOYED"), datetime.now(UTC))
    await desk.relist()
    await desk.book.forget(key().account, voice("mine"))
    assert await desk.shown() == {voice("a"): "OK"}
    assert await desk.shown(other) == {voice("a"): "UNDEPLOYED", voice("theirs"): "OK"}


async def test_a_thousand_voices_take_few_statements_and_little_time(desk: Desk, clock: time_machine.Traveller) -> None:
    statements: Counter[str] = Counter()
    engine = desk.database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", lambda *args: statements.update([args[2].split()[0]]))
    rounds: dict[str, tuple[VoiceStatus, int, int]] = {
        "first": ("OK", 1000, 40),
        "the same": ("OK", 1000, 20),
        "changed": ("UNDEPLOYED", 1000, 220),
        "gone": ("OK", 1, 30),
    }
    for name, (status, voices, most) in rounds.items():
        desk.lists(*(report(voice(f"{each:04}"), status if each < 100 else "OK") for each in range(voices)))
        clock.shift(2 * LAG)
        statements.clear()
        started_at = time.perf_counter()
        assert len(await desk.relist()) == voices
        assert time.perf_counter() - started_at < PATIENCE_SECONDS
        assert (name, statements.total()) <= (name, most)


async def test_many_new_voices_are_kept_although_the_list_lacks_them(desk: Desk, clock: time_machine.Traveller) -> None:
    old, new = [{voice(f"{kind}{each:02}"): "OK" for each in range(30)} for kind in ("old", "new")]
    desk.lists(*map(report, old))
    assert await desk.relist() == old
    clock.shift(2 * LAG)
    for voice_id in new:
        await desk.note(report(voice_id))
    desk.lists()
    assert await desk.relist() == new


# ---- Many at once


@on_postgresql
@pytest.mark.parametrize("meanwhile", ["updated", "deleted", "vanished"])
async def test_a_slow_look_undoes_nothing_that_was_written_down_meanwhile(
    desk: Desk, clock: time_machine.Traveller, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    get, reading, woken = AsyncSession.get, asyncio.Event(), asyncio.Event()

    async def slowly(session: AsyncSession, *args: Any, **options: Any) -> Any:
        known = await get(session, *args, **options)
        if not reading.is_set():
            reading.set()
            await woken.wait()
        return known

    acts: dict[str, Callable[[], Awaitable[object]]] = {
        "updated": lambda: desk.note(report(voice("a"), "DEPLOYING", modified_in=9)),
        "deleted": lambda: desk.book.forget(key().account, voice("a")),
        "vanished": desk.relist,
    }
    await desk.note(report(voice("a")), ago=10_000)
    monkeypatch.setattr(AsyncSession, "get", slowly)
    looking = asyncio.create_task(desk.note(report(voice("a"), "UNDEPLOYED", modified_in=1)))
    looking.add_done_callback(lambda _: reading.set())
    await reading.wait()
    before = datetime.now(UTC)
    clock.shift(1)
    writing = asyncio.ensure_future(acts[meanwhile]())
    await asyncio.wait([writing], timeout=0.3)
    woken.set()
    await asyncio.gather(looking, writing)
    await desk.book.note(key().account, report(voice("a"), "OK", modified_in=2), before)
    after = {"updated": {voice("a"): "DEPLOYING"}, "deleted": {}, "vanished": {voice("a"): "OK"}}
    assert await desk.shown() == after[meanwhile]


async def test_whatever_happens_at_once_in_the_end_what_the_provider_says_is_known(
    desk: Desk, clock: time_machine.Traveller, unheard: list[dict[str, Any]]
) -> None:
    chance = random.Random(1)
    books = [desk.book, desk.another_book()]
    accounts = [key(), key("sk-other")]
    statuses: list[VoiceStatus] = ["DEPLOYING", "OK", "UNDEPLOYED"]
    for credential in accounts:
        desk.lists(credential=credential)

    async def go_on() -> None:
        for _ in range(30):
            book, credential, act = chance.choice(books), chance.choice(accounts), chance.randrange(10)
            there, voice_id = desk.provider.voices[credential.account], voice(f"{chance.randrange(8)}")
            if act < 3:
                told = report(voice_id, chance.choice(statuses), age=timedelta(seconds=chance.randrange(600)))
                there[voice_id] = told
                await book.note(credential.account, told, datetime.now(UTC))
            elif act < 5:
                there.pop(voice_id, None)
                await book.forget(credential.account, voice_id)
            elif act < 7:
                page = await book.page(credential.account, 0, 100)
                assert {each.account for each in page.voices} <= {credential.account}
            elif act < 8:
                clock.shift(chance.randrange(40))
            else:
                with suppress(NotReady):  # the clock runs fast
                    await book.refresh(credential)

    await asyncio.gather(*(go_on() for _ in range(8)))
    clock.shift(LAG + LISTED_FOR)
    for credential in accounts:
        await desk.book.refresh(credential)
        there = desk.provider.voices[credential.account]
        assert await desk.shown(credential) == {each: told.status for each, told in there.items()}
    assert unheard == []
