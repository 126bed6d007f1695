"""How far a record is, while it is worked on, and how a long text is stopped."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Path
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, Field

from app.routers.dependencies import CurrentListener, CurrentUser, ServicesDep, limit_rate
from app.routers.envelope import Envelope, error_answers
from app.routers.presentation import show_amount
from app.services import Services
from app.services.history import RecordedCall

router = APIRouter(prefix="/api/audio/records", tags=["历史记录"])
RecordId = Annotated[int, Path(description="记录ID", ge=1, le=2**63 - 1)]


class Progress(BaseModel):
    """一条记录进行到哪里；没有值的字段不出现。"""

    record_id: int = Field(description="记录ID", examples=[2])
    status: str = Field(
        description="`running`、`succeeded`、`failed`、`cancelled`、`abandoned` 或 `interrupted`", examples=["running"]
    )
    segments_done: int | None = Field(default=None, description="已合成的片段数", examples=[2])
    segments_total: int | None = Field(default=None, description="总片段数", examples=[3])
    characters: int | None = Field(default=None, description="至今的计费字符数", examples=[3400])
    bill: str = Field(description="至今的费用（元）", examples=["0.0487"])
    audio_url: str | None = Field(default=None, description="音频文件URL")
    duration: float | None = Field(default=None, description="音频时长（秒）", examples=[120.5])
    subtitle_url: str | None = Field(default=None, description="字幕文件URL")
    error_message: str | None = Field(default=None, description="失败原因")


async def _existing(services: ServicesDep, listener: CurrentListener, record_id: RecordId) -> RecordedCall:
    return await services.history.find(listener.user.id, record_id, whole=False)


@router.get(
    "/{record_id}/events",
    summary="合成进度（SSE）",
    description=(
        "以 Server-Sent Events 推送进度：立即一条、每次变化一条 `progress`，结束时一条 `end`，然后关闭。"
        "浏览器的 EventSource 不能带请求头，可用 `?token=` 传 `POST /api/auth/ticket` 换取的一次性凭证。"
    ),
    response_class=EventSourceResponse,
    responses=error_answers(400, 401, 404, 429),
)
async def follow_record(
    services: ServicesDep, listener: CurrentListener, call: Annotated[RecordedCall, Depends(_existing)]
) -> AsyncIterator[ServerSentEvent]:
    """Tell of a record until it has its end, or whoever listens is logged out."""
    async for now in services.long_text.follow(listener.user.id, call.record.id):
        if not await services.logins.is_in(listener):
            return
        event = "progress" if now.record.status == "running" else "end"
        yield ServerSentEvent(event=event, data=show_progress(now, services).model_dump(exclude_none=True))


@router.post(
    "/{record_id}/cancel",
    summary="取消长文本合成",
    description="停止合成；已合成的部分照常计费，从头开始连续的部分保存为音频。已结束的记录不受影响。",
    response_model=Envelope[Progress],
    response_model_exclude_none=True,
    responses=error_answers(400, 401, 404, 409, 429, 503),
    dependencies=[Depends(limit_rate)],
)
async def cancel_record(services: ServicesDep, user: CurrentUser, record_id: RecordId) -> Envelope[Progress]:
    """Stop a long text, and answer when it is settled."""
    return Envelope(data=show_progress(await services.long_text.cancel(user.id, record_id), services))


def show_progress(call: RecordedCall, services: Services) -> Progress:
    """How far a record is."""
    record, text = call.record, call.long_text
    has_audio = record.output_key is not None
    return Progress(
        record_id=record.id,
        status=record.status,
        segments_done=text.segments_done if text else None,
        segments_total=text.segments_total if text else None,
        characters=text.characters if text else call.bill.quantity if call.bill else None,
        bill=show_amount(call.amount),
        audio_url=services.storage.url(record.output_key) if record.output_key else None,
        duration=None if record.duration_ms is None else record.duration_ms / 1000,
        subtitle_url=services.storage.url(text.subtitle_key) if has_audio and text and text.subtitle_key else None,
        error_message=record.error_message,
    )
