"""Limits that refuse and limits that queue, in memory and in Redis."""

import asyncio
import socket
import sys
import time
import uuid
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
from limits import RateLimitItem, parse

from app.errors import RateLimited
from app.pacing import TURN_MARGIN_SECONDS, LocalPace
from app.ratelimit import RateLimiter
from tests.servers import PROJECT
from tests.skipping import skip_without

REDIS_ADDRESS = ("127.0.0.1", 6379)
DAY_SECONDS = 86400


@pytest.fixture
def redis_url() -> str:
    """A Redis on the loopback; who needs it is skipped where there is none."""
    try:
        socket.create_connection(REDIS_ADDRESS, timeout=1).close()
    except OSError:
        skip_without("Redis on the loopback")
    return "redis://{}:{}".format(*REDIS_ADDRESS)


@pytest.fixture(params=["memory", "redis"])
async def limiter(request: pytest.FixtureRequest) -> AsyncIterator[RateLimiter]:
    """A limiter of each kind."""
    if request.param == "memory":
        yield RateLimiter()
        return
    limiter = RateLimiter(request.getfixturevalue("redis_url"))
    yield limiter
    await limiter.close()


@pytest.fixture
def name() -> str:
    """A name that no other test uses: Redis remembers."""
    return f"test-{uuid.uuid4().hex}"


async def test_calls_beyond_the_rate_are_refused_with_the_time_to_come_back(limiter: RateLimiter, name: str) -> None:
    for _ in range(3):
        await limiter.check("3/day", name)
    with pytest.raises(RateLimited) as refused:
        await limiter.check("3/day", name)
    assert refused.value.retry_after_seconds is not None
    assert 1 <= refused.value.retry_after_seconds <= DAY_SECONDS


async def test_requiring_counts_nothing(limiter: RateLimiter, name: str) -> None:
    for _ in range(10):
        await limiter.require("1/day", name)
    await limiter.check("1/day", name)
    with pytest.raises(RateLimited) as refused:
        await limiter.require("1/day", name)
    assert refused.value.retry_after_seconds is not None
    assert 1 <= refused.value.retry_after_seconds <= DAY_SECONDS


async def test_refused_calls_do_not_prolong_the_refusal(name: str) -> None:
    limiter = RateLimiter()

    async def insist() -> None:
        while True:
            await limiter.check("1/second", name)

    with pytest.raises(RateLimited) as refused:
        await insist()
    assert refused.value.retry_after_seconds == 1
    await asyncio.sleep(refused.value.retry_after_seconds + 0.05)
    await limiter.check("1/second", name)


async def test_other_identities_are_not_refused(limiter: RateLimiter, name: str) -> None:
    await limiter.check("1/day", "login", name)
    await limiter.check("1/day", "login", f"{name}-other")
    await limiter.check("1/day", "upload", name)
    with pytest.raises(RateLimited):
        await limiter.check("1/day", "login", name)


async def test_at_the_same_time_no_more_pass_than_the_rate(limiter: RateLimiter, name: str) -> None:
    results = await asyncio.gather(*(limiter.check("5/day", name) for _ in range(20)), return_exceptions=True)
    assert [type(result) for result in results].count(RateLimited) == 15


async def test_waiters_pass_in_order_and_never_more_than_the_rate_within_a_second(
    limiter: RateLimiter, name: str
) -> None:
    passed: list[tuple[int, float]] = []

    async def wait(number: int) -> None:
        await limiter.wait("3/second", name)
        passed.append((number, time.monotonic()))

    first_started = time.monotonic()
    await wait(0)
    await asyncio.sleep(0.5)
    others_started = time.monotonic()
    await asyncio.gather(*(wait(number) for number in range(1, 6)))
    assert [number for number, _ in passed] == list(range(6))
    times = [moment for _, moment in passed]
    assert times[3] >= first_started + 1
    assert times[4] >= others_started + 1


async def test_a_queue_holds_up_nobody_else(limiter: RateLimiter, name: str) -> None:
    await limiter.wait("1/day", name)
    waiting = asyncio.create_task(limiter.wait("1/day", name))
    async with asyncio.timeout(5):
        await limiter.wait("1/day", f"{name}-other")
    assert not waiting.done()
    await leave(waiting)


@pytest.mark.parametrize("steps", range(8))
async def test_a_waiter_can_leave_at_any_moment(limiter: RateLimiter, name: str, steps: int) -> None:
    await limiter.wait("1/day", name)
    waiting = asyncio.create_task(limiter.wait("1/day", name))
    for _ in range(steps):
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting}, timeout=0.2)
    left = waiting.done()
    await leave(waiting)
    assert left


async def leave(waiting: "asyncio.Task[None]") -> None:
    """End a waiter, however often he must be told."""
    async with asyncio.timeout(5):
        while not waiting.done():
            waiting.cancel()
            await asyncio.wait({waiting}, timeout=0.05)


async def test_a_waiter_who_leaves_gives_up_his_place(name: str) -> None:
    limiter = RateLimiter()
    await limiter.wait("1/second", name)
    impatient = [asyncio.create_task(limiter.wait("1/second", name)) for _ in range(5)]
    patient = asyncio.create_task(limiter.wait("1/second", name))
    await asyncio.sleep(0)
    for waiter in impatient:
        waiter.cancel()
    async with asyncio.timeout(3):
        await patient


