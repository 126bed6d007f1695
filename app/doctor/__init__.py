"""`python -m app doctor`: is everything there that the program needs, and if not, what is to be done?

It changes nothing, but for two small objects in OSS that it removes again, and shows no secret.
"""

import asyncio
import os
import sys

from app.doctor.examination import examine
from app.doctor.finding import Finding
from app.doctor.report import collect_secrets, is_passed, render
from app.observability import configure_logs
from app.settings import Settings

__all__ = ["Finding", "examine", "run"]


def run(
    settings: Settings,
    *,
    api_key: str | None = None,
    region: str | None = None,
    workspace: str | None = None,
    as_json: bool = False,
) -> int:
    """Examine, print the findings and give the exit code: 1 if anything fails, else 0."""
    configure_logs("CRITICAL")
    runner = asyncio.Runner()
    findings = runner.run(examine(settings, api_key=api_key, region=region, workspace=workspace))
    sys.stdout.write(render(findings, collect_secrets(settings, api_key), as_json=as_json) + "\n")
    sys.stdout.flush()
    if not is_passed(findings):
        # A thread may still wait for what failed, such as a name that nobody resolves, and would be waited for.
        os._exit(1)
    runner.close()
    return 0
