"""Names of hosts and of web origins, as settings and headers write them: pure."""

import re
from collections.abc import Iterable
from ipaddress import AddressValueError, IPv6Address
from urllib.parse import urlsplit

EVERY = "*"
LOOPBACK = ("localhost", "127.0.0.1", "::1")

_NAME = re.compile(r"[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*", re.ASCII)
_HOST_AND_PORT = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::\d{0,5})?", re.ASCII)
_DEFAULT_PORTS = {"http": 80, "https": 443}


def host_name(written: str) -> str:
    """One spelling for all of a host's: in ASCII, lower case, no dot at its end, IPv6 short and without brackets.

    Raises ValueError for what is no host.
    """
    if written.startswith("[") and written.endswith("]"):
        return _ipv6(written[1:-1], written)
    if ":" in written:
        return _ipv6(written, written)
    try:
        name = written.lower().removesuffix(".").encode("idna").decode()
    except UnicodeError:
        name = ""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{written!r} is not the name or address of a host")
    return name


def host_pattern(written: str) -> str:
    """A host, or `*.` in front of one for all below it, or `*` for all. Raises ValueError."""
    if written == EVERY:
        return EVERY
    if written.startswith("*."):
        return f"*.{host_name(written[2:])}"
    return host_name(written)


def asked_host(header: str) -> str | None:
    """The host that a `Host` header names, without its port; None for what no browser sends."""
    parts = _HOST_AND_PORT.fullmatch(header) if header.isascii() else None
    try:
        return host_name(parts[1]) if parts else None
    except ValueError:
        return None


def is_among(host: str, patterns: Iterable[str]) -> bool:
    """Whether a host is one of these, or below one that begins with `*.`."""
    return any(
        pattern == EVERY or (host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern)
        for pattern in patterns
    )


def origin(written: str) -> str:
    """A web origin as browsers send it: lower case, no port where it is the scheme's own.

    Raises ValueError for everything but `scheme://host[:port]` of http and https; one slash at the end is let pass.
    """
    complaint = f"{written!r} is not an origin such as https://voice.example.com"
    parts = urlsplit(written.removesuffix("/"))
    try:
        port = parts.port
        host = host_name(parts.hostname or "")
    except ValueError:
        raise ValueError(complaint) from None
    shown = f"[{host}]" if ":" in host else host
    made = f"{parts.scheme}://{shown}" + ("" if port in {None, _DEFAULT_PORTS.get(parts.scheme)} else f":{port}")
    plain = f"{parts.scheme}://{parts.netloc}"
    is_whole = plain.lower() == written.removesuffix("/").lower() and "@" not in written
    if parts.scheme not in _DEFAULT_PORTS or not is_whole or parts.netloc.endswith(":"):
        raise ValueError(complaint)
    return made


def _ipv6(address: str, written: str) -> str:
    try:
        return IPv6Address(address).compressed
    except AddressValueError:
        raise ValueError(f"{written!r} is not the name or address of a host") from None
