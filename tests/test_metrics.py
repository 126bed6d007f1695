"""What Prometheus counts: the same truth whichever of several processes answers, and none that is invented."""

import asyncio
import json
import re
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app import metrics
from app.catalog import speech_models
from app.database import Database
from app.metrics import Backlog, HeldAudio, JobsDue
from app.models import LongText, Record, User
from app.probes import job
from app.services import backlog
from app.services.backlog import BacklogService
from tests.conftest import Account
from tests.servers import PROJECT, Sandbox, Server
from tests.talking import talking

PATIENCE_SECONDS = 10.0
DASHBOARD = PROJECT / "app" / "operations" / "grafana.json"
SPEECH_ROUTE = "/api/audio/tts/synthesize"
MODEL = "cosyvoice-v3-flash"

Labels = frozenset[tuple[str, str]]


class Page:
    """What a scrape told."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples: dict[tuple[str, Labels], float] = {}
        for family in self.families.values():
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                assert key not in self.samples, f"told twice: {key}"
                self.samples[key] = sample.value

    def value(self, name: str, **labels: str) -> float:
        """A sample; 0 for one that there is not."""
        return self.samples.get((name, frozenset(labels.items())), 0.0)


async def scrape(account: Account) -> Page:
    """The server's metrics now."""
    return Page((await account.client.get("/metrics")).text)


async def scrape_until(account: Account, name: str, value: float, **labels: str) -> None:
    """Wait until a sample is what it should be."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (await scrape(account)).value(name, **labels) != value:
            await asyncio.sleep(0.05)


# ---- One process


async def test_a_synthesis_is_counted_wherever_it_counts(account: Account) -> None:
    before = await scrape(account)
    answer = await account.synthesize("你好，世界")
    assert answer.status_code == 200, answer.text
    after = await scrape(account)
    told = answer.json()["data"]

    def grown(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    assert grown("http_requests_total", method="POST", route=SPEECH_ROUTE, status="200") == 1
    assert grown("http_request_duration_seconds_count", route=SPEECH_ROUTE) == 1
    assert grown("provider_calls_total", service="speech", model=MODEL, outcome="ok") == 1
    assert grown("provider_call_seconds_count", service="speech") == 1
    assert grown("provider_first_audio_seconds_count") == 1
    assert grown("records_ended_total", type="tts", status="succeeded") == 1
    assert grown("billed_units_total", model=MODEL, unit="character") == told["characters"]
    amount = told["characters"] * 0.000014335
    assert grown("billed_amount_total", model=MODEL, currency="CNY") == pytest.approx(amount)
    assert grown("billed_estimates_total", model=MODEL) == 0
    assert grown("http_first_byte_seconds_count", route=SPEECH_ROUTE) == 0, "a plain answer is no stream"


async def test_streams_are_open_while_they_last(account: Account, backend: Server) -> None:
    before = await scrape(account)
    async with talking(backend, account) as talk:
        assert (await scrape(account)).value("open_streams", kind="websocket") == 1
        await talk.say("你好。")
        await talk.end()
        await talk.hear()
    await scrape_until(account, "open_streams", 0, kind="websocket")
    streamed = await account.synthesize("你好", stream=True)
    assert streamed.content
    await scrape_until(account, "open_streams", 0, kind="http")
    after = await scrape(account)
    for route in ("/api/audio/tts/stream", SPEECH_ROUTE):
        name = "http_first_byte_seconds_count"
        assert after.value(name, route=route) - before.value(name, route=route) == 1


async def test_failures_and_retries_of_the_provider_are_counted(account: Account, sandbox: Sandbox) -> None:
    before = await scrape(account)
    with sandbox.faults(throttle_tasks=1, break_tasks=1):
        answer = await account.synthesize("你好")
    assert answer.json()["error"] == "UPSTREAM_ERROR"
    after = await scrape(account)
    labels = {"service": "speech"}
    assert after.value("provider_retries_total", **labels) - before.value("provider_retries_total", **labels) == 1
    labels |= {"model": MODEL, "outcome": "UPSTREAM_ERROR"}
    assert after.value("provider_calls_total", **labels) - before.value("provider_calls_total", **labels) == 1
    ended = {"type": "tts", "status": "failed"}
    assert after.value("records_ended_total", **ended) - before.value("records_ended_total", **ended) == 1


async def test_a_process_tells_of_its_connections_and_of_its_event_loop(account: Account) -> None:
    await account.synthesize("你好")
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:  # it is sampled once a second, and other tests' connections come to rest
            page = await scrape(account)
            kept = {state: page.value("provider_connections", state=state) for state in ("idle", "busy")}
            if kept["idle"] and not kept["busy"]:
                break
            await asyncio.sleep(0.1)
    assert page.value("database_pool_size") > 0
    assert sum(page.value("database_connections", state=state) for state in ("idle", "in_use")) > 0
    assert page.value("event_loop_lag_seconds_count") > 0


async def test_whatever_clients_ask_for_makes_few_series(account: Account) -> None:
    await account.client.request("PROPFIND", f"/nothing/{uuid.uuid4().hex}")
    page = await scrape(account)
    assert page.value("http_requests_total", method="other", route="unmatched", status="404") >= 1
    assert {metrics.model_label(each) for each in ("gpt-9", "", None, "sk-test-0")} == {"other"}
    assert {metrics.model_label(model.model_id) for model in speech_models()} == {
        model.model_id for model in speech_models()
    }


async def test_the_dashboard_shows_only_what_there_is(account: Account) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    told = (await scrape(account)).families
    series = {name if family.type != "counter" else f"{name}_total" for name, family in told.items()}
    series |= {f"{name}_bucket" for name, family in told.items() if family.type == "histogram"}
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    shown: set[str] = set()
    for panel in panels:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            names = set(re.findall(r"(\w+)\{", target["expr"]))
            assert names
            assert names <= series, f"{panel['title']}: {names - series}"
            shown |= {re.sub("_(bucket|total)$", "", name) for name in names}
    assert shown == told.keys(), "what is counted is shown"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")


def test_a_job_is_running_while_it_is_worked_on() -> None:
    for expected in (1, 0):
        with job("enrollment", 7) if expected else nullcontext():
            page = Page(metrics.render(HeldAudio(), None).decode())
            assert page.value("jobs_running", kind="enrollment") == expected


# ---- Several processes

# What a server process does, without the server.
CHILD = """
import sys, os
from app import metrics
metrics.REQUESTS.labels("GET", "/a", 200).inc(int(sys.argv[1]))
metrics.REQUEST_SECONDS.labels("/a").observe(0.02)
metrics.OPEN_STREAMS.labels("http").inc(2)
print(os.getpid(), flush=True)
for line in sys.stdin:
    print(metrics.render(metrics.HeldAudio(3, 4, 5.0, 0), None).decode() + "END", flush=True)
