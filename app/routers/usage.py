"""What the user's calls counted and cost."""

from datetime import date, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field

from app.routers.dependencies import CurrentUser, ServicesDep, limit_rate
from app.routers.envelope import Envelope, error_answers
from app.routers.filters import MAX_DAYS, FirstDay, LastDay, read_period
from app.routers.presentation import show_amount, show_exactly
from app.services.usage import Consumption, Grouping, total_of

router = APIRouter(prefix="/api/audio", tags=["用量"], dependencies=[Depends(limit_rate)])


class UsageTotal(BaseModel):
    """一些调用的用量与费用。"""

    calls: int = Field(description="调用次数，即历史记录的条数", examples=[3])
    characters: int = Field(description="计费字符数（语音合成）", examples=[5026])
    seconds: int = Field(description="计费秒数（语音识别）", examples=[4])
    bill: str = Field(description="费用（元），四舍五入到 4 位小数", examples=["0.0736"])
    amount: str = Field(description="精确费用（元）", examples=["0.0736477"])
    estimated_amount: str = Field(description="精确费用中估算的部分（元）：服务中断或百炼未返回用量时", examples=["0"])


class UsageGroup(UsageTotal):
    """一组调用的用量与费用。"""

    key: str = Field(description="日期、模型或类型", examples=["2026-11-01"])


class Usage(BaseModel):
    """一段时间的用量与费用。"""

    model_config = ConfigDict(validate_by_name=True)

    first: date = Field(alias="from", description="开始日期（含）", examples=["2026-11-01"])
    last: date = Field(alias="to", description="结束日期（含）", examples=["2026-11-30"])
    group_by: Grouping = Field(description="分组方式", examples=["day"])
    currency: str = Field(description="币种", examples=["CNY"])
    total: UsageTotal = Field(description="合计")
    groups: list[UsageGroup] = Field(description="各组：按日期先后，或按费用从高到低；没有调用的组不出现")


@router.get(
    "/usage",
    summary="用量统计",
    description=(
        "当前用户一段时间内的调用次数、用量与费用，按调用开始的日期统计，等于历史记录中各条费用之和；"
        f"进行中的长文本按已产生的费用计入。默认为本月至今，最多 {MAX_DAYS} 天。"
    ),
    responses=error_answers(400, 401, 429, 503),
)
async def get_usage(
    services: ServicesDep,
    user: CurrentUser,
    first: FirstDay = None,
    last: LastDay = None,
    group_by: Annotated[Grouping, Query(description="分组：day 按天、model 按模型、type 按类型")] = "day",
) -> Envelope[Usage]:
    """Sum the user's records up."""
    zone = services.settings.zone
    last = last or datetime.now(zone).date()
    first = first or last.replace(day=1)
    groups = await services.usage.sum_up(user.id, read_period(first, last, zone), group_by)
    return Envelope(
        data=Usage(
            first=first,
            last=last,
            group_by=group_by,
            currency=services.prices.currency,
            total=UsageTotal(**_shown(total_of(groups.values()))),
            groups=[UsageGroup(key=key, **_shown(group)) for key, group in groups.items()],
        )
    )


def _shown(consumption: Consumption) -> dict[str, int | str]:
    return {
        "calls": consumption.calls,
        "characters": consumption.characters,
        "seconds": consumption.seconds,
        "bill": show_amount(consumption.amount),
        "amount": show_exactly(consumption.amount),
        "estimated_amount": show_exactly(consumption.estimated_amount),
    }
