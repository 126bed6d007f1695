"""Why something could not be reached, in plain English. What libraries say goes no further: it may hold passwords."""

import errno
import socket
import ssl
from collections.abc import Iterator
from urllib.parse import urlsplit

from websockets.exceptions import InvalidHandshake

from app.errors import HandshakeTimeout, UpstreamTimeout

_ADVICE_TLS = "Install the CA certificates, check this machine's clock, and that no proxy replaces certificates."
_ADVICE_NAME = "Check the name for typing errors, and the DNS of this machine or container."
_ADVICE_REFUSED = "Nothing listens there: check host and port, and that the service runs."
_ADVICE_SILENT = "Check the address; else a firewall, a security group or a proxy drops what is sent."


def explain_failure(error: BaseException) -> tuple[str, str]:
    """What went wrong with a connection, and what to do about it."""
    causes = list(_causes(error))
    for cause in causes:
        match cause:
            case ssl.SSLCertVerificationError():
                return f"its TLS certificate is not trusted ({cause.verify_message})", _ADVICE_TLS
            case ssl.SSLError():
                return "the TLS handshake failed", f"Check that the port speaks TLS. {_ADVICE_TLS}"
            case socket.gaierror():
                return "its name is not found (DNS)", _ADVICE_NAME
            case ConnectionRefusedError():
                return "the connection was refused", _ADVICE_REFUSED
            case OSError(errno=errno.ENETUNREACH | errno.EHOSTUNREACH):
                return "there is no route to it", "Check the network of this machine, and IPv6 if the host has it."
            case ConnectionResetError():
                return "it broke the connection off", _ADVICE_SILENT
            case InvalidHandshake():
                return (
                    "it answered, but not as a WebSocket",
                    "Check the address; a proxy or another service may stand in between.",
                )
    if isinstance(error, HandshakeTimeout):
        return "no connection came up in time", _ADVICE_SILENT
    if isinstance(error, UpstreamTimeout):
        return "it took the connection but said nothing in time", _ADVICE_SILENT
    if any(isinstance(cause, TimeoutError) for cause in causes):
        return "it did not answer in time", _ADVICE_SILENT
    return f"the connection failed ({type(causes[-1]).__name__})", _ADVICE_SILENT


def name_host(url: str) -> str:
    """All of an address that may be shown: host and port."""
    return urlsplit(url).netloc.rpartition("@")[2]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The failure and everything behind it, outermost first."""
    current: BaseException | None = error
    while current is not None:
        yield current
        if isinstance(current, BaseExceptionGroup):
            current = current.exceptions[0]
        else:
            current = current.__cause__ or current.__context__
