"""Result files of transcriptions, in whichever of the two shapes they come (PROTOCOL §5.1, §5.2)."""

import json
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from app.dashscope.answers import read_object, read_text
from app.errors import UpstreamError
from app.transcripts import AudioInfo, Digest, Transcript, digest

Optional = Annotated[dict[str, Any], BeforeValidator(read_object)]


class _ResultFile(BaseModel):
    """The transcripts are what was paid for; the rest may be of any shape without harming them."""

    transcripts: Annotated[tuple[Transcript, ...], BeforeValidator(lambda given: () if given is None else given)]
    audio_info: Optional = Field(default_factory=dict)
    properties: Optional = Field(default_factory=dict)


def digest_result(content: bytes) -> Digest:
    """Read a result file and prepare it for the database. Raises UpstreamError for anything else."""
    return digest(*read_result(content))


def read_result(content: bytes) -> tuple[tuple[Transcript, ...], AudioInfo]:
    """The transcripts of a result file, and what it tells of the audio. Raises UpstreamError for anything else."""
    try:
        file = _validate(content)
    except (ValueError, RecursionError):
        raise UpstreamError("转写结果的格式无法识别") from None
    if file.audio_info:
        return file.transcripts, AudioInfo.model_validate(file.audio_info)
    properties = file.properties
    return file.transcripts, AudioInfo(
        format=properties.get("audio_format"),
        sample_rate=properties.get("original_sampling_rate"),
        duration_ms=properties.get("original_duration_in_milliseconds"),
    )


def read_file_url(content: bytes) -> str | None:
    """Which file a result is of; None where it does not tell. Raises UpstreamError for what is no JSON object."""
    try:
        file = json.loads(content)
    except (ValueError, RecursionError):
        file = None
    if not isinstance(file, dict):
        raise UpstreamError("转写结果的格式无法识别")
    return read_text(file.get("file_url"))


def _validate(content: bytes) -> _ResultFile:
    try:
        return _ResultFile.model_validate_json(content)
    except ValidationError as error:
        if error.errors(include_url=False, include_context=False, include_input=False)[0]["type"] != "json_invalid":
            raise
    return _ResultFile.model_validate(json.loads(content))  # takes the lone surrogates that pydantic refuses
