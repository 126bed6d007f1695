"""The user's history: spec 5.1, and one record in full."""

import json
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Query
from fastapi.responses import Response
from pydantic import BaseModel, Field

from app.routers.dependencies import CurrentUser, ServicesDep, limit_rate
from app.routers.envelope import Envelope, enveloped, error_answers
from app.routers.filters import WantedRecords
from app.routers.presentation import show_amount, show_exactly, show_time
from app.routers.progress import RecordId
from app.services import Services
from app.services.history import RecordedCall
from app.transcripts import AudioInfo, Transcript

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
            "`cancelled` 已取消、`abandoned` 客户端中途断开、`interrupted` 服务中断"
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


class RecordUsage(BaseModel):
    """计费的数量与单价。"""

    unit: str = Field(description="计费单位：character（字符）、second（秒）", examples=["second"])
    quantity: int = Field(description="数量", examples=[4])
    unit_price: str = Field(description="单价（元）", examples=["0.0004"])
    amount: str = Field(description="精确金额（元）", examples=["0.0016"])
    currency: str = Field(description="币种", examples=["CNY"])
    estimated: bool = Field(description="是否为估算：服务中断或百炼未返回用量时")
    provider_request_id: str | None = Field(default=None, description="百炼的请求ID或任务ID")


class RecordProgress(BaseModel):
    """长文本合成的进度。"""

    segments_done: int = Field(description="已合成的片段数", examples=[2])
    segments_total: int = Field(description="总片段数", examples=[3])
    characters: int = Field(description="至今的计费字符数", examples=[3400])
    bill: str = Field(description="至今的费用（元）", examples=["0.0487"])


class RecordDetail(HistoryItem):
    """一条记录的全部内容；没有值的字段不出现。"""

    status: str | None = Field(
        default=None,
        description=(
            "声音复刻为音色状态；语音合成与识别：`running` 进行中、`succeeded` 成功、`failed` 失败、"
            "`cancelled` 已取消、`abandoned` 客户端中途断开、`interrupted` 服务中断"
        ),
        examples=["succeeded"],
    )
    finished_at: str | None = Field(default=None, description="结束时间", examples=["2025-12-30T10:30:05"])
    erased_at: str | None = Field(
        default=None,
        description="超过保留天数后，文本与音频被清除的时间；此后只保留合成参数、用量与费用",
        examples=["2026-01-29T10:30:05"],
    )
    usage: RecordUsage | None = Field(default=None, description="用量与费用")
    details: dict[str, Any] | None = Field(default=None, description="识别的语种、情感与 Token 数")
    progress: RecordProgress | None = Field(default=None, description="长文本合成的进度")
    subtitle_url: str | None = Field(default=None, description="字幕文件URL（长文本合成）")
    task_id: str | None = Field(default=None, description="转写任务ID")
    task_status: str | None = Field(default=None, description="转写任务状态")
    audio_info: AudioInfo | None = Field(default=None, description="识别的音频")
    transcripts: list[Transcript] | None = Field(default=None, description="每个音轨的转写结果，含词级时间戳")


@router.get(
    "/records/{record_id}",
    summary="记录详情",
    description="一条记录的全部内容，包括用量、费用明细与完整的转写结果。",
    response_model=Envelope[RecordDetail],
    responses=error_answers(400, 401, 404, 429),
)
async def get_record(
    services: ServicesDep,
    user: CurrentUser,
    record_id: RecordId,
) -> Response:
    """Show one record in full."""
    call = await services.history.find(user.id, record_id)
    record, bill, task = call.record, call.bill, call.task
    detail = RecordDetail(**_shown(call, services).model_dump())
    detail.status = detail.status or record.status
    detail.finished_at = show_time(record.finished_at, services.settings.zone) if record.finished_at else None
    detail.erased_at = show_time(record.erased_at, services.settings.zone) if record.erased_at else None
    detail.details = json.loads(record.output_data) if record.output_data else None
    if bill:
        detail.usage = RecordUsage(
            unit=bill.unit,
            quantity=bill.quantity,
            unit_price=show_exactly(bill.unit_price),
            amount=show_exactly(bill.amount),
            currency=bill.currency,
            estimated=bill.estimated,
            provider_request_id=bill.provider_request_id,
        )
    if text := call.long_text:
        detail.progress = RecordProgress(
            segments_done=text.segments_done,
            segments_total=text.segments_total,
            characters=text.characters,
            bill=show_amount(call.amount),
        )
        if record.output_key and text.subtitle_key:
            detail.subtitle_url = services.storage.url(text.subtitle_key)
    if task:
        detail.task_id, detail.task_status = task.task_id, task.status
        detail.audio_info = AudioInfo.model_validate_json(task.audio_info) if task.audio_info else None
    shown = detail.model_dump(exclude_none=True)
    if task and task.transcripts:
        shown["transcripts"] = orjson.Fragment(task.transcripts_with_words or task.transcripts)
    return enveloped(shown)


@router.get(
    "/history",
    summary="历史记录",
    description="当前用户的语音操作历史，最新的在前，支持分页和按类型、模型、日期筛选。",
    responses=error_answers(400, 401, 429),
    response_model_exclude_none=True,
)
async def get_history(
    services: ServicesDep,
    user: CurrentUser,
    wanted: WantedRecords,
    page: Annotated[int, Query(description="页码，从1开始", ge=1, le=1_000_000)] = 1,
    page_size: Annotated[int, Query(description="每页数量", ge=1, le=100)] = 20,
) -> Envelope[History]:
    """List the user's records."""
    found = await services.history.page(user.id, page, page_size, wanted)
    items = [_shown(call, services) for call in found.items]
    return Envelope(data=History(items=items, total=found.total, page=page, page_size=page_size))


def _shown(call: RecordedCall, services: Services) -> HistoryItem:
    record, enrollment = call.record, call.enrollment
    status = None if record.status == "succeeded" else record.status
    return HistoryItem(
        id=record.id,
        type=record.type,
        model_name=record.model_name,
        input_data=record.input_data,
        output_url=services.storage.url(record.output_key) if record.output_key else None,
        output_text=record.output_text,
        voice_id=enrollment.voice_id if enrollment else None,
        duration=None if record.duration_ms is None else record.duration_ms / 1000,
        status=(enrollment.status if enrollment else None) or status,
        error_message=record.error_message,
        bill=show_amount(call.amount),
        created_at=show_time(record.created_at, services.settings.zone),
    )
