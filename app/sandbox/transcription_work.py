"""The work of an asynchronous task: each file heard and written down in its model's shape (PROTOCOL.md §5.1, §5.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import orjson

from app.sandbox.audio_sources import Asker, AudioSources, AudioUnavailable, is_audio_url
from app.sandbox.hearing import Heard, NotDecodable, Speech
from app.sandbox.recognition_models import PARAFORMER
from app.sandbox.request_log import SeenRequest
from app.sandbox.tasks import Subtask
from app.sandbox.transcript import Sentence, language_of, spread
from app.sandbox.transcription_order import TranscriptionOrder

LONGEST_SECONDS: Final = 12 * 3600
_CODES: Final = {"missing": "FILE_404_NOT_FOUND", "forbidden": "FILE_403_FORBIDDEN", "empty": "FILE_CHECK_FAILED"}


class TranscriptionWork:
    """Turns the files of an order into subtasks."""

    def __init__(self, sources: AudioSources) -> None:
        self._sources = sources

    async def do(self, order: TranscriptionOrder, asker: Asker, seen: SeenRequest) -> Sequence[Subtask]:
        """All files one after the other."""
        return [await self._transcribe(url, order, asker, seen) for url in order.urls]

    async def _transcribe(self, url: str, order: TranscriptionOrder, asker: Asker, seen: SeenRequest) -> Subtask:
        if not is_audio_url(url):
            return _failed(url, "REQUEST_INVALID_FILE_URL_VALUE")
        try:
            heard = await self._sources.listen(url, asker, seen)
        except AudioUnavailable as error:
            return _failed(url, _CODES.get(error.reason, "FILE_DOWNLOAD_FAILED"))
        except NotDecodable:
            return _failed(url, "DECODE_ERROR")
        if heard.seconds > LONGEST_SECONDS:
            return _failed(url, "AUDIO_DURATION_TOO_LONG")
        tracks = {channel: heard.channels[channel] for channel in order.channels if channel < len(heard.channels)}
        if not tracks:
            return _failed(url, "FILE_PARSE_FAILED")
        if order.model == PARAFORMER:
            return _paraformer(url, order, heard, tracks)
        return _filetrans(url, order, heard, tracks)


def _failed(url: str, code: str) -> Subtask:
    return Subtask(url, code=code, message=code)


def _filetrans(url: str, order: TranscriptionOrder, heard: Heard, tracks: dict[int, Speech | None]) -> Subtask:
    language = order.language or language_of(heard.text)

    def written(number: int, sentence: Sentence) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "sentence_id": number,
            "begin_time": sentence.begin_ms,
            "end_time": sentence.end_ms,
            "language": language,
            "emotion": "neutral",
            "text": sentence.text,
        }
        if order.words:
            entry["words"] = [word.as_json() for word in sentence.words]
        return entry

    transcripts = []
    for channel, speech in tracks.items():
        sentences = spread(heard.text, speech, at_commas=order.words) if speech else []
        entries = [written(number, sentence) for number, sentence in enumerate(sentences)]
        transcripts.append({"channel_id": channel, "text": heard.text if speech else "", "sentences": entries})
    document = {
        "file_url": url,
        "audio_info": {"format": heard.format, "sample_rate": heard.sample_rate},
        "transcripts": transcripts,
    }
    return Subtask(url, orjson.dumps(document), len(tracks) * math.ceil(heard.seconds))


def _paraformer(url: str, order: TranscriptionOrder, heard: Heard, tracks: dict[int, Speech | None]) -> Subtask:
    spoken = {channel: speech for channel, speech in tracks.items() if speech}
    if not spoken:
        return _failed(url, "SUCCESS_WITH_NO_VALID_FRAGMENT")

    def written(number: int, sentence: Sentence) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "begin_time": sentence.begin_ms,
            "end_time": sentence.end_ms,
            "text": sentence.text,
            "sentence_id": number,
        }
        if order.speakers:
            entry["speaker_id"] = 0
        return {**entry, "words": [word.as_json() for word in sentence.words]}

    transcripts = []
    billed = 0
    for channel, speech in spoken.items():
        sentences = spread(heard.text, speech, at_commas=False)
        length = speech.end_ms - speech.begin_ms
        billed += math.ceil(length / 1000)
        transcripts.append(
            {
                "channel_id": channel,
                "content_duration_in_milliseconds": length,
                "text": heard.text,
                "sentences": [written(number, sentence) for number, sentence in enumerate(sentences, 1)],
            }
        )
    document = {
        "file_url": url,
        "properties": {
            "audio_format": heard.codec,
            "channels": list(tracks),
            "original_sampling_rate": heard.sample_rate,
            "original_duration_in_milliseconds": round(heard.seconds * 1000),
        },
        "transcripts": transcripts,
    }
    return Subtask(url, orjson.dumps(document), billed)
