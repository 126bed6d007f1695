"""Slots within a rate: who reserves one is told how long to wait for it. In memory, or in Redis for several processes.

In no window of the rate's length, and a margin for what travels, lie more slots than the rate allows.
"""

import time
import uuid
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, ClassVar, Protocol

from limits import RateLimitItem
from limits.errors import StorageError

if TYPE_CHECKING:
    from redis.asyncio import BlockingConnectionPool

# Calls travel: two that leave a second apart may arrive a little closer together.
TURN_MARGIN_SECONDS = 0.1

# By the clock of Redis, in milliseconds. A slot is the first moment that follows the last but `amount` by a `span`.
_RESERVE = """
local clock, amount, span = redis.call('TIME'), tonumber(ARGV[1]), tonumber(ARGV[2])
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - span)
local before, slot = redis.call('ZREVRANGE', KEYS[1], amount - 1, amount - 1, 'WITHSCORES')[2], now
if before then slot = math.max(now, before + span) end
redis.call('ZADD', KEYS[1], slot, ARGV[3])
redis.call('PEXPIRE', KEYS[1], slot - now + span)
return slot - now
"""


class Pace(Protocol):
    """Where slots are reserved: `name` is a new one for each. One may be out for a key at a time in each process."""

    is_local: ClassVar[bool]
    """Whether nothing is waited for, so that nothing can be cancelled on the way."""

    def new_name(self) -> str:
        """A name for a slot."""

    async def reserve(self, item: RateLimitItem, key: str, name: str) -> float:
        """Reserve the next slot; gives the seconds until then. Raises limits' StorageError."""

    async def give_back(self, key: str, name: str) -> None:
        """Give the last slot back that was reserved for a key, unused. Raises limits' StorageError."""


class LocalPace:
    """The pace of this process."""

    is_local: ClassVar[bool] = True

    def __init__(self) -> None:
        self._slots: OrderedDict[str, deque[float]] = OrderedDict()  # the key that was used last stands last
        self._over_at: dict[str, float] = {}

    def new_name(self) -> str:
        """The last slot of a key needs none."""
        return ""

    async def reserve(self, item: RateLimitItem, key: str, name: str) -> float:
        """Reserve the next slot; gives the seconds until then."""
        now, span = time.monotonic(), item.get_expiry() + TURN_MARGIN_SECONDS
        self._forget(now)
        slots = self._slots.setdefault(key, deque())
        self._slots.move_to_end(key)
        while slots and slots[0] <= now - span:
            slots.popleft()
        slots.append(now if len(slots) < item.amount else slots[-item.amount] + span)
        self._over_at[key] = slots[-1] + span
        return slots[-1] - now

    async def give_back(self, key: str, name: str) -> None:
        """Give the last slot back that was reserved for a key, unused."""
        if slots := self._slots.get(key):
            slots.pop()

    def _forget(self, now: float) -> None:
        while self._slots and self._over_at[key := next(iter(self._slots))] <= now:
            del self._slots[key], self._over_at[key]


class SharedPace:
    """The pace of all processes that use the same Redis, each served in the order in which it asks."""

    is_local: ClassVar[bool] = False

    def __init__(self, connections: "BlockingConnectionPool") -> None:
        from redis.asyncio import Redis  # here, so that who has no Redis does not pay for loading it
        from redis.exceptions import RedisError

        self._redis = Redis(connection_pool=connections)
        self._reserve = self._redis.register_script(_RESERVE)
        self._failure = RedisError

    def new_name(self) -> str:
        """One that no other process gives."""
        return uuid.uuid4().hex

    async def reserve(self, item: RateLimitItem, key: str, name: str) -> float:
        """Reserve the next slot; gives the seconds until then. Raises limits' StorageError."""
        span_ms = round((item.get_expiry() + TURN_MARGIN_SECONDS) * 1000)
        try:
            return int(await self._reserve(keys=[_named(key)], args=[item.amount, span_ms, name])) / 1000
        except self._failure as error:
            raise StorageError(error) from error

    async def give_back(self, key: str, name: str) -> None:
        """Give a slot back unused. Raises limits' StorageError."""
        try:
            await self._redis.zrem(_named(key), name)
        except self._failure as error:
            raise StorageError(error) from error


def _named(key: str) -> str:
    return f"TURNS:{key}"
