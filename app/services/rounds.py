"""Checking what is due, round after round: in the background, and at once when somebody asks.

Every process goes its rounds; claims keep them apart.
"""

import asyncio
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Generic

import structlog
from anyio import CancelScope

from app.completion import run_to_end
from app.errors import AppError, InvalidApiKey, NoApiKey, SealBroken
from app.services.claims import Claimed, Claims, Row
from app.services.inflight import InFlight

log = structlog.get_logger(__name__)

CHECKS_AT_ONCE = 64
CHECKS_PER_USER = 8  # one user's slow checks leave room for everybody else's
ROUND_SECONDS = 5.0
FAILED_CHECK_SECONDS = 10.0
NO_KEY_SECONDS = 60.0


class Rounds(ABC, Generic[Row]):
    """Asks the provider about the rows of one table when they are due."""

    def __init__(self, rows: Claims[Row], in_flight: InFlight) -> None:
        self._rows = rows
        self._in_flight = in_flight
        self._checking: dict[int, asyncio.Task[AppError | None]] = {}
        self._busy: Counter[uuid.UUID] = Counter()
        self._awake = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled: check every row when it is due."""
        while True:
            self._awake.clear()
            try:
                pause_seconds = await self._start_due_checks()
            except Exception as error:
                # Whatever it was, the next round must come.
                log.warning("round_failed", rounds=type(self).__name__, error=type(error).__name__, exc_info=True)
                pause_seconds = ROUND_SECONDS
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_seconds):
                    await self._awake.wait()

    def wake(self) -> None:
        """Have the next round begin now: there is a new row."""
        self._awake.set()

    def check(self, record_id: int) -> asyncio.Task[AppError | None]:
        """Ask the provider about a row, once for everybody who asks now. Gives what kept us from an answer."""
        if record_id not in self._checking:
            checking = self._in_flight.start(self._check(record_id))
            self._checking[record_id] = checking
            checking.add_done_callback(lambda done: self._finish(record_id, done))
        return self._checking[record_id]

    def _finish(self, record_id: int, done: asyncio.Task[AppError | None]) -> None:
        del self._checking[record_id]
        if not done.cancelled() and done.exception() is None:
            self._awake.set()

    async def _start_due_checks(self) -> float:
        """Start as many checks as there is room for; gives the seconds until the next is due."""
        room = CHECKS_AT_ONCE - len(self._checking)
        if room <= 0 or self._in_flight.stopping:
            return ROUND_SECONDS
        now = datetime.now(UTC)
        for row in await self._rows.due(room + 1, without=self._users_at_their_limit()):
            if row.due_at > now:
                return min(ROUND_SECONDS, (row.due_at - now).total_seconds())
            if row.user_id not in self._users_at_their_limit():
                self._busy[row.user_id] += 1
                self.check(row.record_id).add_done_callback(partial(self._leave, row.user_id))
        return ROUND_SECONDS

    def _users_at_their_limit(self) -> set[uuid.UUID]:
        return {user_id for user_id, checks in self._busy.items() if checks >= CHECKS_PER_USER}

    def _leave(self, user_id: uuid.UUID, _: object) -> None:
        self._busy[user_id] -= 1
        if not self._busy[user_id]:
            del self._busy[user_id]

    async def _check(self, record_id: int) -> AppError | None:
        claimed = await self._rows.claim(record_id)
        if claimed is None:
            return None
        failure: AppError | None = None
        changes = again_in(FAILED_CHECK_SECONDS)
        try:
            with CancelScope() as scope, self._in_flight.stoppable(scope.cancel):
                async with self._rows.kept(claimed):
                    changes = await self._ask(claimed)
            if scope.cancelled_caught:
                changes = {}
        except AppError as error:
            failure = error
            if isinstance(error, NoApiKey | SealBroken | InvalidApiKey):
                changes = again_in(NO_KEY_SECONDS)
        except Exception:
            log.exception("check_broke", rounds=type(self).__name__, record_id=record_id)
            failure = AppError()
        finally:
            if failure is not None and self._is_hopeless(claimed):
                await run_to_end(self._give_up(claimed, failure))
            await run_to_end(self._rows.put_back(claimed, changes))
        if failure is not None:
            log.warning("check_failed", rounds=type(self).__name__, record_id=record_id, error=type(failure).__name__)
        return failure

    @abstractmethod
    async def _ask(self, claimed: Claimed[Row]) -> dict[str, Any]:
        """Ask the provider once, and act on what it says. Gives what is to be noted if the row is to be asked again.

        Raises the AppError that kept it from an answer.
        """

    @abstractmethod
    def _is_hopeless(self, claimed: Claimed[Row]) -> bool:
        """Whether a row that can't be asked about has been waited for long enough."""

    @abstractmethod
    async def _give_up(self, claimed: Claimed[Row], failure: AppError) -> None:
        """End a hopeless row."""


def again_in(seconds: float) -> dict[str, Any]:
    """What to note for a row that is to be asked about after a while."""
    now = datetime.now(UTC)
    return {"checked_at": now, "next_check_at": now + timedelta(seconds=seconds)}
