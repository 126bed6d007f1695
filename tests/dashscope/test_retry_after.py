"""When the provider says when to come back, and how long a call is tried at all."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import httpx
import pytest
import respx
from hypothesis import given, settings
from hypothesis import strategies as st

from app.dashscope import Credential, HttpClient, Interruption, SpeechClient, Usage
from app.dashscope.failures import MAX_RETRY_AFTER_SECONDS, THROTTLE_RETRY_AFTER_SECONDS, ToldSeconds, read_retry_after
from app.dashscope.retries import MAX_ATTEMPTS, Patience
from app.errors import Abandoned, AppError, ConnectionLost, Throttled, UnclearAnswer, Unreachable, UpstreamError
from app.routers.failures import error_response
from tests.dashscope.http_provider import HttpProvider
from tests.dashscope.provider import AUDIO, Call, Provider, Refusal, happened, in_turn, speaks, throttles
from tests.dashscope.speaker import PARAMETERS, Speaker

CALL = "https://dashscope.test/api/v1/call"
FARAWAY = Credential("sk-test-1", "ws://unused.test", "https://dashscope.test/api/v1")
GOOD = {"output": {"text": "你好"}}


@pytest.fixture
async def http() -> AsyncIterator[HttpClient]:
    """A client with the patience of the default settings."""
    async with HttpProvider.run() as provider, provider.client(silence_seconds=60) as client:
        yield client


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses of the HTTP client, which take no time."""
    taken: list[float] = []

    async def note(seconds: float) -> None:
        taken.append(seconds)

    monkeypatch.setattr("app.dashscope.http.asyncio", SimpleNamespace(sleep=note))
    return taken


# ---- What the header says


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 1),
        ("1", 1),
        (" 42 ", 42),
        ("0042", 42),
        ("3600", 3600),
        ("3601", 3600),
        ("999999999999999", 3600),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 1),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3600),
        ("Wednesday, 21-Oct-15 07:28:00 GMT", 1),
    ],
)
def test_a_time_to_come_back_is_read_within_bounds(value: str, seconds: int) -> None:
    assert read_retry_after(value) == seconds


@pytest.mark.parametrize("zone", ["GMT", "-0000"])
def test_a_date_is_as_far_as_it_is_away(zone: str) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True).replace("GMT", zone)
    seconds = read_retry_after(date)
    assert seconds is not None
    assert 80 <= seconds <= 91


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        " ",
        "soon",
        "-5",
        "+5",
        "1.5",
        "1e3",
        "0x10",
        "٤٢",
        "²",
        "5, 10",
        "5;10",
        "1" * 5000,
        "99/99/99",
        "\x00",
    ],
)
def test_what_is_no_time_is_ignored(value: str | None) -> None:
    assert read_retry_after(value) is None


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    st.text(max_size=20)
    | st.tuples(
        st.sampled_from(["Wed, ", "Wednesday, ", ""]),
        st.integers(-1, 99).map(str),
        st.sampled_from([" Oct ", "-Oct-", " ", " 10 ", " Feb "]),
        st.integers(-1, 10**10).map(str),
        st.sampled_from([" 07:28:00 ", " 99:99:99 ", " 7 ", ":", " -1:0 "]),
        st.sampled_from(["GMT", "-0000", "+9999", "-99999999", "EST", ""]),
    ).map("".join)
)
def test_any_header_is_a_time_within_bounds_or_none(value: str) -> None:
    seconds = read_retry_after(value)
    assert seconds is None or 1 <= seconds <= MAX_RETRY_AFTER_SECONDS


def test_our_client_reads_the_number() -> None:
    assert error_response(Throttled(retry_after_seconds=ToldSeconds(42))).headers["Retry-After"] == "42"


# ---- Over HTTP


async def test_our_retries_wait_as_long_as_the_provider_asks_and_a_little_by_chance(
    http: HttpClient, pauses: list[float]
) -> None:
    async with respx.mock() as router:
        throttled = httpx.Response(429, headers={"Retry-After": "7"})
        router.post(CALL).mock(side_effect=[throttled, throttled, httpx.Response(200, json=GOOD)])
        assert await http.post(FARAWAY, "/call", {}) == GOOD
    first, second = pauses
    assert 7 < first < 8
    assert 7 < second < 8
    assert first != second


async def test_without_the_header_our_guess_is_for_the_client_only(http: HttpClient, pauses: list[float]) -> None:
    async with respx.mock() as router:
        route = router.post(CALL).mock(return_value=httpx.Response(429, headers={"Retry-After": "soon"}))
        with pytest.raises(Throttled) as refused:
            await http.post(FARAWAY, "/call", {})
    assert refused.value.retry_after_seconds == THROTTLE_RETRY_AFTER_SECONDS
    assert route.call_count == MAX_ATTEMPTS
    assert max(pauses) < 1


