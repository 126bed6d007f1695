"""Cloned voices: spec 三, from the sample to the end."""

from typing import Annotated, Any
from zoneinfo import ZoneInfo

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import Response
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from starlette.exceptions import HTTPException

from app.catalog import read_voice_id
from app.dashscope import CloningOrder, VoiceReport
from app.models import Voice
from app.routers.dependencies import CurrentUser, ServicesDep, limit_rate
from app.routers.envelope import Envelope, error_answers
from app.routers.fields import Text
from app.routers.idempotency import IdempotencyHeader, name_upload, tell_repeat
from app.routers.presence import while_connected
from app.routers.presentation import show_task_time
from app.routers.uploads import AudioUrlField, read_upload
from app.services.repeats import has_ended

PREFIX = "/api/audio/voice"
# 10 MB of audio with the other fields.
MAX_BODY_BYTES = 11 * 1024 * 1024
MAX_WAIT_SECONDS = 300
MAX_PREFIX_CHARS = 10
LANGUAGES = ("zh", "en", "fr", "de", "ja", "ko", "ru", "pt", "th", "id", "vi")
_NO_VOICES = {"create", "list", "system"}

router = APIRouter(prefix=PREFIX, tags=["声音复刻"], dependencies=[Depends(limit_rate)])


def _check_prefix(prefix: str) -> str:
    allowed = prefix.isascii() and prefix.replace("_", "a").isalnum()
    if not allowed or len(prefix) > MAX_PREFIX_CHARS:
        raise ValueError(f"仅允许数字、字母和下划线，1 到 {MAX_PREFIX_CHARS} 个字符")
    return prefix


def _split(hints: object) -> object:
    """A form has its list in one field."""
    return [hint.strip() for hint in hints.replace("，", ",").split(",")] if isinstance(hints, str) else hints


def _check_hint(hint: str) -> str:
    if hint not in LANGUAGES:
        raise ValueError(f"只能是：{'、'.join(LANGUAGES)}")
    return hint


Hint = Annotated[str, AfterValidator(_check_hint), WithJsonSchema({"type": "string", "enum": [*LANGUAGES]})]
_HINTS_IN_FORM = rf"^({'|'.join(LANGUAGES)})([,，] *({'|'.join(LANGUAGES)})){{0,{len(LANGUAGES) - 1}}}$|^$"


class CloningRequest(AudioUrlField):
    """创建复刻音色的请求。"""

    model_config = ConfigDict(strict=True)

    target_model: Text = Field(
        description="驱动音色的语音合成模型：`cosyvoice-v3-plus`、`cosyvoice-v3-flash`、`cosyvoice-v2`",
        max_length=64,
        examples=["cosyvoice-v3-plus"],
    )
    prefix: Annotated[str, AfterValidator(_check_prefix)] = Field(
        description="音色名称前缀，仅允许数字、字母和下划线，不超过10字符；百炼不支持下划线，音色ID中会去掉",
        examples=["myvoice"],
        json_schema_extra={"pattern": "^_*[A-Za-z0-9][A-Za-z0-9_]*$", "maxLength": MAX_PREFIX_CHARS},
    )
    language_hints: Annotated[list[Hint], BeforeValidator(_split), Field(max_length=len(LANGUAGES))] | None = Field(
        default=None, description=f"样本的语种：{'、'.join(LANGUAGES)}；百炼只使用第一个", examples=[["en"]]
    )


class UpdateRequest(AudioUrlField):
    """更新音色的请求。"""

    model_config = ConfigDict(strict=True)


class CreatedVoice(BaseModel):
    """创建的音色。"""

    voice_id: str = Field(description="音色ID", examples=["cosyvoice-v3-plus-myvoice-xxxxxxxx"])
    status: str = Field(description="音色状态", examples=["DEPLOYING"])
    target_model: str = Field(description="驱动音色的语音合成模型", examples=["cosyvoice-v3-plus"])
    record_id: int = Field(description="历史记录ID", examples=[5])


class VoiceItem(BaseModel):
    """一个复刻音色。"""

    voice_id: str = Field(description="音色ID", examples=["cosyvoice-v3-plus-myvoice-xxxxxxxx"])
    status: str = Field(
        description="音色状态：`DEPLOYING`（审核中）、`OK`（可用）、`UNDEPLOYED`（未通过）", examples=["OK"]
    )
    target_model: str = Field(description="目标模型（创建音色时指定的模型）", examples=["cosyvoice-v3-plus"])
    gmt_create: str = Field(description="创建时间", examples=["2025-01-01 10:00:00"])
    gmt_modified: str = Field(description="修改时间", examples=["2025-01-01 10:00:05"])


