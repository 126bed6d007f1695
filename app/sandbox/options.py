"""What a sandbox can be told when it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

STREAMED_WAV_SIZES: Final = (0xFFFFFFFF, 0x7FFFFFFF, 0)


@dataclass(frozen=True, slots=True)
class SandboxOptions:
    """Switches of the stand-in. The defaults are fast and faithful, apart from the rate limit, which is off."""

    realtime: bool = False
    """Send audio as fast as it would be played, instead of as fast as it is made."""

    rate_limit_per_second: int | None = None
    """run-task submissions per API key and model in any second (3 at DashScope, §1.10); None is no limit."""

    idle_timeout_seconds: float = 60.0
    """A socket without a task is closed after this long (§1.7)."""

    gap_timeout_seconds: float = 23.0
    """A task whose client sends no text for this long, while no audio is sent, fails (§1.7)."""

    oss_access_key_id: str = "sandbox-id"
    oss_access_key_secret: str = "sandbox-secret"
    oss_region: str = "cn-hangzhou"
    oss_max_object_bytes: int = 64 * 1024 * 1024
    oss_max_total_bytes: int = 512 * 1024 * 1024

    wav_header: int = 0xFFFFFFFF
    """What both sizes of a streamed WAV header say (§1.6): 0xFFFFFFFF, 0x7FFFFFFF or 0."""

    calls_kept: int = 2000
    """How many tasks `GET /_sandbox/calls` remembers."""

    def __post_init__(self) -> None:
        if self.wav_header not in STREAMED_WAV_SIZES:
            raise ValueError("wav_header must be 0xFFFFFFFF, 0x7FFFFFFF or 0")
        if self.rate_limit_per_second is not None and self.rate_limit_per_second < 1:
            raise ValueError("rate_limit_per_second must be at least 1, or None")
        if self.idle_timeout_seconds <= 0 or self.gap_timeout_seconds <= 0:
            raise ValueError("timeouts must be positive")
