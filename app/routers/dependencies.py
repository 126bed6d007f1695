"""What routes ask for by name: the services, the user who is logged in, the address he comes from."""

from ipaddress import IPv6Network, ip_address
from typing import Annotated

from fastapi import Depends, Query, Request
from fastapi.security import OAuth2PasswordBearer

from app.errors import AdminOnly, Unauthorized
from app.models import User
from app.services import Services
from app.services.logins import Visitor

CUSTOMER_BITS = 64

_bearer = OAuth2PasswordBearer(tokenUrl="/api/auth/token", auto_error=False, description="用户名与密码登录")


# Dependencies of dependencies are walked through again for each route: there are as few as can be.


async def _services(request: Request) -> Services:
    return _services_of(request)


def _services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_services)]
_BearerDep = Annotated[str | None, Depends(_bearer)]


async def _current_visitor(request: Request, token: _BearerDep) -> Visitor:
    known: Visitor | None = request.scope.get("visitor")
    if known is None:
        if not token:
            raise Unauthorized
        known = request.scope["visitor"] = await _services_of(request).logins.authenticate(token)
    return known


CurrentVisitor = Annotated[Visitor, Depends(_current_visitor)]
"""The user of a call, and the login that he came by."""


async def _current_user(request: Request, token: _BearerDep) -> User:
    return (await _current_visitor(request, token)).user


CurrentUser = Annotated[User, Depends(_current_user)]


async def _current_admin(user: CurrentUser) -> User:
    if not user.is_admin:
        raise AdminOnly
    return user


CurrentAdmin = Annotated[User, Depends(_current_admin)]


async def _current_listener(
    request: Request,
    header: _BearerDep,
    token: Annotated[
        str | None, Query(description="`POST /api/auth/ticket` 换取的一次性凭证，供不能带请求头的浏览器接口使用")
    ] = None,
) -> Visitor:
    services = _services_of(request)
    if token and not header:
        visitor = await services.logins.authenticate_by_url(token)
    else:
        visitor = await _current_visitor(request, header)
    await services.limiter.check(services.settings.rate_limit, "user", str(visitor.user.id))
    return visitor


CurrentListener = Annotated[Visitor, Depends(_current_listener)]
"""Who is behind a call that a browser makes without headers."""


async def limit_rate(request: Request, user: CurrentUser) -> None:
    """Refuse a user's calls beyond `RATE_LIMIT`."""
    services = _services_of(request)
    await services.limiter.check(services.settings.rate_limit, "user", str(user.id))


async def client_address(request: Request) -> str:
    """The address that the connection comes from; of IPv6 the network that one customer has to himself."""
    host = request.client.host if request.client else "unknown"
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 4:
        return str(address)
    return str(address.ipv4_mapped or IPv6Network((address, CUSTOMER_BITS), strict=False))


ClientAddress = Annotated[str, Depends(client_address)]
