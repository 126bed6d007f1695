"""What routes ask for by name: the services, the user who is logged in, the address he comes from."""

from typing import Annotated

from fastapi import Depends, Query, Request
from fastapi.security import OAuth2PasswordBearer

from app.errors import Unauthorized
from app.models import User
from app.services import Services

_bearer = OAuth2PasswordBearer(tokenUrl="/api/auth/token", auto_error=False, description="用户名与密码登录")


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_services)]


async def _current_user(services: ServicesDep, token: Annotated[str | None, Depends(_bearer)]) -> User:
    if not token:
        raise Unauthorized
    return await services.accounts.authenticate(token)


CurrentUser = Annotated[User, Depends(_current_user)]


async def _current_listener(
    services: ServicesDep,
    header: Annotated[str | None, Depends(_bearer)],
    token: Annotated[str | None, Query(description="登录令牌，供不能带请求头的浏览器接口使用")] = None,
) -> User:
    user = await _current_user(services, header or token)
    await services.limiter.check(services.settings.rate_limit, "user", str(user.id))
    return user


CurrentListener = Annotated[User, Depends(_current_listener)]
"""The user behind a call that a browser makes without headers."""


async def limit_rate(services: ServicesDep, user: CurrentUser) -> None:
    """Refuse a user's calls beyond `RATE_LIMIT`."""
    await services.limiter.check(services.settings.rate_limit, "user", str(user.id))


def client_address(request: Request) -> str:
    """The address that the connection comes from."""
    return request.client.host if request.client else "unknown"


ClientAddress = Annotated[str, Depends(client_address)]
