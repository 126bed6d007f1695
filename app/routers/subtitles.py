"""Subtitles of a transcription, for players and editors."""

from typing import Annotated, Literal

from anyio import to_thread
from fastapi import APIRouter, Depends, Query
from fastapi.responses import Response
from pydantic import BaseModel, Field

from app.errors import InvalidRequest
from app.routers.dependencies import CurrentUser, ServicesDep, limit_rate
from app.routers.envelope import Envelope, error_answers
from app.routers.transcription import TaskId
from app.subtitles import Cue, Sentence, Track, Word, make_cues, write_srt, write_txt, write_vtt
from app.transcripts import Transcript

SubtitleFormat = Literal["srt", "vtt", "txt", "json"]
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
        **error_answers(400, 401, 403, 404, 409, 429),
    },
)
async def get_subtitle(
    services: ServicesDep,
    user: CurrentUser,
    task_id: TaskId,
    format: Annotated[SubtitleFormat, Query(description="字幕格式")] = "srt",
    channel_id: Annotated[int | None, Query(description="只要这个音轨；不填为全部音轨", ge=0)] = None,
) -> Envelope[list[SubtitleCue]] | Response:
    """Lay a transcript out as subtitles."""
    transcripts = await services.transcription.transcripts(user.id, task_id)
    tracks = [_track(each) for each in transcripts if channel_id in {None, each.channel_id}]
    if channel_id is not None and not tracks:
        raise InvalidRequest(f"channel_id 必须是以下之一：{'、'.join(str(each.channel_id) for each in transcripts)}")
    if format == "json":
        cues = await to_thread.run_sync(_lay_out, tracks)
        return Envelope(
            data=[
                SubtitleCue(
                    channel_id=cue.channel_id, begin_time=cue.begin_ms, end_time=cue.end_ms, lines=list(cue.lines)
                )
                for cue in cues
            ]
        )
    text = await to_thread.run_sync(_write, format, tracks)
    headers = {
        "Content-Disposition": f'inline; filename="subtitle.{format}"',
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "private, no-cache",
    }
    return Response(text, media_type=CONTENT_TYPES[format], headers=headers)


def _write(format: SubtitleFormat, tracks: list[Track]) -> str:
    match format:
        case "srt":
            return write_srt(_lay_out(tracks))
        case "vtt":
            return write_vtt(_lay_out(tracks))
        case _:
            return write_txt(tracks)


def _lay_out(tracks: list[Track]) -> list[Cue]:
    cues = [cue for track in tracks for cue in make_cues(track)]
    return sorted(cues, key=lambda cue: (cue.begin_ms, cue.channel_id))


def _track(transcript: Transcript) -> Track:
    sentences = tuple(
        Sentence(
            sentence.begin_time,
            sentence.end_time,
            sentence.text,
            tuple(Word(word.begin_time, word.end_time, word.text, word.punctuation) for word in sentence.words or ()),
        )
        for sentence in transcript.sentences
    )
    return Track(transcript.channel_id, sentences)
