"""Turns go round over those who wait, whoever comes, leaves or is cancelled."""

import asyncio
import gc
import random
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.turns import FairTurns


class Crowd:
    """Callers of several parties at the same turns; `served` says in which order they had theirs."""

    def __init__(self, at_once: int) -> None:
        self.turns = FairTurns(at_once)
        self.served: list[str] = []
        self.holding = 0
        self.most = 0
        self._leaves: dict[asyncio.Task[None], asyncio.Event] = {}

    def come(self, party: str) -> asyncio.Task[None]:
        """Let a caller come; he holds his turn until he is told to leave."""
        may_leave = asyncio.Event()
        caller = asyncio.create_task(self._hold(party, may_leave))
        self._leaves[caller] = may_leave
        return caller

    def leave(self, caller: asyncio.Task[None]) -> None:
        """Let a caller give his turn back as soon as he has it."""
        self._leaves[caller].set()

    async def _hold(self, party: str, may_leave: asyncio.Event) -> None:
        async with self.turns.taken(party):
            self.served.append(party)
            self.holding += 1
            self.most = max(self.most, self.holding)
            try:
                await may_leave.wait()
            finally:
                self.holding -= 1


async def settle() -> None:
    """Let everybody do what can be done now."""
    for _ in range(10):
        await asyncio.sleep(0)


async def served(at_once: int, *parties: str) -> str:
    """In which order callers have their turns who came in this one and hold none for long."""
    crowd = Crowd(at_once)
    callers = [crowd.come(party) for party in parties]
    await settle()
    for caller in callers:
        crowd.leave(caller)
    await asyncio.gather(*callers)
    assert crowd.most <= at_once
    return "".join(crowd.served)


@pytest.mark.parametrize(
    ("came", "order"),
    [
        ("aaaa", "aaaa"),
        ("aaaaaab", "abaaaaa"),
        ("aaaabbcc", "abcabcaa"),
        ("abab", "abab"),
        ("abcabc", "abcabc"),
    ],
)
async def test_turns_go_round_over_the_parties_that_wait(came: str, order: str) -> None:
    assert await served(1, *came) == order


async def test_a_single_call_does_not_wait_for_the_burst_of_another() -> None:
    order = await served(3, *("a" * 100), "b")
    assert order.index("b") == 3


async def test_turns_go_round_when_several_are_held_at_a_time() -> None:
    assert await served(2, *"aaaaabbcc") == "aabcabcaa"


async def test_within_a_party_who_came_first_is_served_first() -> None:
    turns, order = FairTurns(1), list[tuple[str, int]]()

    async def call(party: str, number: int) -> None:
        async with turns.taken(party):
            order.append((party, number))
            await asyncio.sleep(0)

    await asyncio.gather(*(call(party, number) for number in range(20) for party in "abc"))
    assert [number for party, number in order if party == "b"] == list(range(20))
    assert len(order) == 60


async def test_who_comes_again_and_again_takes_turns_with_a_burst() -> None:
    turns, order = FairTurns(1), list[str]()

    async def call(party: str) -> None:
        async with turns.taken(party):
            order.append(party)
            await asyncio.sleep(0)

    burst = [asyncio.create_task(call("a")) for _ in range(20)]
    await asyncio.sleep(0)
    for _ in range(5):
        await call("b")
    assert "".join(order) == "ab" * 5
    await asyncio.gather(*burst)


async def test_a_turn_that_is_given_to_one_who_leaves_in_that_moment_is_passed_on() -> None:
    crowd = Crowd(1)
    holder, leaver, other = crowd.come("a"), crowd.come("b"), crowd.come("c")
    await settle()
    holder.cancel()
    await asyncio.sleep(0)  # now the leaver has been given the turn, and does not know it yet
    leaver.cancel()
    await settle()
    assert crowd.served == ["a", "c"]
    crowd.leave(other)
    await asyncio.gather(holder, leaver, other, return_exceptions=True)


async def test_who_is_cancelled_in_a_line_loses_nothing_for_those_behind_him() -> None:
    crowd = Crowd(1)
    holder = crowd.come("a")
    waiting = [crowd.come(party) for party in "bbbc"]
    await settle()
    for caller in (waiting[0], waiting[1], holder):  # in one moment
        caller.cancel()
    await settle()
    assert crowd.served == ["a", "b"]
    for caller in waiting:
        crowd.leave(caller)
    await asyncio.gather(holder, *waiting, return_exceptions=True)
    assert crowd.served == ["a", "b", "c"]


deeds = st.lists(
    st.one_of(
        st.tuples(st.just("come"), st.sampled_from("abc")),
        st.tuples(st.sampled_from(["leave", "cancel"]), st.integers(0, 30)),
        st.tuples(st.just("pass"), st.integers(1, 3)),
    ),
    max_size=40,
)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(at_once=st.integers(1, 3), deeds=deeds)
def test_no_turn_is_lost_or_given_twice_whoever_leaves(at_once: int, deeds: list[tuple[str, str | int]]) -> None:
    async def play() -> None:
        crowd, callers = Crowd(at_once), list[asyncio.Task[None]]()
        for deed, what in deeds:
            if isinstance(what, str):
                callers.append(crowd.come(what))
            elif deed == "pass":
                for _ in range(what):
                    await asyncio.sleep(0)
            elif what < len(callers):
                if deed == "leave":
                    crowd.leave(callers[what])
                else:
                    callers[what].cancel()
        await settle()
        still = [caller for caller in callers if not caller.done()]
        assert crowd.holding == min(at_once, len(still))
        for caller in still:
            crowd.leave(caller)
        await asyncio.gather(*callers, return_exceptions=True)
        assert crowd.most <= at_once
        assert not crowd.turns._waiting
        assert crowd.turns._free == at_once

    asyncio.run(play())


async def test_a_storm_of_cancellations_leaves_every_turn_to_those_who_stay() -> None:
    crowd, chance = Crowd(2), random.Random(7)
    callers = [crowd.come(f"user-{chance.randrange(5)}") for _ in range(400)]
    stay = set(chance.sample(range(400), 40))
    for number, caller in enumerate(callers):
        crowd.leave(caller)
        if number not in stay:
            asyncio.get_running_loop().call_later(chance.uniform(0, 0.01), caller.cancel)
    async with asyncio.timeout(5):
        for number in stay:
            await callers[number]
    await asyncio.gather(*callers, return_exceptions=True)
    assert crowd.most <= 2
    assert not crowd.turns._waiting


async def test_a_turn_costs_the_same_in_a_long_line() -> None:
    async def seconds_each(length: int) -> float:
        turns = FairTurns(1)

        async def call(party: str) -> None:
            async with turns.taken(party):
                pass

        async with turns.taken("holder"):
            callers = [asyncio.create_task(call(f"user-{number % 50}")) for number in range(length)]
            for caller in callers[1::2]:
                caller.cancel()
            await asyncio.sleep(0)
        began = time.process_time()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*callers[::2])
        return (time.process_time() - began) / length

    gc.collect()
    assert await seconds_each(4000) < 10 * await seconds_each(400)
