"""A user's key with the place where it is valid (PROTOCOL §0.1)."""

import hashlib
from dataclasses import dataclass, field

WS_URLS = {
    "beijing": "wss://dashscope.aliyuncs.com/api-ws/v1/inference",
    "singapore": "wss://dashscope-intl.aliyuncs.com/api-ws/v1/inference",
}
HTTP_URLS = {
    "beijing": "https://dashscope.aliyuncs.com/api/v1",
    "singapore": "https://dashscope-intl.aliyuncs.com/api/v1",
}


@dataclass(frozen=True, slots=True)
class Credential:
    """A key, and the addresses that take it. WebSockets are never shared between two of these.

    Several users may have the same; `user` says for whom it is used now, and makes no difference between two.
    """

    api_key: str = field(repr=False)
    ws_url: str
    http_url: str
    workspace: str | None = None
    region: str = "beijing"
    user: str = field(default="", compare=False)

    @property
    def fingerprint(self) -> str:
        """A name for the key that does not give it away."""
        return hashlib.sha256(self.api_key.encode()).hexdigest()[:32]

    @property
    def account(self) -> str:
        """A name for what this key reaches at the provider: voices belong to it."""
        reached = "\n".join((self.api_key, self.http_url, self.workspace or ""))
        return hashlib.sha256(reached.encode()).hexdigest()[:32]

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries (PROTOCOL §0.2)."""
        headers = {"Authorization": f"Bearer {self.api_key}"}
        if self.workspace:
            headers["X-DashScope-WorkSpace"] = self.workspace
        return headers
