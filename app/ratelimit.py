"""Rate limits: refuse beyond a limit, or wait for a turn. In memory, or in Redis for several processes."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import structlog
from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage, Storage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import StorageError

from app.completion import run_to_end
from app.errors import RateLimited
from app.pacing import TURN_MARGIN_SECONDS, LocalPace, Pace, SharedPace
from app.timing import measure
from app.turns import FairTurns

if TYPE_CHECKING:
    from redis.asyncio import BlockingConnectionPool

log = structlog.get_logger(__name__)

REDIS_CONNECTIONS = 32
REDIS_SECONDS = 2.0
# A store that failed is not asked again for this long, so that its time-outs do not slow every call down.
UNREACHABLE_SECONDS = 10.0
# A busy machine may come late to a slot; after so many the next is taken as it comes.
SLOTS_TRIED = 4


class RateLimiter:
    """Limits like `3/second`, each counted apart for the identity given with it.

    When Redis is gone, calls pass: a limit that cannot be counted is no reason to refuse paying users. Those limits
    that keep intruders out hold `always`: then each process counts them alone.
    """

    def __init__(self, redis_url: str | None = None) -> None:
        self._connections = _redis_connections(redis_url) if redis_url else None
        storage: Storage = MemoryStorage()
        if redis_url:
            from limits.aio.storage import RedisStorage  # here, so that who has no Redis does not pay for loading it

            options: dict[str, Any] = {"connection_pool": self._connections}
            storage = RedisStorage(redis_url, wrap_exceptions=True, implementation="redispy", **options)
        self._shared = SlidingWindowCounterRateLimiter(storage)
        self._alone = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._pace: Pace = SharedPace(self._connections) if self._connections else LocalPace()
        self._unreachable_until = 0.0
        self._lines: WeakValueDictionary[tuple[str, ...], FairTurns] = WeakValueDictionary()

    async def check(self, rate: str, *identity: str, always: bool = False) -> None:
        """Count one call. Raises RateLimited, with the seconds to wait, beyond the rate."""
        await self._refuse_unless(SlidingWindowCounterRateLimiter.hit, rate, identity, always)

    async def require(self, rate: str, *identity: str, always: bool = False) -> None:
        """Refuse when the rate is used up, without counting this call. Raises RateLimited."""
        await self._refuse_unless(SlidingWindowCounterRateLimiter.test, rate, identity, always)

    async def wait(self, rate: str, *identity: str, party: str = "") -> None:
        """Wait for a turn within the rate: parties come in turn, and within each who came first is served first.

        Between processes turns go round too: each has one slot reserved at most.
        """
        item = _parse(rate)
        line = self._lines.setdefault((rate, *identity), FairTurns(1))
        with measure("queue"):
            await self._wait(line, item, item.key_for(*identity), party)
        _honour_cancellation()

    async def _wait(self, line: FairTurns, item: RateLimitItem, key: str, party: str) -> None:
        async with line.taken(party):
            with self._open_when_unreachable():
                if self._is_reachable():
                    await self._keep_pace(item, key)

    async def _keep_pace(self, item: RateLimitItem, key: str) -> None:
        for tries_left in reversed(range(SLOTS_TRIED)):
            name, asked_at = self._pace.new_name(), time.monotonic()
            reserving = self._pace.reserve(item, key, name)
            try:
                seconds = await (reserving if self._pace.is_local else run_to_end(reserving))
                await asyncio.sleep(seconds)
            except asyncio.CancelledError:
                await run_to_end(self._pace.give_back(key, name))
                raise
            # A slot that is met too late would crowd the window of the next.
            if not tries_left or time.monotonic() - asked_at - seconds <= TURN_MARGIN_SECONDS:
                return
            await run_to_end(self._pace.give_back(key, name))

    async def _refuse_unless(
        self, passes: Callable[..., Awaitable[bool]], rate: str, identity: tuple[str, ...], always: bool
    ) -> None:
        item = _parse(rate)
        with self._open_when_unreachable():
            if self._is_reachable():
                await _require_pass(self._shared, passes, item, identity)
                return
        if always:
            await _require_pass(self._alone, passes, item, identity)

    def _is_reachable(self) -> bool:
        return time.monotonic() >= self._unreachable_until

    @contextmanager
    def _open_when_unreachable(self) -> Iterator[None]:
        try:
            yield
        except StorageError:
            self._unreachable_until = time.monotonic() + UNREACHABLE_SECONDS
            log.warning("rate_limit_store_unreachable", asked_again_after_seconds=UNREACHABLE_SECONDS)

    async def close(self) -> None:
        """Close the connections to Redis, if there are any."""
        if self._connections is not None:
            await self._connections.aclose()


async def _require_pass(
    limiter: SlidingWindowCounterRateLimiter,
    passes: Callable[..., Awaitable[bool]],
    item: RateLimitItem,
    identity: tuple[str, ...],
) -> None:
    if not await passes(limiter, item, *identity):
        window = await limiter.get_window_stats(item, *identity)
        raise RateLimited(retry_after_seconds=max(1, math.ceil(window.reset_time - time.time())))


def burst_of(rate: str) -> int:
    """How many calls a rate lets through at once."""
    return _parse(rate).amount


@lru_cache
def multiply(rate: str, factor: int) -> str:
    """The rate that lets so many times as many calls through."""
    item = _parse(rate)
    return str(type(item)(item.amount * factor, item.multiples))


def _redis_connections(redis_url: str) -> "BlockingConnectionPool":
    from redis.asyncio import BlockingConnectionPool

    return BlockingConnectionPool.from_url(
        redis_url, max_connections=REDIS_CONNECTIONS, timeout=REDIS_SECONDS, socket_timeout=REDIS_SECONDS
    )


def _honour_cancellation() -> None:
    """Raise the cancellation that the Redis client swallowed: nobody waits for this turn any more."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


@lru_cache
def _parse(rate: str) -> RateLimitItem:
    return parse(rate)
