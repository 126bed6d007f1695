"""The user's history as a file for spreadsheets."""

import csv
import io
import json
import re
from collections.abc import AsyncIterator, Iterable
from typing import Any

from fastapi import APIRouter, Depends
from fastapi.responses import StreamingResponse

from app.routers.dependencies import CurrentUser, ServicesDep, limit_rate
from app.routers.envelope import error_answers
from app.routers.filters import WantedRecords
from app.routers.presentation import show_exactly, show_task_time
from app.services import Services
from app.services.history import HistoryLine

router = APIRouter(prefix="/api/audio", tags=["历史记录"], dependencies=[Depends(limit_rate)])

BYTE_ORDER_MARK = "\ufeff"  # without it, Excel takes UTF-8 for something else
MEDIA_TYPE = "text/csv"
SUMMARY_CHARS = 500
# What a spreadsheet would take for a formula.
FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r")
# The text is the first field of what was asked; in the beginning of a long one, up to where it was cut.
_BEGINNING = re.compile(r'\{"text": "((?:[^"\\]|\\(?:u[0-9a-fA-F]{4}|[^u]))*)')
_SUBJECTS = ("text", "audio_url", "file_url", "file", "prefix")
_COLUMNS = (
    "记录ID", "类型", "模型", "状态", "输入", "输出", "音色ID", "时长（秒）", "计费单位", "数量", "单价",
    "精确金额", "是否估算", "币种", "创建时间", "结束时间", "百炼请求ID",
)  # fmt: skip


@router.get(
    "/history.csv",
    summary="导出历史记录（CSV）",
    description=(
        "符合条件的全部历史记录，最新的在前，UTF-8（含 BOM）的 CSV 文件，可直接用 Excel 打开。筛选参数与历史记录相同；"
        "精确金额之和等于用量统计的精确费用。以 `=`、`+`、`-`、`@` 等开头的文字前加 `'`，以免被当作公式；"
        f"输入只列前 {SUMMARY_CHARS} 个字符。"
    ),
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "CSV 文件",
            "content": {MEDIA_TYPE: {"schema": {"type": "string"}}},
        },
        **error_answers(400, 401, 429, 503),
    },
)
async def export_history(services: ServicesDep, user: CurrentUser, wanted: WantedRecords) -> StreamingResponse:
    """Write the user's records out, some at a time."""
    batches = services.history.lines(user.id, wanted)
    first: list[HistoryLine] = await anext(batches, [])  # a database that is away is told before the file begins
    headers = {"Content-Disposition": 'attachment; filename="history.csv"', "Cache-Control": "no-store"}
    return StreamingResponse(_file(services, first, batches), headers=headers, media_type=MEDIA_TYPE)


async def _file(
    services: Services, first: list[HistoryLine], batches: AsyncIterator[list[HistoryLine]]
) -> AsyncIterator[str]:
    yield BYTE_ORDER_MARK + _written([_COLUMNS])
    yield _written(_row(line, services) for line in first)
    async for lines in batches:
        yield _written(_row(line, services) for line in lines)


def _written(rows: Iterable[Iterable[Any]]) -> str:
    written = io.StringIO()
    csv.writer(written).writerows(rows)
    return written.getvalue()


def _row(line: HistoryLine, services: Services) -> list[object]:
    call, record, bill = line.call, line.call.record, line.call.bill
    zone = services.settings.zone
    output = services.storage.url(record.output_key) if record.output_key else line.heard
    return [
        record.id,
        record.type,
        _plain(record.model_name),
        record.status,
        _plain(_summary(line.asked)),
        _plain(output or ""),
        _plain(line.voice_id or ""),
        "" if record.duration_ms is None else record.duration_ms / 1000,
        record.unit,
        call.quantity,
        show_exactly(record.unit_price),
        show_exactly(call.amount),
        "是" if call.is_estimated else "否",
        record.currency,
        show_task_time(record.created_at, zone),
        show_task_time(record.finished_at, zone) if record.finished_at else "",
        _plain((bill and bill.provider_request_id) or ""),
    ]


def _plain(text: str) -> str:
    """A text that no spreadsheet reads as a formula."""
    return f"'{text}" if text.startswith(FORMULA_SIGNS) else text


def _summary(asked: str) -> str:
    """What was to be spoken or heard, or the beginning of it."""
    beginning = _BEGINNING.match(asked)
    if beginning:
        subject = json.loads(f'"{beginning[1]}"')
    else:
        try:
            told = json.loads(asked)
        except ValueError:
            told = {}
        subject = next((str(told[name]) for name in _SUBJECTS if name in told), asked)
    return subject if len(subject) <= SUMMARY_CHARS else f"{subject[:SUMMARY_CHARS]}……"
