"""Transcripts of long audio: what was said on each track, and when. Times are milliseconds from the start.

They are read from whatever the provider sends, so that nothing odd in a field that nobody needs costs the transcript.
"""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter

LONGEST_MS = 10**9  # eleven days, far beyond the 12 hours of a task (PROTOCOL §5.1)
# No database takes the first, no encoding the others.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def storable(text: str) -> str:
    """The text with what cannot be stored replaced."""
    return _UNSTORABLE.sub("\ufffd", text)


def _read_text(value: Any) -> Any:
    return storable(value) if isinstance(value, str) else "" if value is None else value


def _read_word(value: Any) -> str | None:
    return storable(value) if isinstance(value, str) and value else None


def _read_time(value: Any) -> Any:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return 0 if value is None else value
    return min(max(round(value), -LONGEST_MS), LONGEST_MS)


def _read_number(value: Any) -> int | None:
    is_count = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LONGEST_MS
    return math.ceil(value) if is_count else None


def _read_channel(value: Any) -> Any:
    return 0 if value is None else value


def _read_list(value: Any) -> Any:
    return () if value is None else value


Text = Annotated[str, BeforeValidator(_read_text)]
Milliseconds = Annotated[int, BeforeValidator(_read_time)]
OptionalWord = Annotated[str | None, BeforeValidator(_read_word)]
OptionalNumber = Annotated[int | None, BeforeValidator(_read_number)]


class Word(BaseModel):
    """词，以及它后面的标点。"""

    model_config = ConfigDict(frozen=True)

    begin_time: Milliseconds = Field(default=0, description="开始时间（毫秒）")
    end_time: Milliseconds = Field(default=0, description="结束时间（毫秒）")
    text: Text = Field(default="", description="词")
    punctuation: Text = Field(default="", description="词后的标点")


class Sentence(BaseModel):
    """一句话。"""

    model_config = ConfigDict(frozen=True)

    begin_time: Milliseconds = Field(default=0, description="开始时间（毫秒）", examples=[100])
    end_time: Milliseconds = Field(default=0, description="结束时间（毫秒）", examples=[3820])
    text: Text = Field(default="", description="文本", examples=["今天天气还行吧。"])
    sentence_id: OptionalNumber = Field(default=None, description="句子编号")
    language: OptionalWord = Field(default=None, description="语种", examples=["zh"])
    emotion: OptionalWord = Field(default=None, description="情感", examples=["neutral"])
    speaker_id: OptionalNumber = Field(default=None, description="说话人编号")
    words: tuple[Word, ...] | None = Field(default=None, description="词级时间戳")


class Transcript(BaseModel):
    """一个音轨的转写结果。"""

    model_config = ConfigDict(frozen=True)

    channel_id: Annotated[int, BeforeValidator(_read_channel)] = Field(default=0, description="音轨索引", examples=[0])
    text: Text = Field(default="", description="全文", examples=["今天天气还行吧。"])
    sentences: Annotated[tuple[Sentence, ...], BeforeValidator(_read_list)] = Field(default=(), description="句子列表")


class AudioInfo(BaseModel):
    """识别的音频。"""

    model_config = ConfigDict(frozen=True)

    format: OptionalWord = Field(default=None, description="音频格式", examples=["mp3"])
    sample_rate: OptionalNumber = Field(default=None, description="采样率（Hz）", examples=[22050])
    duration_ms: OptionalNumber = Field(default=None, description="时长（毫秒）")


Transcripts = TypeAdapter(tuple[Transcript, ...])
"""Reads and writes the transcripts of all tracks as JSON."""


@dataclass(frozen=True, slots=True)
class Digest:
    """A result as it is kept: JSON of the transcripts without words, and with them where there are any."""

    transcripts: str
    transcripts_with_words: str | None
    text: str
    tracks: int
    last_word_ms: int
    audio: AudioInfo


def digest(transcripts: tuple[Transcript, ...], audio: AudioInfo) -> Digest:
    """Prepare a result for the database."""
    sentences = [sentence for transcript in transcripts for sentence in transcript.sentences]
    has_words = any(sentence.words for sentence in sentences)
    without_words: Any = {"__all__": {"sentences": {"__all__": {"words"}}}}
    return Digest(
        transcripts=Transcripts.dump_json(transcripts, exclude_none=True, exclude=without_words).decode(),
        transcripts_with_words=Transcripts.dump_json(transcripts, exclude_none=True).decode() if has_words else None,
        text="\n".join(transcript.text for transcript in transcripts if transcript.text),
        tracks=len(transcripts),
        last_word_ms=max((sentence.end_time for sentence in sentences), default=0),
        audio=audio,
    )
