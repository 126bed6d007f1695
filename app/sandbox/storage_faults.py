"""Faults of the object storage, as the part `oss` of `PUT /_sandbox/faults`: one, or a list of them.

    {"oss": {"how": "slow", "seconds": 2.5, "method": "PUT", "count": 1}}

The first entry whose `method` fits (PUT, GET, HEAD, DELETE; null, its default, is any) is used:

    unavailable   503 ServiceUnavailable
    denied        403 AccessDenied
    slow          the work is done, the answer comes `seconds` later; hanging up does not stop the work
    cut           the connection is closed: under a PUT in the middle of its body, with nothing stored; under a GET in
                  the middle of the answer; else without an answer, and without the work
    cut_after     the connection is closed after the work and without an answer

`seconds` holds every kind back before it strikes. `count` runs down to 0; -1, its default, stays.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from app.sandbox.http_faults import STRICT, Counted


@dataclass(slots=True, config=STRICT)
class StorageFault(Counted):
    how: Literal["unavailable", "denied", "slow", "cut", "cut_after"] = "unavailable"
    method: Literal["PUT", "GET", "HEAD", "DELETE"] | None = None
    seconds: float = Field(default=0.0, ge=0)

    @property
    def does_the_work(self) -> bool:
        return self.how in ("slow", "cut_after")
