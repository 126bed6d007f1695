"""Limits that refuse and limits that queue, in memory and in Redis."""

import asyncio
import socket
import time
import uuid
from collections.abc import AsyncIterator

import pytest

from app.errors import RateLimited
from app.ratelimit import RateLimiter
from tests.skipping import skip_without

REDIS_ADDRESS = ("127.0.0.1", 6379)
DAY_SECONDS = 86400


@pytest.fixture(params=["memory", "redis"])
async def limiter(request: pytest.FixtureRequest) -> AsyncIterator[RateLimiter]:
    """A limiter of each kind; Redis is skipped where none listens on the loopback."""
    if request.param == "memory":
        yield RateLimiter()
        return
    try:
        socket.create_connection(REDIS_ADDRESS, timeout=1).close()
    except OSError:
        skip_without("Redis on the loopback")
    limiter = RateLimiter("redis://{}:{}".format(*REDIS_ADDRESS))
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