class VoiceList(BaseModel):
    """一页音色，最新的在前。"""

    total: int = Field(description="符合条件的音色总数", examples=[2])
    voices: list[VoiceItem] = Field(description="音色列表")


class VoiceDetail(VoiceItem):
    """一个复刻音色的详细信息。"""

    resource_link: str = Field(
        description="百炼保存的音频样本，限时有效；没有时为空", examples=["https://xxx/audio.wav"]
    )


class UpdatedVoice(BaseModel):
    """更新后的音色。"""

    voice_id: str = Field(description="音色ID", examples=["cosyvoice-v3-plus-myvoice-xxxxxxxx"])
    status: str = Field(description="音色状态", examples=["DEPLOYING"])


async def _cloned_voice_id(
    voice_id: Annotated[str, Path(description="复刻音色ID", max_length=200, examples=["cosyvoice-v3-plus-myvoice-x"])],
) -> str:
    if voice_id in _NO_VOICES:
        raise HTTPException(405, headers={"Allow": "POST" if voice_id == "create" else "GET"})
    return voice_id


VoiceId = Annotated[str, Depends(_cloned_voice_id)]


def _body(request: type[AudioUrlField], example: dict[str, Any]) -> dict[str, Any]:
    """The two forms of a request, which FastAPI can't describe on one route by itself."""
    described = request.model_json_schema()
    fields: dict[str, Any] = described["properties"]
    file = {"type": "string", "format": "binary", "description": "音频样本（WAV 16bit、MP3、M4A，10~60秒，≤10MB）"}
    text_fields = {name: field for name, field in fields.items() if name not in {"audio_url", "language_hints"}}
    form = {name: {**field, "minLength": 1} for name, field in text_fields.items()}  # an empty one counts as none
    if "language_hints" in fields:
        # Swagger fills a field in with its default: one that is empty is not sent on.
        form["language_hints"] = {
            "type": "string",
            "default": "",
            "pattern": _HINTS_IN_FORM,
            "description": f"{fields['language_hints']['description']}；逗号分隔",
        }
    required = described.get("required", [])
    as_form = {"type": "object", "required": [*required, "file"], "properties": {**form, "file": file}}
    text = fields["audio_url"].pop("anyOf")[0]
    url = {**text, **fields["audio_url"], "minLength": 1}
    as_json = {**described, "required": [*required, "audio_url"], "properties": {**fields, "audio_url": url}}
    return {
        "required": True,
        "content": {
            "application/json": {"schema": as_json, "example": example},
            "multipart/form-data": {"schema": as_form},
        },
    }


@router.post(
    "/create",
    summary="创建复刻音色",
    description=(
        "用一段录音复刻声音，免费。\n\n"
        "- JSON 提供 `audio_url`，或表单上传 `file`，二选一；\n"
        "- 样本：WAV（16 位）、MP3 或 M4A，按内容而不是文件名判断；5 到 60 秒（推荐 10~20 秒），不低于 16 kHz，"
        "单声道或双声道，最大 10 MB；至少 5 秒连续清晰的朗读，无背景音；\n"
        "- 样本私有保存，任何人都无法从本服务下载，音色删除后随之删除；\n"
        "- 新音色的状态为 `DEPLOYING`，用 `GET /api/audio/voice/{voice_id}?wait=30` 等到 `OK` 后即可合成；\n"
        "- 百炼没有及时响应时不会重复创建：会在百炼的音色列表中查找已创建的音色。"
    ),
    responses=error_answers(400, 401, 403, 404, 409, 429, 502, 503, 504),
    openapi_extra={
        "requestBody": _body(
            CloningRequest,
            {
                "target_model": "cosyvoice-v3-plus",
                "prefix": "myvoice",
                "audio_url": "https://your-bucket.oss-cn-beijing.aliyuncs.com/audio/sample.mp3",
            },
        )
    },
)
async def create_voice(
    services: ServicesDep, user: CurrentUser, request: Request, response: Response, key: IdempotencyHeader = None
) -> Envelope[CreatedVoice]:
    """Clone a voice."""
    asked, audio = await read_upload(request, CloningRequest, services.decoding)
    name = await name_upload(key, "voice/create", asked, audio)
    order = CloningOrder(asked.target_model, asked.prefix, tuple(asked.language_hints or ()))
    done, is_repeat = await services.repeats.once(
        user.id,
        name,
        lambda: services.cloning.create(user.id, order, audio, name),
        services.cloning.recall,
        is_answered=lambda call: has_ended(call) or bool(call.enrollment and call.enrollment.voice_id),
        otherwise=audio.close,
        has_left=request.is_disconnected,
    )
    tell_repeat(response, is_repeat)
    return Envelope(
        data=CreatedVoice(
            voice_id=done.voice_id, status=done.status, target_model=done.target_model, record_id=done.record_id
        )
    )


