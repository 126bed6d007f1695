"""Voice cloning and design: `voice-enrollment` (PROTOCOL.md §3)."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

from starlette.requests import Request

from app.sandbox.audio_sources import Asker, AudioSources
from app.sandbox.enrolled_voices import Design, EnrolledVoice, Sample, VoiceBook
from app.sandbox.enrollment_order import (
    ENROLLMENT,
    CreateVoice,
    DeleteVoice,
    DesignVoice,
    EnrollmentOrder,
    ListVoices,
    QueryVoice,
    UpdateVoice,
    read_enrollment,
)
from app.sandbox.envelope import ServiceError, rate_exceeded, refused_parameter
from app.sandbox.hearing import Ear
from app.sandbox.options import SandboxOptions
from app.sandbox.rate_window import RateWindow
from app.sandbox.recognition_service import is_enabled
from app.sandbox.request_log import SeenRequest
from app.sandbox.sample_files import SampleFiles
from app.sandbox.service_door import Answer, read_document
from app.sandbox.spoken_audio import SpokenAudio
from app.sandbox.voice_preview import speak_preview
from app.sandbox.voice_sample import REJECTED, take_sample


class EnrollmentService:
    """Makes voices, tells of them and takes them away."""

    def __init__(
        self,
        options: SandboxOptions,
        voices: VoiceBook,
        sources: AudioSources,
        ear: Ear,
        samples: SampleFiles,
        spoken: SpokenAudio,
    ) -> None:
        self._seconds = options.voice_seconds
        self._voices = voices
        self._sources = sources
        self._ear = ear
        self._samples = samples
        self._spoken = spoken
        self._window = RateWindow(options.enrollments_per_second, 1.0)

    async def customize(self, request: Request, seen: SeenRequest) -> Answer:
        """`POST /api/v1/services/audio/tts/customization`."""
        if "x-dashscope-async" in request.headers:
            raise ServiceError(403, "AccessDenied", "current user api does not support asynchronous calls.")
        order = read_enrollment(await read_document(request, seen))
        if not self._window.take(seen.api_key):
            raise rate_exceeded()
        output = await self._obey(order, request, seen)
        if isinstance(order, CreateVoice | DesignVoice | UpdateVoice):
            seen.counted = 1
        return {"output": output, "usage": {"count": 1}}

    async def _obey(self, order: EnrollmentOrder, request: Request, seen: SeenRequest) -> dict[str, Any]:
        match order:
            case CreateVoice():
                return await self._create(order, request, seen)
            case DesignVoice():
                return await self._design(order, seen)
            case ListVoices(prefix, index, size):
                return {"voice_list": self._voices.page(seen.api_key, prefix, index, size)}
            case QueryVoice(voice_id):
                return self._told(self._find(voice_id, seen), request)
            case UpdateVoice():
                return await self._update(order, request, seen)
            case DeleteVoice(voice_id):
                self._voices.delete(self._find(voice_id, seen))
                return {}

    async def _create(self, order: CreateVoice, request: Request, seen: SeenRequest) -> dict[str, Any]:
        """A clone. With the prefix `rejected` it ends as UNDEPLOYED, whatever its sample."""
        self._voices.require_room(seen.api_key)
        sample = await self._sample(order.url, request, seen)
        self._voices.require_room(seen.api_key)
        rejected = sample.rejected or order.prefix == REJECTED
        voice = EnrolledVoice(seen.api_key, order.target_model, order.prefix, replace(sample, rejected=rejected))
        self._process(voice)
        self._voices.add(voice)
        return {"voice_id": voice.voice_id}

    async def _design(self, order: DesignVoice, seen: SeenRequest) -> dict[str, Any]:
        self._voices.require_room(seen.api_key)
        design = Design(order.voice_prompt, order.preview_text)
        rejected = order.prefix == REJECTED
        voice = EnrolledVoice(seen.api_key, order.target_model, order.prefix, Sample("design"), design)
        audio = await speak_preview(voice, order.preview_text, order.sample_rate, order.response_format, self._spoken)
        self._voices.require_room(seen.api_key)
        voice.sample = Sample("design", content=audio, format=order.response_format, rejected=rejected)
        self._process(voice)
        self._voices.add(voice)
        preview = {
            "data": base64.b64encode(audio).decode(),
            "sample_rate": order.sample_rate,
            "response_format": order.response_format,
        }
        return {"voice_id": voice.voice_id, "target_model": voice.target_model, "preview_audio": preview}

    async def _update(self, order: UpdateVoice, request: Request, seen: SeenRequest) -> dict[str, Any]:
        """A clone is made again from another sample (§3)."""
        if self._find(order.voice_id, seen).design is not None:
            raise refused_parameter("voice_id")
        sample = await self._sample(order.url, request, seen)
        voice = self._find(order.voice_id, seen)
        voice.sample = sample
        self._process(voice)
        return {}

    def _process(self, voice: EnrolledVoice) -> None:
        voice.process(self._seconds, "UNDEPLOYED" if voice.sample.rejected else "OK")

    def _find(self, voice_id: str, seen: SeenRequest) -> EnrolledVoice:
        voice = self._voices.find(voice_id, seen.api_key)
        if voice is None:
            raise ServiceError(400, "BadRequest.ResourceNotExist", "The Required resource not exist.")
        return voice

    async def _sample(self, url: str, request: Request, seen: SeenRequest) -> Sample:
        asker = Asker(
            api_key=seen.api_key,
            model=ENROLLMENT,
            host=request.headers.get("host", ""),
            resolves_oss=is_enabled(request, "x-dashscope-ossresourceresolve"),
        )
        return await take_sample(url, asker, self._sources, self._ear, seen)

    def _told(self, voice: EnrolledVoice, request: Request) -> dict[str, Any]:
        link = f"http://{request.headers.get('host', '')}{self._samples.path(voice)}"
        return {**voice.as_queried(), "resource_link": link}
