"""Transcripts of long audio: what was said on each track, and when. Times are milliseconds from the start."""

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter


def _whole(value: Any) -> Any:
    return round(value) if isinstance(value, float) and math.isfinite(value) else value


def _some_text(value: Any) -> Any:
    return "" if value is None else value


def _some_sentences(value: Any) -> Any:
    return () if value is None else value


Milliseconds = Annotated[int, BeforeValidator(_whole)]
SomeText = Annotated[str, BeforeValidator(_some_text)]


class Word(BaseModel):
    """词，以及它后面的标点。"""

    model_config = ConfigDict(frozen=True)

    begin_time: Milliseconds = Field(description="开始时间（毫秒）")
    end_time: Milliseconds = Field(description="结束时间（毫秒）")
    text: SomeText = Field(description="词")
    punctuation: SomeText = Field(default="", description="词后的标点")


class Sentence(BaseModel):
    """一句话。"""

    model_config = ConfigDict(frozen=True)

    begin_time: Milliseconds = Field(description="开始时间（毫秒）", examples=[100])
    end_time: Milliseconds = Field(description="结束时间（毫秒）", examples=[3820])
    text: SomeText = Field(description="文本", examples=["今天天气还行吧。"])
    sentence_id: int | None = Field(default=None, description="句子编号")
    language: str | None = Field(default=None, description="语种", examples=["zh"])
    emotion: str | None = Field(default=None, description="情感", examples=["neutral"])
    speaker_id: int | None = Field(default=None, description="说话人编号")
    words: tuple[Word, ...] | None = Field(default=None, description="词级时间戳")


class Transcript(BaseModel):
    """一个音轨的转写结果。"""

    model_config = ConfigDict(frozen=True)

    channel_id: int = Field(default=0, description="音轨索引", examples=[0])
    text: SomeText = Field(default="", description="全文", examples=["今天天气还行吧。"])
    sentences: Annotated[tuple[Sentence, ...], BeforeValidator(_some_sentences)] = Field(
        default=(), description="句子列表"
    )

    def without_words(self) -> "Transcript":
        """The same with sentences only."""
        sentences = tuple(sentence.model_copy(update={"words": None}) for sentence in self.sentences)
        return self.model_copy(update={"sentences": sentences})


Transcripts = TypeAdapter(tuple[Transcript, ...])
"""Reads and writes the transcripts of all tracks as JSON."""


def join_text(transcripts: tuple[Transcript, ...]) -> str:
    """Everything that was said, track after track."""
    return "\n".join(transcript.text for transcript in transcripts if transcript.text)
