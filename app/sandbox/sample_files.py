"""The samples of enrolled voices, at a signed URL that anybody may read until it expires: `resource_link` (§3)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from app.sandbox.enrolled_voices import EnrolledVoice, VoiceBook
from app.sandbox.hearing import STRANGE_SPEECH
from app.sandbox.oss_errors import OssError
from app.sandbox.request_log import SeenRequest
from app.sandbox.service_door import Answer
from app.sandbox.signed_links import SignedLinks
from app.sandbox.spoken_audio import SpokenAudio
from app.sandbox.voice_preview import speak_preview

SAMPLE_BUCKET: Final = "dashscope-voice-sandbox"

_LIFE: Final = timedelta(hours=24)
_MEDIA_TYPES: Final = {"wav": "audio/wav", "mp3": "audio/mpeg", "m4a": "audio/mp4"}
_PREVIEW_RATE: Final = 24_000


class SampleFiles:
    """Names samples and serves them as long as they are their voice's."""

    def __init__(self, voices: VoiceBook, spoken: SpokenAudio) -> None:
        self._voices = voices
        self._spoken = spoken
        self._links = SignedLinks()

    def path(self, voice: EnrolledVoice) -> str:
        """Where a voice's sample is, with the query that opens it."""
        path = f"/{SAMPLE_BUCKET}/{voice.voice_id}/{voice.sample.sample_id}.{voice.sample.format}"
        return self._links.sign(path, datetime.now(UTC) + _LIFE)

    async def read(self, request: Request, seen: SeenRequest) -> Answer:
        """`GET` of a sample, without a key. One that was never fetched is a sentence in its voice."""
        voice_id, name = self._links.check(request).split("/")[2:]
        voice = self._voices.find(voice_id)
        if voice is None or name.partition(".")[0] != voice.sample.sample_id:
            raise OssError(404, "NoSuchKey", "The specified key does not exist.")
        sample = voice.sample
        content = sample.content or await speak_preview(voice, STRANGE_SPEECH, _PREVIEW_RATE, "wav", self._spoken)
        seen.audio_bytes = len(content)
        return Response(content, media_type=_MEDIA_TYPES.get(sample.format, "application/octet-stream"))
