"""What is done to a cluster under load, and what is measured meanwhile."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.load import Load, Outcome, create_users
from tests.cluster.topology import Cluster, Member, run_cluster
from tests.cluster.usage import Usage
from tests.cluster.verdict import Entry, Verdict, is_quiet

QUIET_SECONDS = 90.0
TAKEOVER_SECONDS = 45.0
_LET_LEASES_RUN_OUT = "UPDATE records SET lease_expires_at = created_at WHERE lease_expires_at IS NOT NULL"


@dataclass(frozen=True)
class Plan:
    """How much is asked, and what is done meanwhile; moments count from the beginning of the load.

    Of the streams a tenth have a name and are asked for again, and a tenth are live sessions. `is_hurried` lets the
    leases of a killed backend run out as soon as the load ends, instead of waiting for that.
    """

    streams: int
    seconds: float
    speed: float
    sentences: int
    plain: int
    long_texts: int
    segments: int
    ramp_seconds: float
    kill_backend_after: float
    kill_worker_after: float
    replace_after: float
    restart_backend_after: float | None = None
    is_hurried: bool = False
    played: int = 100
    pool_size: int = 10


@dataclass
class Report:
    """What was found and measured."""

    plan: Plan
    outcomes: list[Outcome] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    breaches: list[str] = field(default_factory=list)
    streams_at_once: int = 0
    played: int = 0
    passed_on: int = 0
    takeovers: list[float] = field(default_factory=list)
    settled_after: float = 0.0
    quiet_after: float = 0.0
    starts: list[float] = field(default_factory=list)
    orderly_stop: float | None = None
    usage: dict[str, Usage] = field(default_factory=dict)
    load_seconds: float = 0.0

    def told(self, kind: str) -> Counter[str]:
        """What clients of a kind were told."""
        return Counter(outcome.brief for outcome in self.outcomes if outcome.kind == kind)

    @property
    def statuses(self) -> Counter[str]:
        """How the records ended, estimates apart."""
        return Counter(entry.status + (" (estimate)" if entry.is_estimated else "") for entry in self.entries)

    def first_bytes_ms(self, kind: str) -> list[float]:
        """How long clients waited for the first byte, in order."""
        waits = [each.heard_after for each in self.outcomes if each.kind == kind and each.succeeded]
        return sorted(wait * 1000 for wait in waits if wait is not None)


async def run(plan: Plan, folder: Path) -> Report:
    """Run a cluster through a plan, and audit it."""
    report = Report(plan)
    async with run_cluster(folder, plan.speed, plan.pool_size) as cluster:
        load = Load(cluster, plan.sentences)
        users = await create_users(cluster, plan.streams + plan.plain + plan.long_texts)
        named = live = max(1, plan.streams // 10)
        streams = plan.streams - named - live
        for kind, number in (("stream", streams), ("named", named), ("live", live), ("plain", plan.plain)):
            load.engage(kind, [users.pop() for _ in range(number)])
        stopped: list[tuple[str, float, float]] = []
        before, began = cluster.usage(), time.monotonic()
        texts = [asyncio.create_task(load.narrate(user, plan.segments)) for user in users]
        trouble = [
            asyncio.create_task(_kill_backend(cluster, plan, report)),
            asyncio.create_task(_kill_worker(cluster, plan, report)),
        ]
        if plan.restart_backend_after is not None:
            trouble.append(asyncio.create_task(_restart(cluster, plan.restart_backend_after, report, stopped)))
        try:
            await load.run(plan.seconds, plan.ramp_seconds)
            report.load_seconds = time.monotonic() - began
            after = cluster.usage()
            report.usage = {name: _difference(after[name], before[name]) for name in after}
            await asyncio.gather(*trouble)
            if plan.is_hurried:
                await cluster.rows(
                    "UPDATE records SET lease_expires_at = created_at WHERE lease_expires_at IS NOT NULL"
                )
            await asyncio.gather(*texts)
        finally:
            for task in (*trouble, *texts):
                task.cancel()
        report.quiet_after = await _wait_until_quiet(cluster)
        verdict = Verdict(cluster, load, stopped)
        await verdict.reach(plan.played)
        report.outcomes, report.entries = load.outcomes, verdict.entries
        report.breaches, report.played = verdict.breaches, verdict.played
        report.streams_at_once = load.listening.most
        report.passed_on = sum(", " in line["upstream_addr"] for line in cluster.proxy.requests)
        killed = cluster.backends[0].killed_at
        ends = [
            entry.finished_at.timestamp()
            for entry in verdict.entries
            if entry.is_estimated and entry.finished_at and entry.segments_total is None
        ]
        report.settled_after = max((end - killed[0] for end in ends), default=0.0) if killed else 0.0
    return report


async def _kill_backend(cluster: Cluster, plan: Plan, report: Report) -> None:
    await asyncio.sleep(plan.kill_backend_after)
    await _replace(cluster.backends[0], plan, report)


async def _replace(member: Member, plan: Plan, report: Report) -> None:
    await member.kill()
    await asyncio.sleep(plan.replace_after)
    report.starts.append(await member.start())


async def _kill_worker(cluster: Cluster, plan: Plan, report: Report) -> None:
    """Kill the worker in the middle of a long text, and see how long it takes until each text has another one."""
    await asyncio.sleep(plan.kill_worker_after)
    under_way = (
        "SELECT record_id, claimed_by FROM long_texts"
        " WHERE claimed_by IS NOT NULL AND segments_done BETWEEN 1 AND segments_total - 1"
    )
    async with asyncio.timeout(TAKEOVER_SECONDS):
        while not (held := dict(await cluster.rows(under_way))):
            await asyncio.sleep(0.1)
    killed_at = await cluster.worker.kill()
    replacing = asyncio.create_task(_start_later(cluster.worker, plan, report))
    async with asyncio.timeout(TAKEOVER_SECONDS):
        while held:
            await asyncio.sleep(0.5)
            for record_id, holder in await cluster.rows("SELECT record_id, claimed_by FROM long_texts"):
                if record_id in held and holder not in {None, held[record_id]}:
                    report.takeovers.append(time.time() - killed_at)
                    del held[record_id]
    await replacing


async def _start_later(member: Member, plan: Plan, report: Report) -> None:
    await asyncio.sleep(plan.replace_after)
    report.starts.append(await member.start())


async def _restart(cluster: Cluster, after: float, report: Report, stopped: list[tuple[str, float, float]]) -> None:
    """Restart a backend in order, as with a new version."""
    await asyncio.sleep(after)
    member, began = cluster.backends[1], time.time()
    report.orderly_stop = await member.stop()
    report.starts.append(await member.start())
    stopped.append((member.address, began, time.time()))


async def _wait_until_quiet(cluster: Cluster) -> float:
    began = time.monotonic()
    while not await is_quiet(cluster) and time.monotonic() - began < QUIET_SECONDS:
        await asyncio.sleep(0.25)
    return time.monotonic() - began


def _difference(after: Usage, before: Usage) -> Usage:
    return Usage(after.cpu_seconds - before.cpu_seconds, after.memory_mb)