"""


@contextmanager
def child(times: int) -> Iterator["subprocess.Popen[str]"]:
    """A process that has counted so many requests, and renders whenever it is asked to."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(times)], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process
        finally:
            process.kill()


def rendered(process: "subprocess.Popen[str]") -> Page:
    """What a process shows."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    lines = []
    while (line := process.stdout.readline()) != "END\n":
        assert line, "it died"
        lines.append(line)
    return Page("".join(lines))


def test_each_of_several_processes_shows_what_all_have_counted() -> None:
    with metrics.gathered_from_processes(), child(2) as first, child(3) as second:
        asked = {"method": "GET", "route": "/a", "status": "200"}
        for process in (first, second):
            page = rendered(process)
            assert page.value("http_requests_total", **asked) == 5
            assert page.value("http_request_duration_seconds_count", route="/a") == 2
            assert page.value("open_streams", kind="http") == 4
            assert page.value("held_audio_files") == 3, "the folder is the machine's, and counted once"
        second.kill()
        second.wait()
        page = rendered(first)
        assert page.value("http_requests_total", **asked) == 5, "what a dead process counted stays counted"
        assert page.value("open_streams", kind="http") == 2, "but nothing of it is open any more"


def test_nothing_of_an_earlier_run_is_shown() -> None:
    for times in (2, 3):
        with metrics.gathered_from_processes(), child(times) as process:
            asked = {"method": "GET", "route": "/a", "status": "200"}
            assert rendered(process).value("http_requests_total", **asked) == times


# ---- What only the database knows


@pytest.fixture
async def database(schema_url: str) -> AsyncIterator[Database]:
    """A database of each kind with every table."""
    opened = Database(schema_url)
    yield opened
    await opened.close()


async def open_record(database: Database, user_id: uuid.UUID, lease_in: float | None, **text: Any) -> None:
    """A running record, with a lease or with a long text as its job."""
    now = datetime.now(UTC)
    record = Record(
        user_id=user_id,
        type="tts",
        model_name=MODEL,
        status="running",
        input_data="{}",
        unit="character",
        unit_price=Decimal(0),
        currency="CNY",
        expected_quantity=0,
        created_at=now,
        lease_expires_at=None if lease_in is None else now + timedelta(seconds=lease_in),
    )
    async with database.transaction() as session:
        session.add(record)
        await session.flush()
        if text:
            session.add(
                LongText(record_id=record.id, user_id=user_id, segments_total=1, output_key="audio/tts/x.mp3", **text)
            )


async def test_the_backlog_is_what_is_due_and_what_nobody_owns(database: Database) -> None:
    now = datetime.now(UTC)
    user = User(username="a", username_key="a", password_hash="-", created_at=now)
    async with database.transaction() as session:
        session.add(user)
    long_ago, later = now - timedelta(seconds=30), now + timedelta(seconds=30)
    claim = {"claimed_by": uuid.uuid4()}
    await open_record(database, user.id, 20)
    await open_record(database, user.id, -50)
    await open_record(database, user.id, None, next_check_at=long_ago)
    await open_record(database, user.id, None, next_check_at=now, claimed_until=long_ago, **claim)
    await open_record(database, user.id, None, next_check_at=long_ago, claimed_until=later, **claim)
    await open_record(database, user.id, None, next_check_at=later)
    await open_record(database, user.id, None, next_check_at=None)
    seen = await BacklogService(database).look()
    assert seen is not None
    due = {each.kind: each for each in seen.due}
    assert due.keys() == {"long_text", "transcription", "submission", "enrollment"}
    assert due["long_text"].jobs == 2
    assert 30 <= due["long_text"].lag.total_seconds() < 60
    assert (due["enrollment"].jobs, due["enrollment"].lag) == (0, timedelta(0))
    assert (seen.records_running, seen.records_orphaned) == (7, 1)
    assert 50 <= seen.orphans_lag.total_seconds() < 80


async def test_the_database_is_asked_once_a_second_however_many_scrape(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = BacklogService(database)
    looks = 0
    count = service._count

    async def counted() -> Backlog:
        nonlocal looks
        looks += 1
        return await count()

    monkeypatch.setattr(service, "_count", counted)
    await asyncio.gather(*(service.look() for _ in range(20)))
    assert looks == 1
    monkeypatch.setattr(backlog, "FRESH_SECONDS", 0.0)
    await service.look()
    assert looks == 2


@pytest.mark.parametrize("listens", [False, True])
async def test_a_database_that_is_away_is_told_and_breaks_nothing(
    listens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog, "LOOK_SECONDS", 0.3)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        if listens:  # and never answers
            mute.listen()
        database = Database(f"postgresql+asyncpg://root@127.0.0.1:{mute.getsockname()[1]}/x")
        began_at = time.monotonic()
        seen = await BacklogService(database).look()
        assert time.monotonic() - began_at < 2
        await database.close()
    assert seen is None
    page = Page(metrics.render(HeldAudio(), seen).decode())
    assert page.value("metrics_database_up") == 0
    assert "metrics_database_up" in page.families
    assert not {"jobs_due", "jobs_lag_seconds", "records_running", "records_orphaned"} & page.families.keys()


def test_the_backlog_is_shown_by_kind() -> None:
    due = JobsDue("long_text", 2, timedelta(seconds=30))
    page = Page(metrics.render(HeldAudio(), Backlog((due,), 7, 1, timedelta(seconds=50))).decode())
    assert page.value("metrics_database_up") == 1
    assert page.value("jobs_due", kind="long_text") == 2
    assert page.value("jobs_lag_seconds", kind="long_text") == 30
    assert page.value("records_running") == 7
    assert page.value("records_orphaned") == 1
    assert page.value("records_orphaned_lag_seconds") == 50
