"""What a text will cost, before anybody is asked to speak it."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends
from pydantic import BaseModel, Field

from app.errors import InvalidVoice
from app.routers.dependencies import CurrentUser, ServicesDep, limit_rate
from app.routers.envelope import Envelope, error_answers
from app.routers.fields import Text
from app.routers.long_text import LongTextRequest
from app.routers.presentation import show_amount, show_exactly

PATH = "/api/audio/tts/estimate"

router = APIRouter(tags=["语音合成"], dependencies=[Depends(limit_rate)])


class EstimateRequest(LongTextRequest):
    """要估算费用的合成请求，与合成接口相同；只有 `model` 与 `text` 必填。"""

    voice: Text = Field(default="", description="音色ID，可不填", max_length=128, examples=["longanyang"])
    stream: bool = Field(default=False, description="是否使用流式输出，不影响费用")


class SpeechEstimate(BaseModel):
    """合成的预计用量与费用。"""

    characters: int = Field(description="计费字符数；一个汉字计 2，SSML 标签不计", examples=[26])
    segments: int = Field(description="长文本合成时切割的片段数", examples=[1])
    bill: str = Field(description="预计费用（元），四舍五入到 4 位小数", examples=["0.0004"])
    amount: str = Field(description="精确的预计费用（元）", examples=["0.00037271"])
    price_per_10k_chars: str = Field(description="每万字符价格（元）", examples=["0.14335"])
    currency: str = Field(description="币种", examples=["CNY"])
    model: str = Field(description="语音合成模型", examples=["cosyvoice-v3-flash"])


_EXAMPLES: dict[str, Any] = {
    "文本": {
        "summary": "只需模型与文本",
        "value": {"model": "cosyvoice-v3-flash", "text": "你好，欢迎使用语音合成服务！"},
    },
}


@router.post(
    PATH,
    summary="费用估算",
    description=(
        "合成之前估算费用：与合成接口相同的请求体与检查，但不调用百炼、不产生记录，也不需要 API Key。"
        "字符数与切割方式与长文本合成一致；实际费用以百炼返回的用量为准。"
    ),
    responses=error_answers(400, 401, 413, 429),
)
async def estimate(
    services: ServicesDep,
    user: CurrentUser,
    asked: Annotated[EstimateRequest, Body(openapi_examples=_EXAMPLES)],
) -> Envelope[SpeechEstimate]:
    """Tell what a synthesis would cost."""
    if not asked.voice and "voice" in asked.model_fields_set:
        raise InvalidVoice("voice 不能为空，不指定音色时请去掉该参数")
    expected = await services.long_text.estimate(user.id, asked.parameters, asked.text)
    return Envelope(
        data=SpeechEstimate(
            characters=expected.characters,
            segments=expected.segments,
            bill=show_amount(expected.amount),
            amount=show_exactly(expected.amount),
            price_per_10k_chars=f"{services.prices.per_10k_characters[asked.model]:f}",
            currency=services.prices.currency,
            model=asked.model,
        )
    )
