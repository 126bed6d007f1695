"""Registration, and logins from the password to the logout."""

import uuid
from typing import Annotated, Literal

from fastapi import APIRouter, Form, Query
from pydantic import BaseModel, Field

from app.routers.dependencies import ClientAddress, CurrentVisitor, ServicesDep
from app.routers.envelope import Envelope, error_answers
from app.routers.fields import MAX_PASSWORD_CHARS, NewPassword, Text
from app.security import MAX_TOKEN_CHARS
from app.services.logins import Tokens

router = APIRouter(prefix="/api/auth", tags=["账号"])


class Login(BaseModel):
    """登录所需的用户名与密码。"""

    username: Text = Field(description="用户名", min_length=1, max_length=64, examples=["xiaoming"])
    password: Text = Field(
        description="密码", min_length=1, max_length=MAX_PASSWORD_CHARS, repr=False, examples=["correct-horse-battery"]
    )


class Registration(Login):
    """注册所需的用户名与密码。"""

    username: Text = Field(
        description="用户名：2 到 64 个字符，可用文字、数字、下划线与 . @ -",
        min_length=2,
        max_length=64,
        pattern=r"^[\w.@-]+$",
        examples=["xiaoming"],
    )
    password: NewPassword
    invite_code: Text | None = Field(
        default=None,
        description="邀请码，仅在服务只接受受邀用户（`REGISTRATION=invite`）时需要",
        max_length=128,
        repr=False,
        examples=["invite-0123456789abcdefghijklmnopqrstuv"],
    )


class RegisteredUser(BaseModel):
    """新建的用户。"""

    user_id: uuid.UUID = Field(description="用户ID")
    username: str = Field(description="用户名", examples=["xiaoming"])


class AccessToken(BaseModel):
    """登录令牌：放在请求头 `Authorization: Bearer {access_token}` 中。"""

    access_token: str = Field(description="访问令牌", repr=False)
    token_type: Literal["bearer"] = Field(default="bearer", description="令牌类型")
    expires_in: int = Field(description="有效时间（秒）", examples=[86400])


class LoginTokens(AccessToken):
    """登录的结果：访问令牌，以及用来换取新令牌的刷新令牌。"""

    refresh_token: str = Field(description="刷新令牌，只能使用一次，用于 `POST /api/auth/refresh`", repr=False)
    refresh_expires_in: int = Field(description="刷新令牌的有效时间（秒）", examples=[2592000])


class RefreshForm(BaseModel):
    """要用掉的刷新令牌。"""

    refresh_token: Text = Field(
        description="最近一次登录或刷新得到的刷新令牌",
        max_length=MAX_TOKEN_CHARS,
        repr=False,
        examples=["登录得到的 refresh_token"],
    )


class Ticket(BaseModel):
    """一次性凭证：放在 URL 的 `?token=` 中。"""

    ticket: str = Field(description="一次性凭证，只能使用一次", repr=False)
    expires_in: int = Field(description="有效时间（秒）", examples=[60])


@router.post(
    "/register",
    summary="注册",
    description=(
        "创建一个用户。注册后用同样的用户名与密码登录。太容易被猜到的密码返回 400 `WEAK_PASSWORD`；"
        "仅接受受邀用户时需要 `invite_code`，无效时返回 403 `INVALID_INVITE`。"
    ),
    responses=error_answers(400, 403, 409, 429),
)
async def register(services: ServicesDep, address: ClientAddress, form: Registration) -> Envelope[RegisteredUser]:
    """Create a user."""
    user = await services.registration.register(form.username, form.password, address, form.invite_code)
    return Envelope(data=RegisteredUser(user_id=user.id, username=user.username))


@router.post(
    "/login",
    summary="登录",
    description="用户名与密码换取访问令牌与刷新令牌。连续失败过多会被暂时限制（429）。",
    responses=error_answers(400, 401, 429),
)
async def login(services: ServicesDep, address: ClientAddress, form: Login) -> Envelope[LoginTokens]:
    """Exchange name and password for tokens."""
    return Envelope(data=show_tokens(await services.logins.login(form.username, form.password, address)))


@router.post(
    "/token",
    summary="登录（OAuth2 表单）",
    description="供 Swagger 的 Authorize 按钮使用：标准 OAuth2 密码表单与标准 OAuth2 结果，不带统一响应格式。",
    responses=error_answers(400, 401, 429),
)
async def token(
    services: ServicesDep,
    address: ClientAddress,
    username: Annotated[Text, Form(description="用户名", min_length=1, max_length=64)],
    password: Annotated[Text, Form(description="密码", min_length=1, max_length=MAX_PASSWORD_CHARS)],
    grant_type: Annotated[Literal["password"] | None, Form(description="固定为 password")] = None,
) -> AccessToken:
    """The same as login, spoken in OAuth2."""
    tokens = await services.logins.login(username, password, address)
    return AccessToken(access_token=tokens.access, expires_in=tokens.access_seconds)


@router.post(
    "/refresh",
    summary="刷新令牌",
    description=(
        "用刷新令牌换取新的访问令牌与刷新令牌，无需再次输入密码。每个刷新令牌只能使用一次："
        "再次使用说明它可能被盗，本次登录的所有令牌会立即失效。多个页面请共用同一次刷新的结果。"
    ),
    responses=error_answers(400, 401),
)
async def refresh(services: ServicesDep, form: RefreshForm) -> Envelope[LoginTokens]:
    """Exchange a refresh token for new tokens."""
    return Envelope(data=show_tokens(await services.logins.refresh(form.refresh_token)))


@router.post(
    "/logout",
    summary="退出登录",
    description="使本次登录的访问令牌、刷新令牌与凭证立即失效；`everywhere=true` 时使该用户的所有登录失效。",
    responses=error_answers(400, 401),
)
async def logout(
    services: ServicesDep,
    visitor: CurrentVisitor,
    everywhere: Annotated[bool, Query(description="是否退出所有设备上的登录")] = False,
) -> Envelope[None]:
    """End a login."""
    await services.logins.logout(visitor, everywhere=everywhere)
    return Envelope(data=None)


@router.post(
    "/ticket",
    summary="获取一次性凭证",
    description=(
        "浏览器的 WebSocket 与 EventSource 不能带请求头：用此凭证作为 URL 的 `?token=`。"
        "60 秒内有效，只能使用一次，因此即使出现在日志中也无法再用。"
    ),
    responses=error_answers(401),
)
async def ticket(services: ServicesDep, visitor: CurrentVisitor) -> Envelope[Ticket]:
    """Give what may stand in a URL."""
    secret, seconds = services.logins.ticket(visitor)
    return Envelope(data=Ticket(ticket=secret, expires_in=seconds))


def show_tokens(tokens: Tokens) -> LoginTokens:
    """What a login hands out, as clients get it."""
    return LoginTokens(
        access_token=tokens.access,
        expires_in=tokens.access_seconds,
        refresh_token=tokens.refresh,
        refresh_expires_in=tokens.refresh_seconds,
    )
