"""The user's own account and DashScope key."""

import uuid
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field, field_validator

from app.models import ApiKey
from app.routers.auth import LoginTokens, show_tokens
from app.routers.dependencies import ClientAddress, CurrentUser, CurrentVisitor, ServicesDep
from app.routers.envelope import Envelope, error_answers
from app.routers.fields import MAX_PASSWORD_CHARS, NewPassword, Text
from app.routers.presentation import show_time

router = APIRouter(prefix="/api/user", tags=["账号"])


class Profile(BaseModel):
    """当前用户。"""

    user_id: uuid.UUID = Field(description="用户ID")
    username: str = Field(description="用户名", examples=["xiaoming"])
    has_api_key: bool = Field(description="是否已配置百炼 API Key")
    is_admin: bool = Field(description="是否为管理员")
    created_at: str = Field(description="注册时间", examples=["2025-12-30T10:30:00"])


class Farewell(BaseModel):
    """注销的结果。"""

    deleted: bool = Field(default=True, description="账号已注销：登录令牌与用户名立即失效", examples=[True])
    pending: bool = Field(
        description="是否仍有数据在后台删除：有调用正在进行，或对象存储、数据库暂时不可用", examples=[False]
    )


class PasswordForm(BaseModel):
    """当前密码与新密码。"""

    current_password: Text = Field(
        description="当前密码",
        min_length=1,
        max_length=MAX_PASSWORD_CHARS,
        repr=False,
        examples=["correct-horse-battery"],
    )
    new_password: NewPassword


class ApiKeyForm(BaseModel):
    """要保存的百炼 API Key。"""

    api_key: str = Field(
        description="百炼 API Key，以 sk- 开头；加密保存，之后只显示掩码",
        pattern=r"^sk-[A-Za-z0-9._-]{3,253}$",
        repr=False,
        examples=["sk-test-0123456789abcdef"],
    )
    region: Literal["beijing", "singapore"] = Field(default="beijing", description="密钥所属地域")
    workspace: str | None = Field(
        default=None,
        description="业务空间ID，可不填",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$",
        examples=["llm-abcdef123456"],
    )

    @field_validator("api_key", mode="before")
    @classmethod
    def _without_stray_blanks(cls, value: object) -> object:
        return value.strip() if isinstance(value, str) else value


class StoredApiKey(BaseModel):
    """已保存的 API Key，只显示掩码。"""

    masked: str = Field(description="掩码后的密钥", examples=["sk-****cdef"])
    region: str = Field(description="密钥所属地域", examples=["beijing"])
    updated_at: str = Field(description="保存时间", examples=["2025-12-30T10:30:00"])


@router.get("/me", summary="当前用户", description="查看当前登录的用户。", responses=error_answers(401))
async def me(services: ServicesDep, user: CurrentUser) -> Envelope[Profile]:
    """Show who is logged in."""
    return Envelope(
        data=Profile(
            user_id=user.id,
            username=user.username,
            has_api_key=await services.accounts.has_api_key(user.id),
            is_admin=user.is_admin,
            created_at=show_time(user.created_at, services.settings.zone),
        )
    )


@router.put(
    "/password",
    summary="修改密码",
    description=(
        "需要当前密码；成功后所有登录（包括当前的）立即失效，请改用返回的新令牌。"
        "当前密码错误返回 400 `WRONG_PASSWORD`，连续失败过多会被暂时限制（429）；"
        "太容易被猜到的新密码返回 400 `WEAK_PASSWORD`。"
    ),
    responses=error_answers(400, 401, 429),
)
async def put_password(
    services: ServicesDep, visitor: CurrentVisitor, address: ClientAddress, form: PasswordForm
) -> Envelope[LoginTokens]:
    """Replace the password."""
    tokens = await services.logins.change_password(visitor, form.current_password, form.new_password, address)
    return Envelope(data=show_tokens(tokens))


@router.delete(
    "/me",
    summary="注销账号",
    description=(
        "删除当前用户及其全部数据：API Key、历史记录、账单、文本、转写结果、音频、字幕与声音样本，不可恢复。"
        "所有登录令牌立即失效，用户名可重新注册；正在进行的长文本合成会停止，转写任务与复刻不再跟踪。"
        "一般在数秒内删除完毕；若有调用正在进行或对象存储不可用，`pending` 为 `true`，其余数据稍后在后台删除。"
        "音频文件在一天后会再删除一次，以清除当时仍在上传的副本。\n\n"
        "已复刻的音色以及已提交给百炼的任务属于您自己的百炼账号，不会被删除，百炼仍可能对已提交的任务计费；"
        "不需要的音色请在注销前用 `DELETE /api/audio/voice/{voice_id}` 删除。"
    ),
    responses=error_answers(401, 503),
)
async def delete_me(services: ServicesDep, user: CurrentUser) -> Envelope[Farewell]:
    """Erase the user."""
    return Envelope(data=Farewell(pending=not await services.erasure.erase(user.id)))


@router.put(
    "/apikey",
    summary="保存 API Key",
    description=(
        "保存或替换百炼 API Key。密钥加密保存，之后不再显示原文。"
        "`verify=true` 时先向百炼验证，无效则不保存；验证次数有限制（429）。"
    ),
    responses=error_answers(400, 401, 429, 502, 504),
)
async def put_api_key(
    services: ServicesDep,
    user: CurrentUser,
    form: ApiKeyForm,
    verify: Annotated[bool, Query(description="保存前先向百炼验证密钥（不产生费用）")] = False,
) -> Envelope[StoredApiKey]:
    """Seal and keep a key."""
    if verify:  # or stolen keys could be tried out here
        await services.limiter.check(services.settings.login_limit, "verify", str(user.id))
    row = await services.accounts.store_api_key(user.id, form.api_key, form.region, form.workspace, verify=verify)
    return Envelope(data=_shown(row, services.settings.zone))


@router.get(
    "/apikey",
    summary="查看 API Key",
    description="查看已保存的密钥的掩码。未配置时返回 403 `NO_API_KEY`。",
    responses=error_answers(401, 403),
)
async def get_api_key(services: ServicesDep, user: CurrentUser) -> Envelope[StoredApiKey]:
    """Show the mask of the stored key."""
    return Envelope(data=_shown(await services.accounts.show_api_key(user.id), services.settings.zone))


@router.delete(
    "/apikey",
    summary="删除 API Key",
    description="删除已保存的密钥；没有配置过也返回成功。",
    responses=error_answers(401),
)
async def delete_api_key(services: ServicesDep, user: CurrentUser) -> Envelope[None]:
    """Forget the stored key."""
    await services.accounts.delete_api_key(user.id)
    return Envelope(data=None)


def _shown(row: ApiKey, zone: ZoneInfo) -> StoredApiKey:
    return StoredApiKey(masked=row.masked, region=row.region, updated_at=show_time(row.updated_at, zone))
