"""The user's history: spec 5.1."""

from decimal import Decimal
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, Field

from app.models import Record
from app.routers.dependencies import CurrentUser, ServicesDep, limit_rate
from app.routers.envelope import Envelope, error_answers
from app.routers.presentation import show_amount, show_time
from app.services import Services

router = APIRouter(prefix="/api/audio", tags=["历史记录"], dependencies=[Depends(limit_rate)])


class HistoryItem(BaseModel):
    """一条历史记录；没有值的可选字段不出现。"""

    id: int = Field(description="记录ID", examples=[1])
    type: str = Field(description="操作类型：tts、asr、voice", examples=["tts"])
    model_name: str = Field(description="使用的模型名称", examples=["cosyvoice-v3-flash"])
    input_data: str = Field(description="输入数据JSON", examples=['{"text": "你好", "voice": "longanyang"}'])
    output_url: str | None = Field(default=None, description="输出音频URL（TTS）")
    output_text: str | None = Field(default=None, description="输出文本（ASR）")
    voice_id: str | None = Field(default=None, description="音色ID（声音复刻）")
    duration: float | None = Field(default=None, description="时长（秒）", examples=[3.5])
    status: str | None = Field(
        default=None,
        description=(
            "声音复刻为音色状态；语音合成与识别只在未成功时出现：`running` 进行中、`failed` 失败、"
            "`abandoned` 客户端中途断开、`interrupted` 服务中断"
        ),
    )
    error_message: str | None = Field(default=None, description="失败原因")
    bill: str = Field(description="费用（元）", examples=["0.0021"])
    created_at: str = Field(description="创建时间", examples=["2025-12-30T10:30:00"])


class History(BaseModel):
    """一页历史记录。"""

    items: list[HistoryItem] = Field(description="记录，最新的在前")
    total: int = Field(description="符合条件的记录总数", examples=[3])
    page: int = Field(description="页码", examples=[1])
    page_size: int = Field(description="每页数量", examples=[20])


@router.get(
    "/history",
    summary="历史记录",
    description="当前用户的语音操作历史，最新的在前，支持分页和类型筛选。",
    responses=error_answers(400, 401, 429),
    response_model_exclude_none=True,
)
async def get_history(
    services: ServicesDep,
    user: CurrentUser,
    page: Annotated[int, Query(description="页码，从1开始", ge=1, le=1_000_000)] = 1,
    page_size: Annotated[int, Query(description="每页数量", ge=1, le=100)] = 20,
    type: Annotated[
        Literal["tts", "asr", "voice"] | None, Query(description="类型筛选：tts 合成、asr 识别、voice 声音复刻")
    ] = None,
) -> Envelope[History]:
    """List the user's records."""
    found = await services.records.history(user.id, page, page_size, type)
    items = [_shown(record, amount, services) for record, amount in found.items]
    return Envelope(data=History(items=items, total=found.total, page=page, page_size=page_size))


def _shown(record: Record, amount: Decimal, services: Services) -> HistoryItem:
    return HistoryItem(
        id=record.id,
        type=record.type,
        model_name=record.model_name,
        input_data=record.input_data,
        output_url=services.storage.url(record.output_key) if record.output_key else None,
        output_text=record.output_text,
        voice_id=record.voice_id,
        duration=None if record.duration_ms is None else record.duration_ms / 1000,
        status=None if record.status == "succeeded" else record.status,
        error_message=record.error_message,
        bill=show_amount(amount),
        created_at=show_time(record.created_at, services.settings.zone),
    )
