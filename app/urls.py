"""URLs that users give us and the provider fetches: public addresses only. Pure, no settings, no name lookups."""

import re
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from urllib.parse import quote

from app.errors import InvalidRequest

MAX_URL_CHARACTERS = 4096
MAX_HOST_CHARACTERS = 253
MAX_PORT = 65535

_PARTS = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[^][/?]*\]|[^][/?:]*)(?::(?P<port>[0-9]+))?(?P<rest>[/?].*)?",
    re.ASCII | re.IGNORECASE,
)
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
# Surrogates have no UTF-8; backslashes and control characters are read differently from program to program.
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\\\ud800-\udfff]")
_UNSAFE = re.compile(r"[^\x21-\x7e]+")
# What ends like a number is an IPv4 address to most programs, in octal, in hexadecimal or with parts left out.
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_LOCAL_NAMES = (
    "corp",
    "home",
    "home.arpa",
    "internal",
    "intranet",
    "lan",
    "local",
    "localdomain",
    "localhost",
    "metadata.tencentyun.com",
    "private",
)
_GLOBAL_UNICAST = IPv6Network("2000::/3")
# Within it: protocol assignments with Teredo and ORCHID, documentation, and 6to4, which carries an IPv4 address.
_SPECIAL = (
    IPv6Network("2001::/23"),
    IPv6Network("2001:db8::/32"),
    IPv6Network("2002::/16"),
    IPv6Network("3fff::/20"),
)


def require_public_url(url: str, field: str) -> str:
    """Give the URL as it may be handed to the provider.

    Plain ASCII stays as it is, byte for byte, as signatures need it. Blanks and other characters in path and query are
    percent-encoded, a host in other letters becomes punycode. Names are not looked up: it is the provider who fetches
    the URL, from its own network.

    Raises InvalidRequest, with the field's name in front, unless this is http or https, without credentials, to a host
    that is public by its spelling. An IPv4 address must be written as four decimal numbers. A fragment is refused: it
    would never reach the server, and is mostly a file name whose # should have been %23.
    """
    if len(url) > MAX_URL_CHARACTERS:
        raise InvalidRequest(f"{field} 过长，最多 {MAX_URL_CHARACTERS} 个字符")
    if _FORBIDDEN.search(url) or url != url.strip():
        raise InvalidRequest(f"{field} 不能包含控制字符、反斜杠或首尾空白，请检查后重新填写")
    if "#" in url:
        raise InvalidRequest(f"{field} 不能包含 #，文件名中的 # 请写成 %23")
    parts = _PARTS.fullmatch(url)
    if parts is None or not parts["host"]:
        if "@" in url.partition("://")[2].partition("/")[0]:
            raise InvalidRequest(f"{field} 不能包含用户名或密码，请使用公开地址或带签名的地址")
        raise InvalidRequest(f"{field} 必须是完整的 http 或 https 地址，例如 https://example.com/audio.mp3")
    if parts["port"] and not 0 < int(parts["port"]) <= MAX_PORT:
        raise InvalidRequest(f"{field} 的端口无效，应为 1 到 {MAX_PORT}")
    host = _public_host(parts["host"], field)
    port = f":{parts['port']}" if parts["port"] else ""
    rest = _UNSAFE.sub(lambda run: quote(run[0]), parts["rest"] or "")
    public = f"{parts['scheme']}://{host}{port}{rest}"
    if len(public) > MAX_URL_CHARACTERS:
        raise InvalidRequest(f"{field} 编码后过长，最多 {MAX_URL_CHARACTERS} 个字符")
    return public


def _public_host(host: str, field: str) -> str:
    """Give a host in ASCII. Raises InvalidRequest unless it is public by its spelling."""
    if "@" in host:
        raise InvalidRequest(f"{field} 不能包含用户名或密码，请使用公开地址或带签名的地址")
    try:
        if host.startswith("["):
            is_public = _is_public_ipv6(host[1:-1])
        else:
            host = _to_ascii(host)
            is_public = _is_public_name(host)
    except ValueError as error:
        raise InvalidRequest(f"{field} 的域名或 IP 地址无效，IPv4 请写成四段十进制数字") from error
    if not is_public:
        raise InvalidRequest(f"{field} 必须是公网可访问的地址，不能指向本机、内网或保留地址")
    return host


def _to_ascii(host: str) -> str:
    """Encode a name of other letters as punycode; full-width digits and dots become plain ones."""
    if len(host) > MAX_HOST_CHARACTERS:
        raise ValueError("too long")
    return host if host.isascii() else host.encode("idna").decode("ascii")


def _is_public_name(host: str) -> bool:
    """Raises ValueError for what is neither a name nor an address in its usual spelling."""
    name = host.lower().removesuffix(".")
    labels = name.split(".")
    if len(name) > MAX_HOST_CHARACTERS or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("no name")
    if _NUMBER.fullmatch(labels[-1]):
        address = IPv4Address(name)
        return address.is_global and not address.is_multicast
    return len(labels) > 1 and not any(f".{name}".endswith(f".{local}") for local in _LOCAL_NAMES)


def _is_public_ipv6(host: str) -> bool:
    """Raises ValueError for what is no address; zones exist in local networks only."""
    if "%" in host:
        return False
    address = IPv6Address(host)
    return address in _GLOBAL_UNICAST and not any(address in network for network in _SPECIAL)
