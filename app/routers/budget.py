"""What the user allows himself to spend in a month."""

import json
import re
from collections.abc import Callable, Coroutine
from decimal import Decimal
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from app.columns import BUDGET_DECIMALS
from app.routers.dependencies import CurrentUser, ServicesDep
from app.routers.envelope import Envelope, error_answers
from app.routers.presentation import show_exactly
from app.services.budgets import Budget

MAX_MONTHLY = 100_000_000
_SMALLEST = Decimal(1).scaleb(-BUDGET_DECIMALS)
_WRITTEN = re.compile(r"[0-9]{1,20}(?:\.[0-9]{1,20})?")
_DESCRIBED = {
    "anyOf": [
        {"type": "number", "minimum": 0, "maximum": MAX_MONTHLY},
        {"type": "string", "pattern": r"^0{0,11}(100000000(\.0{1,20})?|[0-9]{1,8}(\.[0-9]{1,8}0{0,12})?)$"},
    ]
}


class _ExactRequest(Request):
    async def json(self) -> Any:
        """The body, with its numbers as they are written."""
        return json.loads(await self.body(), parse_float=Decimal)


class _ExactRoute(APIRoute):
    """A route that reads amounts of money in JSON to their last digit."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_exactly(request: Request) -> Response:
            return await handle(_ExactRequest(request.scope, request.receive))

        return handle_exactly


router = APIRouter(prefix="/api/user/budget", tags=["账号"], route_class=_ExactRoute)


def _read_amount(value: object) -> Decimal:
    """An amount from a string or a number as it was written. Raises ValueError for what is none."""
    is_number = isinstance(value, int | Decimal) and not isinstance(value, bool)
    is_written = isinstance(value, str) and _WRITTEN.fullmatch(value)
    amount = Decimal(str(value)) if is_number or is_written else Decimal("NaN")
    if not (amount.is_finite() and 0 <= amount <= MAX_MONTHLY and amount % _SMALLEST == 0):
        raise ValueError(f"必须是 0 到 {MAX_MONTHLY} 之间的金额，最多 {BUDGET_DECIMALS} 位小数")
    return abs(amount)


class BudgetForm(BaseModel):
    """要设置的预算。"""

    model_config = ConfigDict(strict=True)

    monthly: Annotated[Decimal, BeforeValidator(_read_amount), WithJsonSchema(_DESCRIBED)] = Field(
        description=f"每月预算（元），字符串或数字，最多 {BUDGET_DECIMALS} 位小数；0 表示不允许任何付费调用",
        examples=["10.00"],
    )


class BudgetState(BaseModel):
    """本月预算的使用情况；金额都是精确值。"""

    monthly: str | None = Field(description="每月预算（元）；未设置时为 null", examples=["10"])
    month: str = Field(description="当前月份", examples=["2026-11"])
    spent: str = Field(description="本月已产生的费用（元）", examples=["0.0717"])
    reserved: str = Field(description="为进行中的调用预留的费用（元）", examples=["0"])
    remaining: str | None = Field(description="还可使用的金额（元）；未设置预算时为 null", examples=["9.9283"])
    currency: str = Field(description="币种", examples=["CNY"])


@router.get(
    "",
    summary="查看预算",
    description="当前用户的每月预算与本月的使用情况。月份按服务时区计算，费用计入调用开始的月份。",
    responses=error_answers(401, 503),
)
async def get_budget(services: ServicesDep, user: CurrentUser) -> Envelope[BudgetState]:
    """Show how the user's month stands."""
    return _shown(await services.budgets.show(user.id), services.prices.currency)


@router.put(
    "",
    summary="设置预算",
    description=(
        "设置每月预算，立即生效。会超出预算的付费调用在请求百炼之前以 403 `BUDGET_EXCEEDED` 拒绝，"
        "同时进行的调用一并计算。"
        "事先不知道时长的音频按已知的部分计算。"
    ),
    responses=error_answers(400, 401, 503),
)
async def put_budget(services: ServicesDep, user: CurrentUser, form: BudgetForm) -> Envelope[BudgetState]:
    """Set the user's budget."""
    return _shown(await services.budgets.set(user.id, form.monthly), services.prices.currency)


@router.delete(
    "",
    summary="取消预算",
    description="不再限制费用；没有设置过也返回成功。",
    responses=error_answers(401, 503),
)
async def delete_budget(services: ServicesDep, user: CurrentUser) -> Envelope[BudgetState]:
    """Remove the user's budget."""
    return _shown(await services.budgets.set(user.id, None), services.prices.currency)


def _shown(budget: Budget, currency: str) -> Envelope[BudgetState]:
    return Envelope(
        data=BudgetState(
            monthly=None if budget.monthly is None else show_exactly(budget.monthly),
            month=budget.month,
            spent=show_exactly(budget.spent),
            reserved=show_exactly(budget.reserved),
            remaining=None if budget.remaining is None else show_exactly(budget.remaining),
            currency=currency,
        )
    )
