"""The voices that the provider ships: spec 4.1."""

from functools import cache
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field

from app.catalog import SystemVoice, system_voices
from app.routers.dependencies import CurrentUser, ServicesDep, limit_rate
from app.routers.envelope import Envelope, error_answers

router = APIRouter(prefix="/api/audio/voice", tags=["系统音色"], dependencies=[Depends(limit_rate)])


class SystemVoiceFeatures(BaseModel):
    """系统音色支持的特性。"""

    model_config = ConfigDict(from_attributes=True)

    ssml: bool = Field(description="是否支持 SSML", examples=[True])
    instruct: bool = Field(description="是否支持 instruction（情感、场景等指令）", examples=[True])
    timestamp: bool = Field(description="是否支持时间戳", examples=[False])


class SystemVoiceInfo(BaseModel):
    """系统音色。"""

    model_config = ConfigDict(from_attributes=True)

    voice_id: str = Field(description="音色ID，用作合成时的 `voice`", examples=["longanyang"])
    name: str = Field(description="音色名称", examples=["龙安洋"])
    trait: str = Field(description="音色特质", examples=["阳光大男孩"])
    age: str | None = Field(description="年龄；`cosyvoice-v2` 的音色没有年龄，为 null", examples=["20~30岁"])
    category: str = Field(description="适用场景", examples=["社交陪伴"])
    languages: list[str] = Field(description="支持的语言", examples=[["中文(普通话)", "英文"]])
    models: list[str] = Field(
        description="可以使用该音色的模型", examples=[["cosyvoice-v3-flash", "cosyvoice-v3-plus"]]
    )
    features: SystemVoiceFeatures = Field(description="支持的特性")


@router.get(
    "/system",
    summary="系统音色列表",
    description=(
        "获取可用的系统音色。\n\n"
        "- 不需要配置 API Key；配置了新加坡地域的 API Key 时，只列出该地域可用的音色与模型；\n"
        "- 筛选条件可以组合，同时满足才会列出；空的条件不起作用，没有符合的音色时返回空列表。"
    ),
    responses=error_answers(400, 401, 429),
)
async def list_system_voices(
    services: ServicesDep,
    user: CurrentUser,
    model: Annotated[
        str,
        Query(description="按模型筛选：`cosyvoice-v3-flash`、`cosyvoice-v3-plus`、`cosyvoice-v2`"),
    ] = "",
    category: Annotated[
        str, Query(description="按场景筛选：社交陪伴、童声、客服、语音助手、有声书、方言、出海营销等")
    ] = "",
    language: Annotated[
        str,
        Query(
            description=(
                "按语言筛选：代码（zh、yue、en、ja、ko、id 等）或名称（英文、中文(四川话)、美式英语等）；"
                "zh 包括所有方言，en 包括英式与美式"
            ),
            max_length=64,
        ),
    ] = "",
    feature: Annotated[str, Query(description="按特性筛选：`ssml`、`instruct`、`timestamp`", max_length=64)] = "",
    q: Annotated[
        str,
        Query(
            description="搜索音色ID、名称、特质、年龄、场景与语言，不区分大小写；多个词用空格隔开，必须都出现",
            max_length=100,
        ),
    ] = "",
) -> Envelope[list[SystemVoiceInfo]]:
    """List the system voices of the region of the user's key."""
    region = await services.accounts.region(user.id)
    found = system_voices(region, model=model, category=category, language=language, feature=feature, q=q)
    return Envelope(data=[_shown(voice) for voice in found])


@cache
def _shown(voice: SystemVoice) -> SystemVoiceInfo:
    return SystemVoiceInfo.model_validate(voice)
