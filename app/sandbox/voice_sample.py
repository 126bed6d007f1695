"""The audio that a voice is made from: fetched, listened to and refused where it will not do (PROTOCOL.md §3).

A voice ends as UNDEPLOYED if the file behind its URL is called `rejected`, whatever its suffix.
"""

from __future__ import annotations

import asyncio
from typing import Final

from app.sandbox.audio_sources import Asker, AudioSources, AudioTooLarge, AudioUnavailable, Elsewhere, file_name
from app.sandbox.enrolled_voices import Sample, SampleSource
from app.sandbox.envelope import ServiceError, refused_url
from app.sandbox.fundamental import height_of
from app.sandbox.hearing import STRANGE_SPEECH, Ear, Heard, NotDecodable, Speech
from app.sandbox.request_log import SeenRequest

REJECTED: Final = "rejected"

_LARGEST_BYTES: Final = 10 * 1024 * 1024
_LOWEST_RATE: Final = 16_000
_SHORTEST_SECONDS, _LONGEST_SECONDS = 5.0, 60.0
_SHORTEST_SPEECH_MILLISECONDS: Final = 3000
"""As little as `max_prompt_audio_length` may ask for."""

_CODECS: Final = {"wav": ("pcm_s16le",), "mp3": ("mp3",), "m4a": ("aac", "alac")}
_PRESUMED: Final = Heard(12.0, "wav", "pcm_s16le", 24_000, (Speech(100, 11_900),), STRANGE_SPEECH)


async def take_sample(url: str, asker: Asker, sources: AudioSources, ear: Ear, seen: SeenRequest) -> Sample:
    """The sample behind a URL; a `ServiceError` says why it will not do."""
    rejected = file_name(url.partition("?")[0]) == REJECTED
    content = b""
    try:
        found = await sources.find(url, asker, seen, largest=_LARGEST_BYTES)
        if isinstance(found, Elsewhere):
            _check(found.heard(_PRESUMED))
            return Sample("elsewhere", url, rejected=rejected)
        content = found.content
        heard = await ear.listen(found)
    except AudioUnavailable as error:
        raise _unavailable(error, url) from error
    except AudioTooLarge:
        raise ServiceError(430, "Audio.FileSizeExceed", "File too large") from None
    except NotDecodable:
        if content and not _claims_a_known_format(content):
            raise _unsupported() from None
        raise ServiceError(430, "Audio.DecoderError", "Decoder audio file failed.") from None
    _check(heard)
    height = await asyncio.to_thread(height_of, content)
    source: SampleSource = "oss" if seen.audio_source == "oss" else "storage"
    return Sample(source, url, content, heard.format, height, rejected)


def _check(heard: Heard) -> None:
    """Format, rate, length and speech of the first channel, which is the one that counts."""
    if heard.codec not in _CODECS.get(heard.format, ()):
        raise _unsupported()
    if heard.sample_rate < _LOWEST_RATE:
        raise ServiceError(430, "Audio.AudioRateError", "File sample rate unsupported")
    if heard.seconds > _LONGEST_SECONDS:
        raise ServiceError(400, "Audio.DurationLimitError", f"Audio duration exceeds {_LONGEST_SECONDS:.0f}s.")
    speech = heard.channels[0]
    if speech is None:
        raise ServiceError(430, "Audio.AudioSilentError", "Silent file unsupported.")
    if heard.seconds < _SHORTEST_SECONDS or speech.end_ms - speech.begin_ms < _SHORTEST_SPEECH_MILLISECONDS:
        raise ServiceError(400, "Audio.AudioShortError", "valid audio too short!")


def _claims_a_known_format(content: bytes) -> bool:
    """Whether a file begins like WAV, M4A or MP3."""
    if content[:4] == b"RIFF" and content[8:12] == b"WAVE":
        return True
    return content[4:8] == b"ftyp" or content[:3] == b"ID3" or (content[0] == 0xFF and content[1:2] >= b"\xe0")


def _unavailable(error: AudioUnavailable, url: str) -> ServiceError:
    if error.reason == "unresolved":
        return refused_url()
    if error.reason == "empty":
        return _unsupported()
    return ServiceError(400, "BadRequest.InputDownloadFailed", f"Failed to download the input file: {url}.")


def _unsupported() -> ServiceError:
    return ServiceError(400, "BadRequest.UnsupportedFileFormat", "File format unsupported.")
