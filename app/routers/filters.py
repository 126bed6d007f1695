"""What several routes filter by: days, types and models."""

from datetime import date, timedelta
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from fastapi import Depends, Query
from pydantic import BeforeValidator, WithJsonSchema

from app.errors import InvalidRequest
from app.routers.dependencies import ServicesDep
from app.routers.fields import Text
from app.services.period import Period
from app.services.selection import HistoryFilter

MAX_DAYS = 366
YEARS = range(1970, 3000)  # what every database and every zone can take


def _read_day(value: object) -> object:
    """A day in the one form that nobody reads in two ways. Raises ValueError for any other."""
    if not isinstance(value, str):
        return value
    try:
        day = date.fromisoformat(value)
    except ValueError:
        day = None
    if day is None or day.isoformat() != value or day.year not in YEARS:
        raise ValueError("必须是 YYYY-MM-DD 格式的日期，如 2026-11-01")
    return day


_WRITTEN_DAY = {"type": "string", "format": "date", "pattern": r"^(19[7-9]\d|2\d{3})-\d\d-\d\d$"}
Day = Annotated[date, BeforeValidator(_read_day), WithJsonSchema(_WRITTEN_DAY)]
FirstDay = Annotated[
    Day | None, Query(alias="from", description="开始日期（含），按服务时区，格式 YYYY-MM-DD", examples=["2026-11-01"])
]
LastDay = Annotated[
    Day | None, Query(alias="to", description="结束日期（含），按服务时区，格式 YYYY-MM-DD", examples=["2026-11-30"])
]


def read_period(first: date | None, last: date | None, zone: ZoneInfo) -> Period:
    """The days from the first to the last. Raises InvalidRequest when they are reversed or too many."""
    if first and last and first > last:
        raise InvalidRequest("from 不能晚于 to")
    if first and last and last - first >= timedelta(days=MAX_DAYS):
        raise InvalidRequest(f"from 与 to 之间最多 {MAX_DAYS} 天")
    return Period(first, last, zone)


async def _read_filter(
    services: ServicesDep,
    first: FirstDay = None,
    last: LastDay = None,
    type: Annotated[
        Literal["tts", "asr", "voice"] | None, Query(description="类型筛选：tts 合成、asr 识别、voice 声音复刻")
    ] = None,
    model: Annotated[Text | None, Query(description="模型筛选", max_length=64, examples=["cosyvoice-v3-flash"])] = None,
) -> HistoryFilter:
    period = read_period(first, last, services.settings.zone) if first or last else None
    return HistoryFilter(type, model, period)


WantedRecords = Annotated[HistoryFilter, Depends(_read_filter)]
"""Which records of the history a client asks for."""
