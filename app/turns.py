"""Turns for parties that share something scarce, so that none waits for the whole of another's burst."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairTurns:
    """A number of turns at a time: round-robin over the parties that wait, first come first served within each."""

    def __init__(self, at_once: int) -> None:
        self._free = at_once
        # Whose turn is next stands first, in both; a party stands here only while somebody of it waits.
        self._waiting: OrderedDict[str, OrderedDict[asyncio.Future[None], None]] = OrderedDict()

    @asynccontextmanager
    async def taken(self, party: str) -> AsyncIterator[None]:
        """Wait for a turn, and hold it inside the block. Who is cancelled while waiting leaves no trace."""
        await self._take(party)
        try:
            yield
        finally:
            if party in self._waiting:  # behind those who came during its turn
                self._waiting.move_to_end(party)
            self._pass_on()

    async def _take(self, party: str) -> None:
        if self._free:  # then nobody waits
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(party, OrderedDict())[turn] = None
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._leave(party, turn)
            else:  # it was given in the same moment
                self._pass_on()
            raise

    def _leave(self, party: str, turn: asyncio.Future[None]) -> None:
        line = self._waiting.get(party, OrderedDict())
        line.pop(turn, None)
        if not line:
            self._waiting.pop(party, None)

    def _pass_on(self) -> None:
        while self._waiting:
            party, line = self._waiting.popitem(last=False)
            while line:
                turn, _ = line.popitem(last=False)
                if not turn.done():
                    if line:
                        self._waiting[party] = line
                    turn.set_result(None)
                    return
        self._free += 1
