"""What every check may look at."""

from dataclasses import dataclass, field

from app.dashscope import HTTP_URLS, WS_URLS, Credential, HttpClient
from app.doctor.clock import Clocks
from app.settings import Settings

DEFAULT_REGION = "beijing"


@dataclass(frozen=True, slots=True)
class Case:
    """The settings under examination, the key to try if there is one, and the clocks that were read meanwhile."""

    settings: Settings
    http: HttpClient
    api_key: str | None = field(default=None, repr=False)
    region: str | None = None
    workspace: str | None = None
    clocks: Clocks = field(default_factory=Clocks)

    @property
    def processes(self) -> int:
        """How many processes share database and limits, as far as these settings tell."""
        return self.settings.workers + (0 if self.settings.background_jobs else 1)

    def credential(self, region: str) -> Credential:
        """The key with the addresses of a region, as the product would use it."""
        return Credential(
            self.api_key or "",
            self.settings.dashscope_ws_url or WS_URLS[region],
            self.settings.dashscope_http_url or HTTP_URLS[region],
            self.workspace,
            region,
        )
