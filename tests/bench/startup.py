"""How long the program takes until it serves, and what it needs when it does nothing.

The size is that of the packages of requirements.lock as they are installed here, and of `app` and `alembic`: what an
image adds to Python's own. It is no image that was built.
"""

import asyncio
import re
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import uvloop

from tests.bench.client import SYNTHESIZE, Caller, order
from tests.bench.plan import Stage
from tests.bench.servers import (
    PROJECT,
    Running,
    database_url,
    provide_database,
    run_backend,
    shell_environment,
)
from tests.bench.stand_in import Pace
from tests.bench.table import Findings, Panel, Row
from tests.bench.tenants import move_in

IMPORT_SECONDS, READY_SECONDS, IDLE_MB = 1.0, 2.0, 150
# rich comes with the tests only, and structlog loads it where it is.
IMPORT = (
    "import sys, time; sys.modules['rich'] = None;"
    "wall, cpu = time.perf_counter(), time.process_time(); import app.main;"
    "print(time.perf_counter() - wall, time.process_time() - cpu)"
)
REST_SECONDS = 2.0


def measure(stage: Stage) -> Findings:
    """Importing, starting, resting."""
    rounds = stage.pick(7, 3)
    imports = [_import(stage.folder) for _ in range(rounds + 1)][1:]  # the first one compiles
    walls, cpus = [wall for wall, _ in imports], [cpu for _, cpu in imports]
    rows = [
        Row(
            f"import app.main ≤ {IMPORT_SECONDS:g} s, median of {rounds}",
            f"{statistics.median(walls):.2f}, best {min(walls):.2f} s"
            f" (processor {statistics.median(cpus):.2f}, {min(cpus):.2f} s)",
            statistics.median(walls) <= IMPORT_SECONDS,
        )
    ]
    starts: dict[str, list[float]] = {"a new database": [], "an existing database": []}
    for number in range(max(2, rounds // 2)):
        folder = stage.folder / f"start-{number}"
        with provide_database(stage.plan.database) as settings:
            for times in starts.values():
                began_at = time.monotonic()
                with run_backend(folder, stage.stand_in, settings):
                    times.append(time.monotonic() - began_at)
    rows += [
        Row(
            f"server ready ≤ {READY_SECONDS:g} s, {what}, median of {len(times)}",
            f"{statistics.median(times):.2f}, best {min(times):.2f} s",
            statistics.median(times) <= READY_SECONDS,
        )
        for what, times in starts.items()
    ]
    rows += _measure_rest(stage)
    rows.append(Row("size of the packages, app and alembic (no built image)", _installed_size(), None))
    return Findings(rows, [Panel("start", "s", {"import app.main": walls, **starts})])


def _import(folder: Path) -> tuple[float, float]:
    """Seconds by the clock and of the processor, in a new process."""
    folder.mkdir(parents=True, exist_ok=True)
    told = subprocess.run(
        [sys.executable, "-c", IMPORT],
        cwd=folder,
        env=shell_environment({}),
        capture_output=True,
        text=True,
        check=True,
    )
    wall, cpu = map(float, told.stdout.split())
    return wall, cpu


def _measure_rest(stage: Stage) -> list[Row]:
    folder = stage.folder / "rest"
    with ExitStack() as stack:
        settings = stack.enter_context(provide_database(stage.plan.database))
        server = stack.enter_context(run_backend(folder, stage.stand_in, settings))
        [tenant] = asyncio.run(move_in(database_url(folder, settings), 1))
        before = _judge_rest("before the first call", server)
        uvloop.run(_synthesize(server.port, tenant.token))
        return [before, _judge_rest("after a synthesis", server)]


def _judge_rest(when: str, server: Running) -> Row:
    time.sleep(REST_SECONDS)
    megabytes = server.resident_bytes / 1e6
    return Row(f"idle memory {when} ≤ {IDLE_MB} MB", f"{megabytes:.0f} MB", megabytes <= IDLE_MB)


async def _synthesize(port: int, token: str) -> None:
    caller = Caller(port, token)
    (await caller.ask("POST", SYNTHESIZE, order(Pace(4, 0.01, 0.01).as_text()))).require_success()
    caller.hang_up()


def _installed_size() -> str:
    locked = re.findall(r"^([a-z0-9._-]+)==", (PROJECT / "requirements.lock").read_text(), re.MULTILINE)
    packages = 0
    for name in set(locked):
        try:
            files = distribution(name).files or []
        except PackageNotFoundError:  # of another platform
            continue
        packages += sum(Path(str(file.locate())).stat().st_size for file in files if Path(str(file.locate())).is_file())
    ours = [file for folder in ("app", "alembic") for file in (PROJECT / folder).rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in ours if file.suffix != ".pyc")
    return f"{packages / 1e6:.0f} MB + {size / 1e6:.1f} MB"
