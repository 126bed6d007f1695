"""A sentence in an enrolled voice, outside of any synthesis task; the ear knows it again like any other (§3)."""

from __future__ import annotations

import asyncio
import io
import wave

from app.sandbox.enrolled_voices import EnrolledVoice
from app.sandbox.enrollment_order import PreviewFormat
from app.sandbox.recording import Recording
from app.sandbox.script import Line
from app.sandbox.speech_order import SpeechOrder
from app.sandbox.spoken_audio import SpokenAudio, Utterance


async def speak_preview(
    voice: EnrolledVoice, text: str, sample_rate: int, audio_format: PreviewFormat, spoken: SpokenAudio
) -> bytes:
    """A whole file in which `voice` says `text`."""
    order = SpeechOrder(
        model=voice.target_model,
        voice=voice.as_speaker(),
        format="mp3" if audio_format == "mp3" else "pcm",
        sample_rate=sample_rate,
        bit_rate=64,
        volume=50,
        rate=1.0,
        pitch=1.0,
        ssml=False,
        word_timestamps=False,
        language=None,
        replacements=(),
    )
    audio = await asyncio.to_thread(_record, order, text)
    utterance = Utterance(order.format)
    utterance.say(text)
    utterance.hear(audio)
    spoken.remember(utterance)
    return _as_wav(audio, sample_rate) if audio_format == "wav" else audio


def _record(order: SpeechOrder, text: str) -> bytes:
    recording = Recording(order, 0)
    return b"".join(frame.data for frames in recording.record(Line(text), lambda: True) for frame in frames)


def _as_wav(samples: bytes, sample_rate: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(sample_rate)
        writer.writeframes(samples)
    return file.getvalue()
