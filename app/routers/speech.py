"""Text to speech: spec 1.1 and 1.2."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Depends, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from app.audio import CONTENT_TYPES, AudioFormat
from app.catalog import speech_models
from app.dashscope import SpeechParameters
from app.routers.audio_response import AudioResponse
from app.routers.dependencies import CurrentUser, CurrentVisitor, ServicesDep, limit_rate
from app.routers.envelope import Envelope, error_answers
from app.routers.fields import Text, WholeNumber
from app.routers.idempotency import IdempotencyHeader, name_request, tell_repeat
from app.routers.presentation import show_amount
from app.services.synthesis import MAX_TEXT_CHARS

router = APIRouter(prefix="/api/audio/tts", tags=["语音合成"], dependencies=[Depends(limit_rate)])

SampleRate = Annotated[Literal[8000, 16000, 22050, 24000, 44100, 48000], WholeNumber]


class SpeechFields(BaseModel):
    """怎样说：各合成接口共有的参数。"""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: Text = Field(description="语音合成模型，见模型列表", max_length=64, examples=["cosyvoice-v3-flash"])
    voice: Text = Field(description="音色ID，系统音色或复刻音色", max_length=128, examples=["longanyang"])
    format: AudioFormat = Field(default="mp3", description="音频格式")
    sample_rate: SampleRate = Field(default=22050, description="采样率（Hz）")
    volume: Annotated[int, WholeNumber] = Field(default=50, ge=0, le=100, description="音量")
    speech_rate: float = Field(default=1.0, ge=0.5, le=2.0, description="语速")
    pitch_rate: float = Field(default=1.0, ge=0.5, le=2.0, description="音高")
    instruction: Text | None = Field(default=None, description="指令设置（情感、场景等），仅部分音色支持")

    @property
    def parameters(self) -> SpeechParameters:
        """What the synthesis sounds like."""
        return SpeechParameters(
            model=self.model,
            voice=self.voice,
            format=self.format,
            sample_rate=self.sample_rate,
            volume=self.volume,
            rate=self.speech_rate,
            pitch=self.pitch_rate,
            instruction=self.instruction,
        )


class SpeechRequest(SpeechFields):
    """语音合成请求。"""

    text: Text = Field(
        description="待合成文本，单次不超过2000字符；以 `<speak>` 包裹时按 SSML 处理",
        examples=["你好，欢迎使用语音合成服务！"],
        json_schema_extra={"minLength": 1, "maxLength": MAX_TEXT_CHARS},
        repr=False,
    )
    stream: bool = Field(default=False, description="是否使用流式输出")


class Speech(BaseModel):
    """合成结果。"""

    audio_url: str = Field(description="音频文件URL，可直接播放或下载")
    duration: float = Field(description="音频时长（秒）", examples=[3.5])
    format: str = Field(description="音频格式", examples=["mp3"])
    sample_rate: int = Field(description="采样率（Hz）", examples=[22050])
    characters: int = Field(description="计费字符数，由百炼返回；一个汉字计 2", examples=[26])
    bill: str = Field(description="本次费用（元）", examples=["0.0004"])
    record_id: int = Field(description="历史记录ID", examples=[1])


class SpeechModelInfo(BaseModel):
    """语音合成模型。"""

    model_id: str = Field(description="模型ID，用于API调用", examples=["cosyvoice-v3-flash"])
    model_name: str = Field(description="模型显示名称", examples=["CosyVoice V3 Flash"])
    description: str = Field(description="模型描述")
    price_per_10k_chars: str = Field(description="每万字符价格（元）", examples=["0.14335"])
    features: list[str] = Field(description="支持的特性列表")


_PLAIN = {
    "model": "cosyvoice-v3-flash",
    "voice": "longanyang",
    "text": "你好，欢迎使用语音合成服务！",
    "stream": False,
    "format": "mp3",
    "volume": 50,
    "speech_rate": 1.0,
    "pitch_rate": 1.0,
}
_EXAMPLES: dict[str, Any] = {
    "非流式": {"summary": "合成并保存，返回URL", "value": _PLAIN},
    "流式": {"summary": "边合成边返回音频", "value": {**_PLAIN, "stream": True}},
    "带情感": {"summary": "指令控制情感", "value": {**_PLAIN, "instruction": "你说话的情感是happy。"}},
    "SSML": {"summary": "停顿", "value": {**_PLAIN, "text": '<speak>你好<break time="500ms"/>世界</speak>'}},
}
_AUDIO_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "非流式返回 JSON；`stream=true` 时返回音频数据流，响应头 `X-Record-Id` 为历史记录ID",
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in CONTENT_TYPES.values()},
    }
}


@router.post(
    "/synthesize",
    summary="语音合成",
    description=(
        "将文本转换为语音。\n\n"
        "- `stream=false`：合成完成后保存音频，返回 URL、时长、字符数与费用；\n"
        "- `stream=true`：返回二进制音频流，边合成边传；同样的音频随后保存，可在历史记录中找到。"
        "中途断开连接会停止合成，已合成的部分照常计费；带 `Idempotency-Key` 时不停止，重发即得到完整音频。"
    ),
    response_model=Envelope[Speech],
    responses={**_AUDIO_ANSWER, **error_answers(400, 401, 403, 404, 409, 413, 429, 502, 503, 504)},
)
async def synthesize(
    services: ServicesDep,
    visitor: CurrentVisitor,
    request: Request,
    asked: Annotated[SpeechRequest, Body(openapi_examples=_EXAMPLES)],
    response: Response,
    key: IdempotencyHeader = None,
) -> Envelope[Speech] | Response:
    """Speak a text: kept and answered with its URL, or streamed while it is spoken."""
    speech, parameters, has_left = services.synthesis, asked.parameters, request.is_disconnected
    name = name_request(key, "synthesize", asked)
    if asked.stream:
        listener, is_repeat = await services.repeats.once(
            visitor.user.id,
            name,
            lambda: speech.stream(visitor, parameters, asked.text, name),
            speech.replay,
            has_left=has_left,
        )
        answer = AudioResponse(listener, CONTENT_TYPES[asked.format])
        tell_repeat(answer, is_repeat)
        return answer
    spoken, is_repeat = await services.repeats.once(
        visitor.user.id,
        name,
        lambda: speech.synthesize(visitor, parameters, asked.text, name),
        speech.recall,
        has_left=has_left,
    )
    tell_repeat(response, is_repeat)
    return Envelope(
        data=Speech(
            audio_url=spoken.url,
            duration=spoken.duration_ms / 1000,
            format=asked.format,
            sample_rate=asked.sample_rate,
            characters=spoken.characters,
            bill=show_amount(spoken.amount),
            record_id=spoken.record_id,
        )
    )


@router.get(
    "/models",
    summary="语音合成模型列表",
    description="获取所有可用的语音合成模型与价格。",
    responses=error_answers(401, 429),
)
async def list_models(services: ServicesDep, _: CurrentUser) -> Envelope[list[SpeechModelInfo]]:
    """List the speech models with their prices."""
    prices = services.prices.per_10k_characters
    return Envelope(
        data=[
            SpeechModelInfo(
                model_id=model.model_id,
                model_name=model.model_name,
                description=model.description,
                price_per_10k_chars=f"{prices[model.model_id]:f}",
                features=list(model.features),
            )
            for model in speech_models()
        ]
    )