@pytest.mark.parametrize("body", [b"", b'{"code":"Throttling.RateQuota","message":"x"}'])
async def test_who_must_wait_for_longer_than_we_may_is_answered_at_once(
    http: HttpClient, pauses: list[float], body: bytes
) -> None:
    async with respx.mock() as router:
        route = router.post(CALL).mock(return_value=httpx.Response(429, headers={"Retry-After": "90"}, content=body))
        with pytest.raises(Throttled) as refused:
            await http.post(FARAWAY, "/call", {})
    assert refused.value.retry_after_seconds == 90
    assert route.call_count == 1
    assert pauses == []


@pytest.mark.parametrize(
    ("body", "error"),
    [(b"", UnclearAnswer), (b"<html>", UnclearAnswer), (b'{"code":"ModelServingError","message":"x"}', UpstreamError)],
)
async def test_a_503_may_come_after_the_work_so_that_only_the_client_hears_of_the_time(
    http: HttpClient, pauses: list[float], body: bytes, error: type[AppError]
) -> None:
    async with respx.mock() as router:
        route = router.post(CALL).mock(return_value=httpx.Response(503, headers={"Retry-After": "7"}, content=body))
        with pytest.raises(error) as refused:
            await http.post(FARAWAY, "/call", {})
    assert type(refused.value) is error
    assert refused.value.retry_after_seconds == 7
    assert (route.call_count, pauses) == (1, [])


async def test_a_free_question_is_asked_again_when_the_provider_says_when(
    http: HttpClient, pauses: list[float]
) -> None:
    async with respx.mock() as router:
        away = httpx.Response(503, headers={"Retry-After": "7"})
        router.get(CALL).mock(side_effect=[away, httpx.Response(200, json=GOOD)])
        assert await http.get(FARAWAY, "/call") == GOOD
    assert [7 < each < 8 for each in pauses] == [True]


@pytest.mark.parametrize("status", [200, 400, 500, 502, 504])
async def test_the_header_means_nothing_beside_another_status(http: HttpClient, status: int) -> None:
    async with respx.mock() as router:
        router.get(CALL).mock(return_value=httpx.Response(status, headers={"Retry-After": "7"}))
        with pytest.raises(UnclearAnswer) as refused:
            await http.get(FARAWAY, "/call")
    assert refused.value.retry_after_seconds is None


@pytest.mark.parametrize("body", [b'{"code":"PrepaidBillOverdue"}', b'{"message":"Free allocated quota exceeded."}'])
async def test_what_does_not_pass_by_waiting_names_no_time(http: HttpClient, body: bytes) -> None:
    async with respx.mock() as router:
        router.post(CALL).mock(return_value=httpx.Response(429, headers={"Retry-After": "7"}, content=body))
        with pytest.raises(UpstreamError) as refused:
            await http.post(FARAWAY, "/call", {})
    assert refused.value.retry_after_seconds is None


# ---- In a handshake


@pytest.mark.parametrize(
    ("status", "error"), [(429, Throttled), (503, ConnectionLost)], ids=["throttled", "unavailable"]
)
async def test_a_refused_handshake_that_asks_for_too_much_time_is_told_at_once(
    provider: Provider, speaker: Speaker, status: int, error: type[AppError]
) -> None:
    provider.expect(Refusal(status, retry_after=("90",)), Refusal(status, retry_after=("91",)))
    with pytest.raises(error) as refused:
        await speaker.say()
    assert refused.value.retry_after_seconds == 90
    assert len(provider.handshakes) == 1
    with pytest.raises(error) as verified:
        await speaker.verify()
    assert verified.value.retry_after_seconds == 91


async def test_a_refused_handshake_is_tried_again_at_the_time_it_names(provider: Provider, speaker: Speaker) -> None:
    provider.expect(Refusal(503, retry_after=("1",)), speaks())
    began = asyncio.get_running_loop().time()
    assert await speaker.say() == AUDIO
    assert asyncio.get_running_loop().time() - began >= 1


async def test_two_times_in_a_handshake_are_none(provider: Provider, speaker: Speaker) -> None:
    provider.expect(Refusal(429, retry_after=("90", "80")), speaks())
    assert await speaker.say() == AUDIO


async def test_one_who_leaves_during_the_pause_ends_it(provider: Provider, speaker: Speaker) -> None:
    interruption, refused = Interruption(), asyncio.Event()
    patient = replace(speaker, silence_seconds=600)

    async def leaves() -> None:
        while not provider.handshakes:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # until the refusal has arrived, and for its pause to begin
        interruption.request()
        refused.set()

    provider.expect(Refusal(429, retry_after=("300",)))
    leaving = asyncio.create_task(leaves())
    async with asyncio.timeout(3):
        with pytest.raises(Abandoned):
            await patient.say(interruption=interruption)
    await leaving
    assert refused.is_set()
    assert len(provider.handshakes) == 1


