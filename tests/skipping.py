"""Tests that need what a machine may lack."""

import os
from typing import NoReturn

import pytest


def skip_without(service: str) -> NoReturn:
    """Skip the test where a service is missing; fail it where `REQUIRE_SERVICES` says that all must be there."""
    if os.environ.get("REQUIRE_SERVICES"):
        pytest.fail(f"REQUIRE_SERVICES is set, but there is no {service}")
    pytest.skip(f"there is no {service}")