@router.get(
    "/list",
    summary="复刻音色列表",
    description=(
        "分页查询当前 API Key 所属账号的复刻音色，最新的在前，可按前缀和模型筛选。"
        "在别处用同一账号创建或删除的音色，一两分钟内可见。"
    ),
    responses=error_answers(400, 401, 403, 404, 429, 502, 503, 504),
)
async def list_voices(
    services: ServicesDep,
    user: CurrentUser,
    prefix: Annotated[str, Query(description="按前缀筛选")] = "",
    page: Annotated[int, Query(description="页码，从0开始", ge=0, le=1_000_000)] = 0,
    page_size: Annotated[int, Query(description="每页数量", ge=1, le=1000)] = 10,
    model: Annotated[str, Query(description="按目标模型筛选", examples=["cosyvoice-v3-flash"])] = "",
) -> Envelope[VoiceList]:
    """List the account's cloned voices."""
    found = await services.voices.page(user.id, page, page_size, prefix or None, model or None)
    voices = [_shown(voice, services.settings.zone) for voice in found.voices]
    return Envelope(data=VoiceList(total=found.total, voices=voices))


@router.get(
    "/{voice_id}",
    summary="查询指定音色",
    description=(
        "获取指定音色的详细信息。`wait` 大于 0 时，状态离开 `DEPLOYING` 立即返回，否则最多等待这么多秒，"
        "用于代替反复轮询；提前断开连接即停止等待。"
    ),
    responses=error_answers(400, 401, 403, 404, 429, 502, 504),
)
async def get_voice(
    services: ServicesDep,
    user: CurrentUser,
    request: Request,
    voice_id: VoiceId,
    wait: Annotated[int, Query(description="最多等待的秒数", ge=0, le=MAX_WAIT_SECONDS, examples=[30])] = 0,
) -> Envelope[VoiceDetail]:
    """Look at a cloned voice, or wait until it is ready or rejected."""
    looking = services.voices.get(user.id, voice_id, wait)
    voice = await (while_connected(request, looking) if wait else looking)
    shown = _shown(voice, services.settings.zone)
    return Envelope(data=VoiceDetail(**shown.model_dump(), resource_link=voice.resource_link or ""))


@router.put(
    "/{voice_id}",
    summary="更新音色",
    description="用新的音频样本更新音色，要求同创建。更新后重新审核，状态回到 `DEPLOYING`；旧样本随之删除。",
    responses=error_answers(400, 401, 403, 404, 429, 502, 504),
    openapi_extra={
        "requestBody": _body(
            UpdateRequest, {"audio_url": "https://your-bucket.oss-cn-beijing.aliyuncs.com/audio/sample.mp3"}
        )
    },
)
async def update_voice(
    services: ServicesDep, user: CurrentUser, request: Request, voice_id: VoiceId
) -> Envelope[UpdatedVoice]:
    """Make a voice anew of another sample."""
    _, audio = await read_upload(request, UpdateRequest, services.decoding)
    voice = await services.voices.update(user.id, voice_id, audio)
    return Envelope(data=UpdatedVoice(voice_id=voice.voice_id, status=voice.status))


@router.delete(
    "/{voice_id}",
    summary="删除音色",
    description="删除指定的复刻音色及其音频样本，此操作不可逆。",
    responses=error_answers(400, 401, 403, 404, 429, 502, 504),
)
async def delete_voice(services: ServicesDep, user: CurrentUser, voice_id: VoiceId) -> Envelope[None]:
    """Delete a voice."""
    await services.voices.delete(user.id, voice_id)
    return Envelope(data=None)


def _shown(voice: Voice | VoiceReport, zone: ZoneInfo) -> VoiceItem:
    model, _ = read_voice_id(voice.voice_id) or ("", "")
    return VoiceItem(
        voice_id=voice.voice_id,
        status=voice.status,
        target_model=voice.target_model or model,
        gmt_create=show_task_time(voice.created_at, zone),
        gmt_modified=show_task_time(voice.modified_at, zone),
    )
