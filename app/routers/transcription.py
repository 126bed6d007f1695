"""Transcription of long audio: spec 2.2 and 2.3."""

from typing import Annotated
from zoneinfo import ZoneInfo

import orjson
from fastapi import APIRouter, Depends, Path, Request
from fastapi.responses import Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from app.catalog import Language
from app.dashscope import TranscriptionOrder
from app.routers.dependencies import CurrentUser, ServicesDep, limit_rate
from app.routers.envelope import Envelope, enveloped, error_answers
from app.routers.fields import Text, WholeNumber
from app.routers.idempotency import IdempotencyHeader, name_request, tell_repeat
from app.routers.presentation import show_amount, show_task_time
from app.services.repeats import has_ended
from app.services.transcription import Task
from app.transcripts import Transcript

router = APIRouter(prefix="/api/audio/asr", tags=["语音识别"], dependencies=[Depends(limit_rate)])


def _once_each(channels: list[int]) -> list[int]:
    if len(set(channels)) != len(channels):
        raise ValueError("不能重复：每个音轨单独计费")
    return channels


class TranscriptionRequest(BaseModel):
    """长音频转写请求。"""

    model_config = ConfigDict(strict=True)

    model: Text = Field(
        description="识别模型：`qwen3-asr-flash-filetrans`、`paraformer-v2`",
        max_length=64,
        examples=["qwen3-asr-flash-filetrans"],
    )
    file_url: Text = Field(
        description="音频文件URL，必须公网可访问",
        examples=["https://your-bucket.oss-cn-beijing.aliyuncs.com/audio/long-audio.mp3"],
    )
    language: Language | None = Field(default=None, description="指定语种，不指定则自动检测", examples=["zh"])
    enable_itn: bool = Field(default=False, description="是否启用ITN（仅中英文）；`paraformer-v2` 不使用此参数")
    context: Text | None = Field(default=None, description="上下文提示；`paraformer-v2` 不支持", repr=False)
    channel_id: Annotated[
        list[Annotated[int, Field(ge=0, le=63), WholeNumber]],
        Field(min_length=1, max_length=16),
        AfterValidator(_once_each),
    ] = Field(
        default=[0], description="多音轨文件的音轨索引，每个音轨单独计费", json_schema_extra={"uniqueItems": True}
    )
    enable_words: bool = Field(
        default=False,
        description="是否返回词级时间戳，字幕因此更准；结果见记录详情与字幕。`paraformer-v2` 总是返回",
    )


class SubmittedTask(BaseModel):
    """已提交的任务。"""

    task_id: str = Field(description="任务ID", examples=["8fab76d0-0eed-4d20-929f-xxxx"])
    task_status: str = Field(description="任务状态", examples=["PENDING"])
    record_id: int = Field(description="历史记录ID", examples=[4])


class TaskResult(BaseModel):
    """转写结果。"""

    transcription_url: str | None = Field(default=None, description="百炼的结果文件URL，有效期24小时")
    transcripts: list[Transcript] = Field(description="每个音轨的转写结果")


class TaskUsage(BaseModel):
    """用量。"""

    seconds: int = Field(description="计费秒数", examples=[4])


class TaskState(BaseModel):
    """任务状态与结果；没有值的字段不出现。"""

    task_id: str = Field(description="任务ID", examples=["8fab76d0-0eed-4d20-929f-xxxx"])
    task_status: str = Field(description="状态：PENDING、RUNNING、SUCCEEDED、FAILED、UNKNOWN", examples=["SUCCEEDED"])
    submit_time: str = Field(description="提交时间", examples=["2025-01-01 10:00:00"])
    scheduled_time: str | None = Field(default=None, description="开始时间", examples=["2025-01-01 10:00:01"])
    end_time: str | None = Field(default=None, description="结束时间", examples=["2025-01-01 10:00:05"])
    error_message: str | None = Field(default=None, description="失败原因；进行中时为暂时无法查询的原因")
    result: TaskResult | None = Field(default=None, description="成功后的结果")
    usage: TaskUsage | None = Field(default=None, description="用量")
    bill: str | None = Field(default=None, description="费用（元），任务结束后给出", examples=["0.0016"])


TaskId = Annotated[str, Path(description="任务ID", max_length=200)]


@router.post(
    "/transcribe",
    summary="异步语音识别（长音频）",
    description=(
        "提交长音频转写任务（最长 12 小时、2 GB），立即返回任务ID。"
        "转写结果与费用由后台自动收取并保存，即使没有人查询任务。"
    ),
    responses=error_answers(400, 401, 403, 404, 409, 413, 429, 502, 503, 504),
)
async def transcribe(
    services: ServicesDep,
    user: CurrentUser,
    request: Request,
    asked: TranscriptionRequest,
    response: Response,
    key: IdempotencyHeader = None,
) -> Envelope[SubmittedTask]:
    """Submit long audio."""
    order = TranscriptionOrder(
        model=asked.model,
        language=asked.language,
        enable_itn=asked.enable_itn,
        context=asked.context,
        channel_ids=tuple(asked.channel_id),
        enable_words=asked.enable_words,
    )
    name = name_request(key, "transcribe", asked)
    task, is_repeat = await services.repeats.once(
        user.id,
        name,
        lambda: services.transcription.submit(user.id, order, asked.file_url, name),
        services.transcription.recall,
        is_answered=lambda call: has_ended(call) or call.task is not None,
        has_left=request.is_disconnected,
    )
    tell_repeat(response, is_repeat)
    return Envelope(data=SubmittedTask(task_id=task.task_id, task_status=task.status, record_id=task.record_id))


@router.get(
    "/task/{task_id}",
    summary="查询转写任务",
    description="查询转写任务的状态和结果。任务完成后，结果在 24 小时之后以及服务重启之后仍可查询。",
    response_model=Envelope[TaskState],
    responses=error_answers(400, 401, 404, 429),
)
async def get_task(services: ServicesDep, user: CurrentUser, task_id: TaskId) -> Response:
    """Tell how a task is doing."""
    task = await services.transcription.look(user.id, task_id)
    state = _shown(task, services.settings.zone).model_dump(exclude_none=True)
    if task.transcripts is not None:
        state["result"]["transcripts"] = orjson.Fragment(task.transcripts)
    return enveloped(state)


def _shown(task: Task, zone: ZoneInfo) -> TaskState:
    row = task.transcription
    state = TaskState(
        task_id=row.task_id,
        task_status=row.status,
        submit_time=show_task_time(row.submitted_at, zone),
        scheduled_time=show_task_time(row.scheduled_at, zone) if row.scheduled_at else None,
    )
    if row.next_check_at is not None:
        state.error_message = task.trouble.message if task.trouble else None
        return state
    state.end_time = show_task_time(row.ended_at, zone) if row.ended_at else None
    state.error_message = task.record.error_message
    state.bill = show_amount(task.amount)
    if task.bill:
        state.usage = TaskUsage(seconds=task.bill.quantity)
    if row.status == "SUCCEEDED":
        state.usage = state.usage or TaskUsage(seconds=0)
    if row.status == "SUCCEEDED" or row.result_url:
        state.result = TaskResult(transcription_url=row.result_url, transcripts=[])
    return state
