"""What a sandbox can be told when it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

STREAMED_WAV_SIZES: Final = (0xFFFFFFFF, 0x7FFFFFFF, 0)

WordsIn = Literal["sentence-end", "task-finished"]


@dataclass(frozen=True, slots=True)
class SandboxOptions:
    """Switches of the stand-in. The defaults are fast and faithful, apart from the rate limit, which is off."""

    speed: float | None = None
    """How many times as fast as it plays audio is sent; None is as fast as it is made."""

    first_audio_seconds: float = 0.0
    """How long after its first text a task's first audio frame comes (0.2-0.8 at DashScope, §1.1)."""

    words_in: WordsIn = "sentence-end"
    """The event that word timestamps come in: the editions disagree (§1.5)."""

    last_original_text: bool = True
    """False leaves `original_text` out of the last sentence's events, as the service sometimes does (§1.5)."""

    rate_limit_per_second: int | None = None
    """run-task submissions per API key and model in any second (3 at DashScope, §1.10); None is no limit."""

    recognitions_per_minute: int | None = None
    """Synchronous recognitions, and filetrans submissions, per API key and model (100 at DashScope, §4.1, §5.1)."""

    task_requests_per_second: int | None = None
    """Requests of the task API per API key (20 at DashScope, §5.3)."""

    upload_policies_per_second: int | None = None
    """Upload policies per API key and model (100 at DashScope, §6)."""

    task_seconds: float = 1.0
    """How long an asynchronous task takes from its submission to its end, the first third of it PENDING."""

    upload_policy_seconds: int = 300
    """How long an upload policy is good for (§6)."""

    upload_max_megabytes: int = 100
    """The largest temporary file (§6)."""

    enrollments_per_second: int | None = None
    """Requests of the enrollment service per API key, all actions together (10 at DashScope, §3)."""

    voice_seconds: float = 1.0
    """How long a new or updated voice is DEPLOYING (§3)."""

    voices_per_account: int = 1000
    """How many voices an API key may have (§3)."""

    list_lag_seconds: float = 0.0
    """How far `list_voice` is behind: what it tells is as old as this."""

    idle_timeout_seconds: float = 60.0
    """A socket without a task is closed after this long (§1.7)."""

    gap_timeout_seconds: float = 23.0
    """A task fails after this much silence since its client's last text; sending audio is no silence (§1.7)."""

    oss_access_key_id: str = "sandbox-id"
    oss_access_key_secret: str = "sandbox-secret"
    oss_region: str = "cn-hangzhou"
    oss_max_object_bytes: int = 64 * 1024 * 1024
    oss_max_total_bytes: int = 512 * 1024 * 1024

    wav_header: int = 0xFFFFFFFF
    """What both sizes of a streamed WAV header say (§1.6): 0xFFFFFFFF, 0x7FFFFFFF or 0."""

    calls_kept: int = 2000
    """How many tasks `GET /_sandbox/calls`, and how many requests `GET /_sandbox/requests` remembers."""

    def __post_init__(self) -> None:
        if self.wav_header not in STREAMED_WAV_SIZES:
            raise ValueError("wav_header must be 0xFFFFFFFF, 0x7FFFFFFF or 0")
        if self.speed is not None and not self.speed > 0:
            raise ValueError("speed must be positive, or None")
        if not self.first_audio_seconds >= 0:
            raise ValueError("first_audio_seconds must not be negative")
        if self.words_in not in get_args(WordsIn):
            raise ValueError(f"words_in must be one of {', '.join(get_args(WordsIn))}")
        for limit in (
            "rate_limit_per_second",
            "recognitions_per_minute",
            "task_requests_per_second",
            "upload_policies_per_second",
            "enrollments_per_second",
        ):
            value = getattr(self, limit)
            if value is not None and value < 1:
                raise ValueError(f"{limit} must be at least 1, or None")
        if self.idle_timeout_seconds <= 0 or self.gap_timeout_seconds <= 0:
            raise ValueError("timeouts must be positive")
        if self.task_seconds < 0 or self.upload_policy_seconds < 0 or self.upload_max_megabytes < 1:
            raise ValueError("task_seconds, upload_policy_seconds and upload_max_megabytes must not be negative")
        if self.voice_seconds < 0 or self.list_lag_seconds < 0 or self.voices_per_account < 1:
            raise ValueError("voice_seconds and list_lag_seconds must not be negative, voices_per_account at least 1")
