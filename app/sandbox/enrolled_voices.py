"""The voices that accounts have enrolled (PROTOCOL.md §3), and which of them may speak (§1.9).

A voice remembers what became of it when, so that a list can tell of the past: `list_lag_seconds`.
"""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

from app.sandbox.envelope import ServiceError
from app.sandbox.options import SandboxOptions
from app.sandbox.tasks import BEIJING
from app.sandbox.voice_catalog import Voice

Status = Literal["DEPLOYING", "OK", "UNDEPLOYED"]
SampleSource = Literal["oss", "storage", "elsewhere", "design", "made"]

_LOWEST_HEIGHT, _HEIGHTS = 90, 200
_LOWEST_FEMALE: Final = 165


@dataclass(frozen=True, slots=True)
class Sample:
    """What a voice was made from. `height` is its fundamental frequency in Hz, if it was heard."""

    source: SampleSource
    url: str = ""
    content: bytes = b""
    format: str = "wav"
    height: float | None = None
    rejected: bool = False
    sample_id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True, slots=True)
class Design:
    """What a designed voice was asked to be."""

    voice_prompt: str
    preview_text: str


@dataclass(frozen=True, slots=True)
class _Processing:
    """DEPLOYING from `began_at` to `ready_at`, then `outcome`."""

    began_at: datetime
    ready_at: datetime
    outcome: Status


class EnrolledVoice:
    """One voice of one account."""

    def __init__(
        self, api_key: str, target_model: str, prefix: str, sample: Sample, design: Design | None = None
    ) -> None:
        kind = "vd-" if design else ""
        self.voice_id = f"{target_model}-{kind}{prefix}-{uuid.uuid4().hex}"
        self.api_key = api_key
        self.target_model = target_model
        self.prefix = prefix
        self.sample = sample
        self.design = design
        self._processings: list[_Processing] = []
        self._deleted_at: datetime | None = None

    def process(self, seconds: float, outcome: Status) -> None:
        """Begin to make the voice from its sample."""
        now = datetime.now(UTC)
        self._processings.append(_Processing(now, now + timedelta(seconds=seconds), outcome))

    def delete(self) -> None:
        self._deleted_at = datetime.now(UTC)
        self.sample = Sample(self.sample.source)

    def was_deleted_at(self, moment: datetime) -> bool:
        return self._deleted_at is not None and self._deleted_at <= moment

    def exists_at(self, moment: datetime) -> bool:
        return self._processings[0].began_at <= moment and not self.was_deleted_at(moment)

    def status_at(self, moment: datetime) -> Status:
        processing = self._processing_at(moment)
        return processing.outcome if moment >= processing.ready_at else "DEPLOYING"

    def as_queried(self) -> dict[str, str]:
        """What `query_voice` tells, all but its `resource_link`; of a designed voice it tells more."""
        now = datetime.now(UTC)
        told = {**self._times_at(now), "target_model": self.target_model, "status": self.status_at(now)}
        return {**told, "voice_id": self.voice_id, **self._designed} if self.design else told

    def as_listed(self, moment: datetime) -> dict[str, str]:
        """The entry of `list_voice`, as things were at a moment at which the voice existed."""
        return {"voice_id": self.voice_id, **self._times_at(moment), "status": self.status_at(moment), **self._designed}

    def _times_at(self, moment: datetime) -> dict[str, str]:
        return {
            "gmt_create": _beijing(self._processings[0].began_at),
            "gmt_modified": _beijing(self._processing_at(moment).began_at),
        }

    @property
    def _designed(self) -> Mapping[str, str]:
        """What only a designed voice tells."""
        if self.design is None:
            return {}
        return {"voice_prompt": self.design.voice_prompt, "preview_text": self.design.preview_text}

    def as_speaker(self) -> Voice:
        """How the voice speaks: as high as its sample, or as a fingerprint of its id says where none was heard."""
        modern = self.target_model != "cosyvoice-v1"
        height = self.sample.height or _LOWEST_HEIGHT + zlib.crc32(self.voice_id.encode()) % _HEIGHTS
        gender = "male" if height < _LOWEST_FEMALE else "female"
        return Voice(self.voice_id, gender=gender, cloned=True, ssml=modern, timestamp=modern, height=height)

    def _processing_at(self, moment: datetime) -> _Processing:
        return next(processing for processing in reversed(self._processings) if processing.began_at <= moment)


class VoiceBook:
    """Every account's voices; an account is an API key."""

    def __init__(self, options: SandboxOptions) -> None:
        self._limit = options.voices_per_account
        self._lag = timedelta(seconds=options.list_lag_seconds)
        self._voices: dict[str, EnrolledVoice] = {}

    def require_room(self, api_key: str) -> None:
        """A `ServiceError` if the account has all the voices it may have (§3)."""
        now = datetime.now(UTC)
        if sum(voice.exists_at(now) for voice in self._of(api_key)) >= self._limit:
            raise ServiceError(400, "Throttling.AllocationQuota", f"您当前的配额为{self._limit}")

    def add(self, voice: EnrolledVoice) -> None:
        """Keep a voice that is being processed already."""
        self._voices[voice.voice_id] = voice

    def delete(self, voice: EnrolledVoice) -> None:
        """Take a voice away at once, and forget those that no list tells of any more."""
        voice.delete()
        moment = datetime.now(UTC) - self._lag
        self._voices = {voice_id: each for voice_id, each in self._voices.items() if not each.was_deleted_at(moment)}

    def find(self, voice_id: str, api_key: str | None = None) -> EnrolledVoice | None:
        """A voice that exists, of this account only if `api_key` is given."""
        voice = self._voices.get(voice_id)
        if voice is None or not voice.exists_at(datetime.now(UTC)) or api_key not in (None, voice.api_key):
            return None
        return voice

    def page(self, api_key: str, prefix: str | None, index: int, size: int) -> list[dict[str, str]]:
        """One page of the account's voices as `list_voice` knows them, the newest first."""
        moment = datetime.now(UTC) - self._lag
        known = [
            voice for voice in reversed(self._of(api_key)) if voice.exists_at(moment) and prefix in (None, voice.prefix)
        ]
        return [voice.as_listed(moment) for voice in known[index * size : (index + 1) * size]]

    def existing(self, api_key: str | None) -> list[EnrolledVoice]:
        """Every voice there is now, the oldest first; of one account if `api_key` is given."""
        now = datetime.now(UTC)
        voices = self._voices.values() if api_key is None else self._of(api_key)
        return [voice for voice in voices if voice.exists_at(now)]

    def speaker(self, api_key: str, model: str, voice_id: str) -> Voice | None:
        """A voice that may speak for this account through this model: only one that is OK (§1.9, §3)."""
        voice = self.find(voice_id, api_key)
        if voice is None or voice.target_model != model or voice.status_at(datetime.now(UTC)) != "OK":
            return None
        return voice.as_speaker()

    def _of(self, api_key: str) -> list[EnrolledVoice]:
        return [voice for voice in self._voices.values() if voice.api_key == api_key]


def _beijing(moment: datetime) -> str:
    """A time as this service writes it: Beijing's clock, no zone."""
    return f"{moment.astimezone(BEIJING):%Y-%m-%d %H:%M:%S}"
