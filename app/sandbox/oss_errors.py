"""Refusals of the object storage, as OSS words them."""

from __future__ import annotations

from xml.sax.saxutils import escape


class OssError(Exception):
    """One refusal: HTTP status, OSS code and message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{status} {code}")
        self.status = status
        self.code = code
        self.message = message

    def as_xml(self, request_id: str, host: str) -> bytes:
        """The body that OSS sends with a refusal."""
        fields = {"Code": self.code, "Message": self.message, "RequestId": request_id, "HostId": host}
        elements = "".join(f"\n  <{name}>{escape(value)}</{name}>" for name, value in fields.items())
        return f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>{elements}\n</Error>\n'.encode()
