"""Which hosts belong to the provider: those that it may name in its answers, and we then talk to."""

import re
from urllib.parse import urlsplit, urlunsplit

from app.dashscope.credential import Credential
from app.errors import UpstreamError

# Result files and upload hosts are OSS buckets (PROTOCOL §5.1, §6). Internal endpoints lead into private networks.
_BUCKET = re.compile(r"[a-z0-9-]+\.oss-(?!.*internal)[a-z0-9-]+\.aliyuncs\.com")
MAX_URL_CHARS = 8192
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def require_provider_url(url: object, credential: Credential, *, any_port: bool = False) -> str:
    """The URL as it may be called: an Alibaba bucket, then always over TLS, or the host that the calls go to.

    The port must be that of the calls too, unless `any_port` says that the host is enough. Raises UpstreamError for
    anything else.
    """
    if not isinstance(url, str) or len(url) > MAX_URL_CHARS or not url.isascii() or not url.isprintable():
        raise _strange()
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _strange() from None
    host = (parts.hostname or "").lower()
    if parts.scheme not in {"http", "https"} or parts.username is not None or parts.password is not None:
        raise _strange()
    if _BUCKET.fullmatch(host) and port in {None, 80, 443}:
        return urlunsplit(parts._replace(scheme="https", netloc=host))
    home = urlsplit(credential.http_url)
    same_host = (_same(host), parts.scheme) == (_same((home.hostname or "").lower()), home.scheme)
    if same_host and (any_port or port == home.port):
        return urlunsplit(parts)
    raise _strange()


def _same(host: str) -> str:
    return "localhost" if host in _LOOPBACK else host


def _strange() -> UpstreamError:
    return UpstreamError("百炼平台返回了不属于它的地址，为安全起见不予访问")
