"""Long text to speech: spec 1.3."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Depends, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from app.routers.dependencies import CurrentUser, ServicesDep, limit_rate
from app.routers.envelope import Envelope, error_answers
from app.routers.fields import Text
from app.routers.idempotency import IdempotencyHeader, name_request, tell_repeat, telling_repeat
from app.routers.presence import while_connected
from app.routers.progress import show_progress
from app.routers.speech import SpeechFields

PATH = "/api/audio/tts/synthesize-long"

router = APIRouter(tags=["语音合成"], dependencies=[Depends(limit_rate)])


class LongTextRequest(SpeechFields):
    """长文本语音合成请求。"""

    text: Text = Field(
        description="待合成文本，自动切割；以 `<speak>` 包裹时按 SSML 处理，只在顶层标签之间切割",
        examples=["这是一段很长的文本……"],
        json_schema_extra={"minLength": 1},
        repr=False,
    )
    background: bool = Field(default=False, alias="async", description="为 true 时立即返回记录ID，在后台合成")
    subtitle: Literal["srt", "vtt"] | None = Field(default=None, description="同时生成字幕文件")


class LongSpeech(BaseModel):
    """长文本合成结果；`async` 为 true 时只有 `record_id`、`status` 与 `segments`。"""

    audio_url: str | None = Field(default=None, description="音频文件URL，可直接播放或下载")
    duration: float | None = Field(default=None, description="音频总时长（秒）", examples=[120.5])
    format: str | None = Field(default=None, description="音频格式", examples=["mp3"])
    total_characters: int | None = Field(default=None, description="计费字符数；一个汉字计 2", examples=[5000])
    segments: int = Field(description="切割的片段数", examples=[3])
    bill: str | None = Field(default=None, description="本次费用（元）", examples=["0.0717"])
    record_id: int = Field(description="历史记录ID", examples=[2])
    subtitle_url: str | None = Field(default=None, description="字幕文件URL")
    status: str | None = Field(default=None, description="后台合成的状态", examples=["running"])


_EXAMPLE = {"model": "cosyvoice-v3-flash", "voice": "longanyang", "text": "这是一段很长的文本……", "format": "mp3"}
_EXAMPLES: dict[str, Any] = {
    "等待结果": {"summary": "合成完成后返回", "value": _EXAMPLE},
    "后台合成": {"summary": "立即返回记录ID，附带字幕", "value": {**_EXAMPLE, "async": True, "subtitle": "srt"}},
}


@router.post(
    PATH,
    summary="长文本语音合成",
    description=(
        "把长文本按句切割、并行合成，再合并为一个完整的音频文件。\n\n"
        "- 默认等到合成完成再返回；中途断开连接不影响合成，结果见历史记录；\n"
        "- `async=true` 立即返回 `record_id`，用 `GET /api/audio/records/{record_id}` 或其 `/events` 查看进度，"
        "`POST /api/audio/records/{record_id}/cancel` 取消；\n"
        "- `subtitle` 为 `srt` 或 `vtt` 时同时生成字幕文件。\n\n"
        "服务重启后自动继续，已合成的片段不会重复购买。"
    ),
    response_model=Envelope[LongSpeech],
    response_model_exclude_none=True,
    responses=error_answers(400, 401, 403, 404, 409, 413, 429, 502, 503, 504),
)
async def synthesize_long(
    services: ServicesDep,
    user: CurrentUser,
    request: Request,
    asked: Annotated[LongTextRequest, Body(openapi_examples=_EXAMPLES)],
    response: Response,
    key: IdempotencyHeader = None,
) -> Envelope[LongSpeech]:
    """Speak a long text: wait for the whole, or answer at once."""
    texts, name = services.long_text, name_request(key, "synthesize-long", asked)
    started, is_repeat = await services.repeats.once(
        user.id,
        name,
        lambda: texts.start(user.id, asked.parameters, asked.text, asked.subtitle, name),
        texts.recall,
        is_answered=lambda _: True,
    )
    tell_repeat(response, is_repeat)
    if asked.background:
        on_its_way = LongSpeech(record_id=started.record_id, segments=started.segments, status="running")
        return Envelope(data=on_its_way)
    with telling_repeat(is_repeat):
        call = await while_connected(request, services.long_text.wait(user.id, started.record_id))
    shown = show_progress(call, services)
    return Envelope(
        data=LongSpeech(
            audio_url=shown.audio_url,
            duration=shown.duration,
            format=asked.format,
            total_characters=shown.characters,
            segments=started.segments,
            bill=shown.bill,
            record_id=shown.record_id,
            subtitle_url=shown.subtitle_url,
        )
    )
