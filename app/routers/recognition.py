"""Speech to text: spec 2.0 and 2.1."""

from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from app.catalog import Language, recognition_models
from app.dashscope import RecognitionOrder
from app.routers.dependencies import CurrentUser, ServicesDep, limit_rate
from app.routers.envelope import Envelope, error_answers
from app.routers.fields import Text
from app.routers.idempotency import IdempotencyHeader, name_upload, tell_repeat
from app.routers.presentation import show_amount
from app.routers.uploads import AudioFields, read_upload

PATH = "/api/audio/asr/recognize"
# 10 MB of audio in Base64, with the other fields.
MAX_BODY_BYTES = 15 * 1024 * 1024

router = APIRouter(prefix="/api/audio/asr", tags=["语音识别"], dependencies=[Depends(limit_rate)])


class RecognitionModelInfo(BaseModel):
    """语音识别模型。"""

    model_id: str = Field(description="模型ID，用于API调用", examples=["qwen3-asr-flash"])
    model_name: str = Field(description="模型显示名称", examples=["通义千问3-ASR-Flash"])
    description: str = Field(description="模型描述")
    call_type: str = Field(description="调用方式：sync（同步）、async（异步）", examples=["sync"])
    features: list[str] = Field(description="支持的特性列表")


class RecognitionRequest(AudioFields):
    """语音识别请求。"""

    model_config = ConfigDict(strict=True)

    model: Text = Field(
        description="识别模型：`qwen3-asr-flash`、`qwen-audio-asr`", max_length=64, examples=["qwen3-asr-flash"]
    )
    language: Language | None = Field(
        default=None, description="指定语种，不指定则自动检测；`qwen-audio-asr` 不使用此参数", examples=["zh"]
    )
    enable_itn: bool = Field(
        default=False, description="是否启用逆文本标准化（仅中英文）；`qwen-audio-asr` 不使用此参数"
    )
    context: Text | None = Field(
        default=None,
        description="上下文提示，提升特定场景识别准确率，不超过10000 Token；`qwen-audio-asr` 不支持",
        repr=False,
    )


class RecognitionUsage(BaseModel):
    """用量。"""

    input_tokens: int = Field(description="输入 Token 数", examples=[0])
    output_tokens: int = Field(description="输出 Token 数", examples=[8])
    seconds: int = Field(description="计费秒数", examples=[3])


class RecognizedSpeech(BaseModel):
    """识别结果。"""

    text: str = Field(description="识别结果文本；没有人声时为空", examples=["欢迎使用语音识别服务。"])
    language: str = Field(description="检测到的语言；模型没有给出时为空", examples=["zh"])
    emotion: str = Field(description="情感类型；模型没有给出时为空", examples=["neutral"])
    duration: int = Field(description="音频时长（秒）", examples=[3])
    usage: RecognitionUsage = Field(description="用量信息")
    bill: str = Field(description="本次费用（元）", examples=["0.0012"])
    record_id: int = Field(description="历史记录ID", examples=[3])


def _body() -> dict[str, Any]:
    """The two forms of the request, which FastAPI can't describe on one route by itself."""
    described = RecognitionRequest.model_json_schema()
    fields: dict[str, Any] = described["properties"]
    file = {"type": "string", "format": "binary", "description": "音频文件"}
    # Swagger fills a field in with its default: one that is empty is not sent on.
    left_out: dict[str, Any] = {"type": "string", "default": ""}
    languages = fields["language"]["anyOf"][0]["enum"]
    context = fields["context"]["anyOf"][0]["pattern"]
    form = {
        "model": {**fields["model"], "minLength": 1},
        "file": file,
        "language": {
            **left_out,
            "enum": ["", *languages],
            "description": f"{fields['language']['description']}，例如 zh、en",
        },
        "enable_itn": fields["enable_itn"],
        "context": {**left_out, "pattern": context, "description": fields["context"]["description"]},
    }
    by_url = {
        "model": "qwen3-asr-flash",
        "audio_url": "https://your-bucket.oss-cn-beijing.aliyuncs.com/audio/input.mp3",
        "language": "zh",
        "enable_itn": True,
    }
    by_base64 = {"model": "qwen3-asr-flash", "audio_base64": "UklGRiQAAABXQVZF…", "context": "百炼、DashScope"}
    return {
        "required": True,
        "content": {
            "application/json": {
                "schema": described,
                "examples": {
                    "URL": {"summary": "识别公网上的音频", "value": by_url},
                    "Base64": {"summary": "音频放在请求里", "value": by_base64},
                },
            },
            "multipart/form-data": {"schema": {"type": "object", "required": ["model", "file"], "properties": form}},
        },
    }


@router.get(
    "/models",
    summary="语音识别模型列表",
    description="获取所有可用的语音识别模型。`sync` 用于 `/recognize`，`async` 用于 `/transcribe`。",
    responses=error_answers(401, 429),
)
async def list_models(_: CurrentUser) -> Envelope[list[RecognitionModelInfo]]:
    """List the recognition models."""
    return Envelope(
        data=[
            RecognitionModelInfo(
                model_id=model.model_id,
                model_name=model.model_name,
                description=model.description,
                call_type=model.call_type,
                features=list(model.features),
            )
            for model in recognition_models()
        ]
    )


@router.post(
    "/recognize",
    summary="同步语音识别",
    description=(
        "将短音频（60秒以内）转换为文字。\n\n"
        "- JSON：`audio_url` 或 `audio_base64`；表单：`file`（或 `audio_url`）。三者必须且只能提供一个；\n"
        "- 支持 aac、amr、aiff、avi、flac、flv、mkv、mp3、mpeg、ogg、opus、wav、webm、wma、wmv，最大 10 MB，"
        "按文件内容而不是文件名判断，原样发送，不转码；\n"
        "- 更长的音频请使用 `/api/audio/asr/transcribe`。"
    ),
    responses=error_answers(400, 401, 403, 404, 409, 429, 502, 503, 504),
    openapi_extra={"requestBody": _body()},
)
async def recognize(
    services: ServicesDep, user: CurrentUser, request: Request, response: Response, key: IdempotencyHeader = None
) -> Envelope[RecognizedSpeech]:
    """Recognise short audio while the client waits."""
    asked, audio = await read_upload(request, RecognitionRequest, services.decoding)
    name = await name_upload(key, "recognize", asked, audio)
    order = RecognitionOrder(asked.model, asked.language, asked.enable_itn, asked.context)
    done, is_repeat = await services.repeats.once(
        user.id,
        name,
        lambda: services.recognition.recognize(user.id, order, audio, name),
        services.recognition.recall,
        otherwise=audio.close,
        has_left=request.is_disconnected,
    )
    tell_repeat(response, is_repeat)
    usage = RecognitionUsage(
        input_tokens=done.heard.input_tokens, output_tokens=done.heard.output_tokens, seconds=done.seconds
    )
    return Envelope(
        data=RecognizedSpeech(
            text=done.heard.text,
            language=done.heard.language or "",
            emotion=done.heard.emotion or "",
            duration=done.seconds,
            usage=usage,
            bill=show_amount(done.amount),
            record_id=done.record_id,
        )
    )
