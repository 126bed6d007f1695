"""Voices as if they had been made elsewhere with the same key, and a look at all there are: `/_sandbox/voices`.

    POST {"api_key": "sk-...", "target_model": "cosyvoice-v3-flash", "prefix": "mine", "count": 1000, "status": "OK",
          "voice_prompt": "...", "preview_text": "..."}  ->  {"voice_ids": [...]}, the oldest first

`count` is 1 and `status` OK unless told otherwise; DEPLOYING stays so. With a `voice_prompt` they are designed voices.
The quota does not bind here. `GET ?api_key=` tells of the voices of one key, of all keys without it.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

import orjson
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app.sandbox.enrolled_voices import Design, EnrolledVoice, Sample, Status, VoiceBook
from app.sandbox.enrollment_order import read_prefix, read_target_model
from app.sandbox.envelope import ServiceError
from app.sandbox.http_faults import STRICT


@dataclass(frozen=True, slots=True, config=STRICT)
class _Wanted:
    api_key: Annotated[str, Field(min_length=1)]
    target_model: str
    prefix: str
    count: int = Field(default=1, ge=1, le=100_000)
    status: Status = "OK"
    voice_prompt: str | None = None
    preview_text: str = ""

    def make(self) -> EnrolledVoice:
        design = None if self.voice_prompt is None else Design(self.voice_prompt, self.preview_text)
        voice = EnrolledVoice(self.api_key, self.target_model, self.prefix, Sample("made"), design)
        voice.process(0, self.status)
        return voice


_WANTED = TypeAdapter(_Wanted)


def voice_routes(voices: VoiceBook) -> list[Route]:
    """The routes that tests use; they are no part of DashScope."""

    async def add_or_show(request: Request) -> Response:
        if request.method == "GET":
            found = voices.existing(request.query_params.get("api_key"))
            return Response(orjson.dumps([_shown(voice) for voice in found]), media_type="application/json")
        try:
            wanted = _WANTED.validate_json(await request.body())
            read_target_model(asdict(wanted))
            read_prefix(asdict(wanted))
        except (ValueError, ServiceError) as error:
            return JSONResponse({"error": f"not understood: {error}"}, 400)
        made = [wanted.make() for _ in range(wanted.count)]
        for voice in made:
            voices.add(voice)
        return JSONResponse({"voice_ids": [voice.voice_id for voice in made]})

    return [Route("/_sandbox/voices", add_or_show, methods=["GET", "POST"])]


def _shown(voice: EnrolledVoice) -> dict[str, Any]:
    sample = voice.sample
    return {
        "api_key": voice.api_key,
        "target_model": voice.target_model,
        "prefix": voice.prefix,
        **voice.as_listed(datetime.now(UTC)),
        "sample": {
            "source": sample.source,
            "url": sample.url,
            "bytes": len(sample.content),
            "format": sample.format,
            "height": sample.height,
        },
    }
