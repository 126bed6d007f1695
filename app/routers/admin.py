"""What administrators do: users and invites."""

import uuid
from datetime import timedelta
from typing import Annotated
from zoneinfo import ZoneInfo

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, Field

from app.models import Invite
from app.routers.dependencies import CurrentAdmin, ServicesDep
from app.routers.envelope import Envelope, error_answers
from app.routers.fields import Text, WholeNumber
from app.routers.presentation import show_time
from app.services.administration import ListedUser

MAX_PAGE, MAX_PAGE_SIZE = 100_000, 100
MAX_INVITE_DAYS = 365

router = APIRouter(prefix="/api/admin", tags=["管理"])

UserId = Annotated[uuid.UUID, Path(description="用户ID")]
Page = Annotated[int, Query(description="页码，从1开始", ge=1, le=MAX_PAGE)]
PageSize = Annotated[int, Query(description="每页条数", ge=1, le=MAX_PAGE_SIZE)]


class ManagedUser(BaseModel):
    """管理员看到的用户；看不到其密钥、历史与音频。"""

    user_id: uuid.UUID = Field(description="用户ID")
    username: str = Field(description="用户名", examples=["xiaoming"])
    is_admin: bool = Field(description="是否为管理员")
    is_active: bool = Field(description="是否启用；停用的用户不能登录")
    has_api_key: bool = Field(description="是否已配置百炼 API Key")
    created_at: str = Field(description="注册时间", examples=["2025-12-30T10:30:00"])


class UserPage(BaseModel):
    """一页用户，最近注册的在前。"""

    total: int = Field(description="总数", examples=[1])
    page: int = Field(description="页码", examples=[1])
    page_size: int = Field(description="每页条数", examples=[20])
    items: list[ManagedUser] = Field(description="用户列表")


class UserChange(BaseModel):
    """要修改的内容；没有给出的保持不变。"""

    model_config = ConfigDict(strict=True, extra="forbid")

    is_active: bool | None = Field(
        default=None, description="`false` 停用：立即退出所有登录；`true` 重新启用", examples=[False]
    )
    is_admin: bool | None = Field(default=None, description="是否为管理员", examples=[False])


class NewSecret(BaseModel):
    """重置后的密码，只显示这一次。"""

    user_id: uuid.UUID = Field(description="用户ID")
    password: str = Field(description="新密码，请用户登录后自行修改", repr=False, examples=["correct-horse-battery"])


class InviteForm(BaseModel):
    """邀请的有效期与备注。"""

    model_config = ConfigDict(strict=True, extra="forbid")

    expires_in_days: Annotated[int, WholeNumber] = Field(
        default=7, description="有效天数", ge=1, le=MAX_INVITE_DAYS, examples=[7]
    )
    note: Text | None = Field(default=None, description="备注，仅管理员可见", max_length=200, examples=["给小明"])


class ShownInvite(BaseModel):
    """一个邀请；邀请码只在创建时显示。"""

    invite_id: uuid.UUID = Field(description="邀请ID")
    note: str | None = Field(description="备注", examples=["给小明"])
    created_at: str = Field(description="创建时间", examples=["2025-12-30T10:30:00"])
    expires_at: str = Field(description="过期时间", examples=["2026-01-06T10:30:00"])
    used_at: str | None = Field(description="使用时间，未使用时为 null", examples=["2025-12-31T10:30:00"])
    used_by: uuid.UUID | None = Field(description="用此邀请注册的用户ID，未使用或该用户已注销时为 null")


class NewInvite(ShownInvite):
    """新建的邀请与邀请码。"""

    invite_code: str = Field(
        description="邀请码，可供一人注册，只显示这一次",
        repr=False,
        examples=["invite-0123456789abcdefghijklmnopqrstuv"],
    )


class InvitePage(BaseModel):
    """一页邀请，最近创建的在前。"""

    total: int = Field(description="总数", examples=[1])
    page: int = Field(description="页码", examples=[1])
    page_size: int = Field(description="每页条数", examples=[20])
    items: list[ShownInvite] = Field(description="邀请列表")