# ---- How long a call is tried


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """The time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock by which patience ends."""
    clock = Clock()
    monkeypatch.setattr("app.dashscope.retries.time", clock)
    return clock


def test_patience_ends_with_its_time_or_its_attempts(clock: Clock) -> None:
    patience = Patience(60)
    for attempt in range(1, MAX_ATTEMPTS):
        assert patience.pause_seconds(attempt, ConnectionLost()) is not None
    assert patience.pause_seconds(MAX_ATTEMPTS, ConnectionLost()) is None
    assert patience.pause_seconds(1, Throttled(retry_after_seconds=ToldSeconds(59))) is not None
    assert patience.pause_seconds(1, Throttled(retry_after_seconds=ToldSeconds(60))) is None
    clock.now += 59.9
    assert patience.pause_seconds(1, ConnectionLost()) is not None
    clock.now += 0.2
    assert patience.pause_seconds(1, ConnectionLost()) is None


def test_a_queue_costs_no_patience(clock: Clock) -> None:
    patience = Patience(60)
    with patience.stopped():
        clock.now += 600
    clock.now += 50
    with pytest.raises(ZeroDivisionError), patience.stopped():
        clock.now += 600
        raise ZeroDivisionError
    assert patience.pause_seconds(1, ConnectionLost()) is not None
    clock.now += 11
    assert patience.pause_seconds(1, ConnectionLost()) is None


async def test_over_http_no_attempt_begins_after_the_time_of_silence(http: HttpClient, clock: Clock) -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        clock.now += 40
        raise httpx.ConnectError("refused")

    async with respx.mock() as router:
        route = router.post(CALL).mock(side_effect=refuse)
        with pytest.raises(Unreachable):
            await http.post(FARAWAY, "/call", {})
    assert route.call_count == 2


async def test_in_speech_no_attempt_begins_after_the_time_of_silence(
    provider: Provider, speaker: Speaker, clock: Clock
) -> None:
    async def slowly(call: Call) -> None:
        await call.hear_run_task()
        clock.now += 3
        await call.fail("Throttling.RateQuota", "Requests rate limit exceeded")

    provider.expect(slowly, slowly)
    with pytest.raises(Throttled):
        await speaker.say()
    assert len(provider.handshakes) == 2


async def test_a_long_wait_for_a_turn_leaves_all_attempts(provider: Provider, speaker: Speaker, clock: Clock) -> None:
    async def wait_for_turn(credential: Credential, model: str) -> None:
        clock.now += 1000

    provider.expect(throttles, throttles, throttles, speaks())
    client = SpeechClient(speaker.pool, wait_for_turn, 1, speaker.silence_seconds)
    async with client.speak(speaker.credential, PARAMETERS, "你好", Usage()) as task:
        assert b"".join([frame async for frame in task.audio()]) == AUDIO


async def test_a_dead_connection_is_replaced_however_long_that_took_to_find_out(
    provider: Provider, speaker: Speaker, clock: Clock
) -> None:
    async def dies_late(call: Call) -> None:
        await call.hear_run_task()
        clock.now += 1000
        await call.drop()

    provider.expect(in_turn(speaks(), dies_late), speaks(b"two"))
    await speaker.say()
    assert await speaker.say() == b"two"


# ---- Users of one key


async def test_a_burst_of_one_user_does_not_hold_up_another_of_the_same_key(
    provider: Provider, speaker: Speaker
) -> None:
    asked, may_go, order = asyncio.Event(), asyncio.Event(), list[str]()

    async def wait_for_turn(credential: Credential, model: str) -> None:
        order.append(credential.user)
        asked.set()
        await may_go.wait()

    client = SpeechClient(speaker.pool, wait_for_turn, 2, speaker.silence_seconds)

    async def say(user: str) -> None:
        credential = replace(speaker.credential, user=user)
        async with client.speak(credential, PARAMETERS, "你好", Usage()) as task:
            async for _ in task.audio():
                pass

    provider.expect(*[in_turn(*[speaks()] * 13)] * 13)
    burst = [asyncio.create_task(say("ann")) for _ in range(12)]
    await happened(asked)
    single = asyncio.create_task(say("bob"))
    await asyncio.sleep(0.01)
    may_go.set()
    async with asyncio.timeout(5):
        await asyncio.gather(single, *burst)
    assert order.count("ann") == 12
    assert order.index("bob") == 2
    assert not client._lines
    assert len(provider.handshakes) < 13  # they share connections all the same