async def test_a_single_call_does_not_wait_for_the_burst_of_another_party(name: str) -> None:
    limiter, passed = RateLimiter(), list[str]()

    async def wait(party: str) -> None:
        await limiter.wait("4/second", name, party=party)
        passed.append(party)

    burst = [asyncio.create_task(wait("ann")) for _ in range(40)]
    while len(passed) < 4:
        await asyncio.sleep(0.01)
    async with asyncio.timeout(5):
        await wait("bob")
    assert passed.index("bob") == 5
    for waiting in burst:
        await leave(waiting)


async def test_a_slot_that_was_given_up_is_there_for_the_next(limiter: RateLimiter, name: str) -> None:
    await limiter.wait("1/day", name)
    for _ in range(5):
        waiting = asyncio.create_task(limiter.wait("1/day", name))
        await asyncio.sleep(0.02)
        await leave(waiting)
    day = parse("1/day")
    assert DAY_SECONDS - 60 < await limiter._pace.reserve(day, day.key_for(name), "next") < DAY_SECONDS + 60


async def test_a_slot_that_is_met_too_late_is_given_back_and_another_taken(
    limiter: RateLimiter, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve, asked = limiter._pace.reserve, 0

    async def reserve_slowly(item: RateLimitItem, key: str, slot: str) -> float:
        nonlocal asked
        asked += 1
        seconds = await reserve(item, key, slot)
        await asyncio.sleep(0.3 if asked == 1 else 0)
        return seconds

    monkeypatch.setattr(limiter._pace, "reserve", reserve_slowly)
    for _ in range(2):
        await limiter.wait("2/day", name)
    assert asked == 3


async def test_no_line_is_kept_that_nobody_stands_in(name: str) -> None:
    limiter = RateLimiter()
    await asyncio.gather(*(limiter.wait("9/second", f"{name}-{number}", party="ann") for number in range(9)))
    assert not limiter._lines


async def test_no_window_is_kept_that_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("app.pacing.time", SimpleNamespace(monotonic=lambda: now))
    pace, rate = LocalPace(), parse("1/second")
    for number in range(50):
        assert await pace.reserve(rate, f"key-{number}", "slot") == 0
    now += 0.5
    assert await pace.reserve(rate, "key-0", "slot") == pytest.approx(0.5 + TURN_MARGIN_SECONDS)
    now += 1
    assert await pace.reserve(rate, "another", "slot") == 0
    assert list(pace._slots) == list(pace._over_at) == ["key-0", "another"]


OTHER_PROCESS = """
import asyncio, sys, time
from app.ratelimit import RateLimiter

async def main(url, name, calls):
    limiter = RateLimiter(url)

    async def call():
        await limiter.wait("4/second", name)
        print(time.time(), flush=True)

    print("ready", flush=True)
    sys.stdin.readline()
    await asyncio.gather(*(call() for _ in range(int(calls))))
    await limiter.close()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_two_processes_keep_one_rate(redis_url: str, name: str) -> None:
    started = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", OTHER_PROCESS, redis_url, name, "4", cwd=PROJECT, stdin=PIPE, stdout=PIPE
        )
        for _ in range(2)
    ]
    for process in started:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
    told = await asyncio.gather(*(process.communicate(b"go\n") for process in started))
    moments = [[float(line) for line in output.split()] for output, _ in told]
    assert [len(each) for each in moments] == [4, 4]
    passed = sorted(moments[0] + moments[1])
    assert all(later - earlier >= 1 for earlier, later in zip(passed, passed[4:], strict=False))
    assert passed[-1] - passed[0] < 15


async def test_waiting_in_redis_asks_once_for_each_turn(
    redis_url: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limiter = RateLimiter(redis_url)
    reserve, asked = limiter._pace.reserve, 0

    async def count(item: RateLimitItem, key: str, slot: str) -> float:
        nonlocal asked
        asked += 1
        return await reserve(item, key, slot)

    monkeypatch.setattr(limiter._pace, "reserve", count)
    waiting = [asyncio.create_task(limiter.wait("2/day", name)) for _ in range(5)]
    await asyncio.wait(waiting, timeout=0.3)
    assert 3 <= asked <= 5  # some may be met late on a busy machine
    await asyncio.gather(*map(leave, waiting))
    await limiter.close()


async def test_calls_pass_while_redis_is_gone(name: str) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        limiter = RateLimiter(f"redis://127.0.0.1:{nobody.getsockname()[1]}")
        async with asyncio.timeout(5):
            for _ in range(2):
                await limiter.check("1/day", name)
                await limiter.require("1/day", name)
                await limiter.wait("1/day", name)
        await limiter.close()


async def test_what_keeps_intruders_out_is_counted_while_redis_is_gone(name: str) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        limiter = RateLimiter(f"redis://127.0.0.1:{nobody.getsockname()[1]}")
        async with asyncio.timeout(5):
            for _ in range(2):
                await limiter.require("2/day", name, always=True)
                await limiter.check("2/day", name, always=True)
            for refuse in (limiter.require, limiter.check):
                with pytest.raises(RateLimited):
                    await refuse("2/day", name, always=True)
            await limiter.check("2/day", name)
        await limiter.close()
