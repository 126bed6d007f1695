"""Registration and login."""

import uuid
from typing import Annotated, Literal

from fastapi import APIRouter, Form
from pydantic import BaseModel, Field

from app.routers.dependencies import ClientAddress, ServicesDep
from app.routers.envelope import Envelope, error_answers
from app.routers.fields import Text

MAX_PASSWORD_CHARS = 128

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
    password: Text = Field(
        description="密码：8 到 128 个字符",
        min_length=8,
        max_length=MAX_PASSWORD_CHARS,
        repr=False,
        examples=["correct-horse-battery"],
    )


class RegisteredUser(BaseModel):
    """新建的用户。"""

    user_id: uuid.UUID = Field(description="用户ID")
    username: str = Field(description="用户名", examples=["xiaoming"])


class AccessToken(BaseModel):
    """登录令牌：放在请求头 `Authorization: Bearer {access_token}` 中。"""

    access_token: str = Field(description="访问令牌")
    token_type: Literal["bearer"] = Field(default="bearer", description="令牌类型")
    expires_in: int = Field(description="有效时间（秒）", examples=[86400])


@router.post(
    "/register",
    summary="注册",
    description="创建一个用户。注册后用同样的用户名与密码登录。",
    responses=error_answers(400, 403, 409, 429),
)
async def register(services: ServicesDep, address: ClientAddress, form: Registration) -> Envelope[RegisteredUser]:
    """Create a user."""
    user = await services.accounts.register(form.username, form.password, address)
    return Envelope(data=RegisteredUser(user_id=user.id, username=user.username))


@router.post(
    "/login",
    summary="登录",
    description="用户名与密码换取访问令牌。连续失败过多会被暂时限制（429）。",
    responses=error_answers(400, 401, 429),
)
async def login(services: ServicesDep, address: ClientAddress, form: Login) -> Envelope[AccessToken]:
    """Exchange name and password for a token."""
    token = await services.accounts.login(form.username, form.password, address)
    return Envelope(data=AccessToken(access_token=token, expires_in=services.accounts.token_ttl_seconds))


@router.post(
    "/token",
    summary="登录（OAuth2 表单）",
    description="供 Swagger 的 Authorize 按钮使用：标准 OAuth2 密码表单与标准 OAuth2 结果，不带统一响应格式。",
    responses=error_answers(400, 401, 429),
)
async def token(
    services: ServicesDep,
    address: ClientAddress,
    username: Annotated[Text, Form(description="用户名", max_length=64)],
    password: Annotated[Text, Form(description="密码", max_length=MAX_PASSWORD_CHARS)],
    grant_type: Annotated[Literal["password"] | None, Form(description="固定为 password")] = None,
) -> AccessToken:
    """The same as login, spoken in OAuth2."""
    access_token = await services.accounts.login(username, password, address)
    return AccessToken(access_token=access_token, expires_in=services.accounts.token_ttl_seconds)
