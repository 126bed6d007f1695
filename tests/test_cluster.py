"""The topology of compose.yaml: a backend and the worker are killed under load, and nobody else notices."""

from pathlib import Path

from tests.cluster.scenario import Plan, run

PLAN = Plan(
    streams=16,
    seconds=8.0,
    speed=4.0,
    sentences=3,
    plain=1,
    long_texts=1,
    segments=8,
    ramp_seconds=1.0,
    kill_backend_after=3.0,
    kill_worker_after=0.5,
    replace_after=1.0,
    is_hurried=True,
    played=20,
    pool_size=4,  # other tests have the same PostgreSQL
)
TAKEOVER_SECONDS = 30.0


async def test_a_killed_backend_costs_only_its_own_connections_and_a_killed_worker_nothing(tmp_path: Path) -> None:
    report = await run(PLAN, tmp_path)
    assert report.breaches == []
    assert report.streams_at_once >= PLAN.streams / 2
    assert report.statuses["interrupted (estimate)"] > 0
    assert report.passed_on > 0
    assert len(report.starts) == 2
    [taken_over_after] = report.takeovers
    assert taken_over_after < TAKEOVER_SECONDS