@router.get(
    "/users",
    summary="用户列表",
    description="列出用户，可按用户名的一部分筛选。仅限管理员，其他用户得到 403 `ADMIN_ONLY`。",
    responses=error_answers(400, 401, 403),
)
async def list_users(
    services: ServicesDep,
    admin: CurrentAdmin,
    q: Annotated[
        Text | None, Query(description="用户名中包含的文字，按字面匹配", max_length=64, examples=["ming"])
    ] = None,
    page: Page = 1,
    page_size: PageSize = 20,
) -> Envelope[UserPage]:
    """Show who there is."""
    total, users = await services.administration.list_users(q, page, page_size)
    items = [_show_user(each, services.settings.zone) for each in users]
    return Envelope(data=UserPage(total=total, page=page, page_size=page_size, items=items))


@router.patch(
    "/users/{user_id}",
    summary="停用、启用用户或指定管理员",
    description=(
        "停用后该用户立即退出所有登录，不能再登录；已经开始的合成与转写会完成并计费。"
        "最后一个启用的管理员不能停用或取消（409 `LAST_ADMIN`）。"
    ),
    responses=error_answers(400, 401, 403, 404, 409),
)
async def change_user(
    services: ServicesDep, admin: CurrentAdmin, user_id: UserId, change: UserChange
) -> Envelope[ManagedUser]:
    """Shut a user out, let him back in, make him an admin or none."""
    changed = await services.administration.change(
        admin.id, user_id, is_active=change.is_active, is_admin=change.is_admin
    )
    return Envelope(data=_show_user(changed, services.settings.zone))


@router.post(
    "/users/{user_id}/reset-password",
    summary="重置密码",
    description=(
        "为用户生成新密码并显示一次，同时使其所有登录失效。请转告用户，并请其登录后用 `PUT /api/user/password` 修改。"
    ),
    responses=error_answers(400, 401, 403, 404),
)
async def reset_password(services: ServicesDep, admin: CurrentAdmin, user_id: UserId) -> Envelope[NewSecret]:
    """Give a user a new password."""
    password = await services.administration.reset_password(admin.id, user_id)
    return Envelope(data=NewSecret(user_id=user_id, password=password))


@router.post(
    "/invites",
    summary="创建邀请",
    description="生成一个邀请码，可供一人注册；在 `REGISTRATION=invite` 时需要。",
    responses=error_answers(400, 401, 403),
)
async def create_invite(services: ServicesDep, admin: CurrentAdmin, form: InviteForm) -> Envelope[NewInvite]:
    """Make an invite."""
    made = await services.registration.invite(admin.id, timedelta(days=form.expires_in_days), form.note)
    shown = _show_invite(made.invite, services.settings.zone)
    return Envelope(data=NewInvite(invite_code=made.code, **shown.model_dump()))


@router.get(
    "/invites",
    summary="邀请列表",
    description="列出邀请及其使用情况，不含邀请码。",
    responses=error_answers(400, 401, 403),
)
async def list_invites(
    services: ServicesDep, admin: CurrentAdmin, page: Page = 1, page_size: PageSize = 20
) -> Envelope[InvitePage]:
    """Show the invites."""
    total, invites = await services.registration.list_invites(page, page_size)
    items = [_show_invite(each, services.settings.zone) for each in invites]
    return Envelope(data=InvitePage(total=total, page=page, page_size=page_size, items=items))


@router.delete(
    "/invites/{invite_id}",
    summary="撤回邀请",
    description="使邀请码失效；已用它注册的用户不受影响。",
    responses=error_answers(400, 401, 403, 404),
)
async def withdraw_invite(
    services: ServicesDep, admin: CurrentAdmin, invite_id: Annotated[uuid.UUID, Path(description="邀请ID")]
) -> Envelope[None]:
    """Take an invite back."""
    await services.registration.withdraw(admin.id, invite_id)
    return Envelope(data=None)


def _show_user(listed: ListedUser, zone: ZoneInfo) -> ManagedUser:
    user = listed.user
    return ManagedUser(
        user_id=user.id,
        username=user.username,
        is_admin=user.is_admin,
        is_active=user.is_active,
        has_api_key=listed.has_api_key,
        created_at=show_time(user.created_at, zone),
    )


def _show_invite(invite: Invite, zone: ZoneInfo) -> ShownInvite:
    return ShownInvite(
        invite_id=invite.id,
        note=invite.note,
        created_at=show_time(invite.created_at, zone),
        expires_at=show_time(invite.expires_at, zone),
        used_at=show_time(invite.used_at, zone) if invite.used_at else None,
        used_by=invite.used_by,
    )
