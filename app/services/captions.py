"""When each sentence of a long text is heard, for its subtitles: from what the provider told while it spoke."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import orjson
from pydantic import TypeAdapter

from app import subtitles
from app.audio import PCM_FRAME_BYTES
from app.dashscope import SpokenSentence, SpokenWord, Timeline
from app.joining import samples_to_ms
from app.subtitles import Cue, Track, make_cues, write_srt, write_vtt
from app.transcripts import Sentence, Word, storable

CaptionFormat = Literal["srt", "vtt"]

# A word that begins this much before its sentence is heard is timed from the start of the sentence, not of the task.
EARLY_MS = 300

Sentences = TypeAdapter(tuple[Sentence, ...])
"""Reads and writes the sentences of a segment as JSON."""


def time_sentences(timeline: Timeline, text: str, samples: int, sample_rate: int) -> str:
    """JSON of the sentences of a segment, in milliseconds from its start.

    `text` is what the segment says, without markup. It fills in for sentences that the provider did not name (PROTOCOL
    §1.5), and for all of them where it named none. Words are in either of the two places that they may come in.
    """
    told = _fill_in(_merge_nameless([_tell(each, sample_rate) for each in timeline.sentences]), text)
    if not any(each.text.strip() for each in told):
        told = [_Told(text, 0, samples_to_ms(samples, sample_rate), ())]
    words = [word for each in told for word in each.words] or timeline.words
    sentences = tuple(
        Sentence(
            begin_time=each.begin_ms,
            end_time=each.end_ms,
            text=each.text.strip(),
            words=_within(words, each.begin_ms, each.end_ms) or None,
        )
        for each in told
        if each.text.strip() and each.end_ms > each.begin_ms
    )
    return Sentences.dump_json(sentences, exclude_none=True).decode()


def lay_out(sentences: str, duration_ms: int) -> str:
    """JSON of the cues of a segment that lasts so long, from the JSON of its sentences. Slow: run it by `compute`."""
    spoken = tuple(
        subtitles.Sentence(
            each.begin_time,
            each.end_time,
            each.text,
            tuple(subtitles.Word(word.begin_time, word.end_time, word.text) for word in each.words or ()),
        )
        for each in Sentences.validate_json(sentences)
    )
    cues = make_cues(Track(0, spoken))
    within = [cue for cue in cues if cue.begin_ms < duration_ms]
    return orjson.dumps([(cue.begin_ms, min(cue.end_ms, duration_ms), cue.lines) for cue in within]).decode()


def write_captions(segments: Iterable[tuple[str | None, int]], sample_rate: int, format: CaptionFormat) -> str:
    """The subtitles of all segments, one after the other; each is JSON of its cues and its length in samples."""
    cues: list[Cue] = []
    samples_before = 0
    for laid_out, samples in segments:
        offset_ms = samples_to_ms(samples_before, sample_rate)
        samples_before += samples
        segment_end_ms = samples_to_ms(samples_before, sample_rate)
        for begin_ms, end_ms, lines in orjson.loads(laid_out or "[]"):
            cues.append(Cue(begin_ms + offset_ms, min(end_ms + offset_ms, segment_end_ms), tuple(lines), 0))
    return write_vtt(cues) if format == "vtt" else write_srt(cues)


class _Told(NamedTuple):
    """A sentence as the provider told of it; its times and those of its words are from the start of the task."""

    text: str
    begin_ms: int
    end_ms: int
    words: tuple[SpokenWord, ...]


def _tell(sentence: SpokenSentence, sample_rate: int) -> _Told:
    begin_ms, end_ms = (
        samples_to_ms(audio_bytes // PCM_FRAME_BYTES, sample_rate)
        for audio_bytes in (sentence.begin_bytes, sentence.end_bytes)
    )
    return _Told(storable(sentence.text), begin_ms, end_ms, _from_task(sentence.words, begin_ms))


def _from_task(words: tuple[SpokenWord, ...], begin_ms: int) -> tuple[SpokenWord, ...]:
    """The words of a sentence, timed from the start of the task, whichever of both the provider meant."""
    if not words or words[0].begin_ms >= begin_ms - EARLY_MS:
        return words
    return tuple(word._replace(begin_ms=word.begin_ms + begin_ms, end_ms=word.end_ms + begin_ms) for word in words)


def _merge_nameless(told: Iterable[_Told]) -> list[_Told]:
    """Put sentences without a name that follow each other together: what each of them says cannot be known."""
    merged: list[_Told] = []
    for each in told:
        if merged and not (each.text or merged[-1].text):
            each = merged[-1]._replace(end_ms=each.end_ms, words=merged.pop().words + each.words)
        merged.append(each)
    return merged


def _fill_in(told: Sequence[_Told], whole: str) -> list[_Told]:
    """Give each nameless sentence the text that lies between its neighbours."""
    filled: list[_Told] = []
    position = 0
    for index, each in enumerate(told):
        if each.text:
            found = whole.find(each.text, position)
            position = (found if found >= 0 else position) + len(each.text)
            filled.append(each)
            continue
        end = whole.find(told[index + 1].text, position) if index + 1 < len(told) else len(whole)
        end = max(position, end)
        filled.append(each._replace(text=whole[position:end]))
        position = end
    return filled


def _within(words: Sequence[SpokenWord], begin_ms: int, end_ms: int) -> tuple[Word, ...]:
    return tuple(
        Word(begin_time=max(word.begin_ms, begin_ms), end_time=min(word.end_ms, end_ms), text=storable(word.text))
        for word in words
        if begin_ms <= (word.begin_ms + word.end_ms) // 2 < end_ms
    )
