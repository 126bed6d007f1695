"""Subtitles of a transcription, for players and editors."""

from typing import Annotated

import orjson
from fastapi import APIRouter, Depends, Query
from fastapi.responses import Response
from pydantic import BaseModel, Field

from app.routers.dependencies import CurrentUser, ServicesDep, limit_rate
from app.routers.envelope import Envelope, enveloped, error_answers
from app.routers.transcription import TaskId
from app.subtitling import SubtitleFormat

CONTENT_TYPES: dict[SubtitleFormat, str] = {
    "srt": "application/x-subrip; charset=utf-8",
    "vtt": "text/vtt; charset=utf-8",
    "txt": "text/plain; charset=utf-8",
}

router = APIRouter(prefix="/api/audio/asr", tags=["语音识别"], dependencies=[Depends(limit_rate)])


class SubtitleCue(BaseModel):
    """一条字幕。"""

    channel_id: int = Field(description="音轨索引", examples=[0])
    begin_time: int = Field(description="开始时间（毫秒）", examples=[100])
    end_time: int = Field(description="结束时间（毫秒）", examples=[3820])
    lines: list[str] = Field(description="一行或两行文字", examples=[["今天天气还行吧。"]])


@router.get(
    "/task/{task_id}/subtitle",
    summary="下载字幕",
    description=(
        "把转写结果排成字幕：每条最多两行，中文每行不超过约 18 个字，英文不超过约 42 个字符；"
        "有词级时间戳时按词对时。`srt`、`vtt`、`txt` 返回文件，`json` 返回统一格式。"
        "任务未完成或失败时返回 409 `NO_TRANSCRIPT`。"
    ),
    response_model=Envelope[list[SubtitleCue]],
    responses={
        200: {
            "description": "字幕文件，或 JSON",
            "content": {kind.partition(";")[0]: {"schema": {"type": "string"}} for kind in CONTENT_TYPES.values()},
        },
        **error_answers(400, 401, 404, 409, 429),
    },
)
async def get_subtitle(
    services: ServicesDep,
    user: CurrentUser,
    task_id: TaskId,
    format: Annotated[SubtitleFormat, Query(description="字幕格式")] = "srt",
    channel_id: Annotated[int | None, Query(description="只要这个音轨；不填为全部音轨", ge=0)] = None,
) -> Response:
    """Lay a transcript out as subtitles."""
    text = await services.transcription.subtitle(user.id, task_id, format, channel_id)
    if format == "json":
        return enveloped(orjson.Fragment(text))
    headers = {
        "Content-Disposition": f'inline; filename="subtitle.{format}"',
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "private, no-cache",
    }
    return Response(text, media_type=CONTENT_TYPES[format], headers=headers)
