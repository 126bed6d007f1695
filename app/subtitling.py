"""Kept transcripts as subtitle files. Pure, and slow for long audio: run it by `computation.compute`."""

import json
from typing import Literal

from app.errors import InvalidRequest
from app.subtitles import Sentence, Track, Word, make_cues, write_srt, write_txt, write_vtt
from app.transcripts import Transcript, Transcripts

SubtitleFormat = Literal["srt", "vtt", "txt", "json"]


def render_subtitle(transcripts: str, format: SubtitleFormat, channel_id: int | None) -> str:
    """Lay JSON transcripts out: a subtitle file, or a JSON list of cues.

    Raises InvalidRequest for a channel that was not transcribed.
    """
    tracks = [_track(transcript) for transcript in Transcripts.validate_json(transcripts)]
    chosen = [track for track in tracks if channel_id in {None, track.channel_id}]
    if channel_id is not None and not chosen:
        known = "、".join(str(track.channel_id) for track in tracks)
        raise InvalidRequest(f"channel_id 必须是以下之一：{known}")
    if format == "txt":
        return write_txt(chosen)
    cues = [cue for track in chosen for cue in make_cues(track)]
    match format:
        case "srt":
            return write_srt(cues)
        case "vtt":
            return write_vtt(cues)
    cues.sort(key=lambda cue: (cue.begin_ms, cue.channel_id))
    shown = [
        {"channel_id": cue.channel_id, "begin_time": cue.begin_ms, "end_time": cue.end_ms, "lines": cue.lines}
        for cue in cues
    ]
    return json.dumps(shown, ensure_ascii=False)


def _track(transcript: Transcript) -> Track:
    sentences = tuple(
        Sentence(
            sentence.begin_time,
            sentence.end_time,
            sentence.text,
            tuple(Word(word.begin_time, word.end_time, word.text, word.punctuation) for word in sentence.words or ()),
        )
        for sentence in transcript.sentences
    )
    return Track(transcript.channel_id, sentences)
