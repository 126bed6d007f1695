from __future__ import annotations

import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.sandbox import voice
from app.sandbox.voice import SPEECH_RATE, EspeakSpeaker, Manner, Speaker, ToneSpeaker, find_speaker, load_speaker

from .dialogue import decode, height


def manner(voice_id: str = "longanyang", *, rate: float = 1.0, pitch: float = 1.0, volume: int = 50) -> Manner:
    return Manner(voice_id, "male", ("zh", "en"), None, rate, pitch, volume)


def heard(speech: bytes) -> tuple[list[int], float]:
    return decode(speech, "pcm", SPEECH_RATE)


def test_without_espeak_a_tone_is_heard_and_said_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with caplog.at_level(logging.WARNING, logger="app.sandbox"):
        assert isinstance(find_speaker(), ToneSpeaker)
    assert len(caplog.messages) == 1
    assert "tone" in caplog.messages[0]


def test_a_tone_follows_text_rate_pitch_volume_and_voice() -> None:
    speaker = ToneSpeaker()
    normal, seconds = heard(speaker.speak("今天天气怎么样？", manner()))
    assert seconds == pytest.approx(1.5, abs=0.01)
    assert heard(speaker.speak("今天", manner()))[1] == pytest.approx(0.4, abs=0.01)
    assert heard(speaker.speak("今天天气怎么样？", manner(rate=2.0)))[1] == pytest.approx(0.75, abs=0.01)
    loud, _ = heard(speaker.speak("今天天气怎么样？", manner(volume=100)))
    assert max(loud) == pytest.approx(2 * max(normal), rel=0.1)
    low, _ = heard(speaker.speak("今天天气怎么样？", manner(pitch=0.5)))
    assert height(low) == pytest.approx(height(normal) / 2, rel=0.15)
    assert speaker.speak("好", manner()) != speaker.speak("好", manner("longanhuan"))


def test_espeak_is_one_for_the_process_and_repeats_itself() -> None:
    pytest.importorskip("espeakng_loader")
    speaker = load_speaker()
    assert isinstance(speaker, EspeakSpeaker)
    text = "今天天气怎么样？"
    assert heard(speaker.speak(text, manner()))[1] == pytest.approx(heard(speaker.speak(text, manner()))[1], rel=0.05)


def test_what_espeak_cannot_pronounce_is_a_tone() -> None:
    pytest.importorskip("espeakng_loader")
    assert load_speaker().speak("★", manner()) == ToneSpeaker().speak("★", manner())


def test_the_first_speakers_at_once_share_one_mouth(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Speaker] = []

    def make_slowly() -> Speaker:
        time.sleep(0.05)
        made.append(ToneSpeaker())
        return made[-1]

    monkeypatch.setattr(voice, "_loaded", [])
    monkeypatch.setattr(voice, "find_speaker", make_slowly)
    with ThreadPoolExecutor(8) as threads:
        speakers = list(threads.map(lambda _: voice.load_speaker(), range(8)))
    assert speakers == made * 8
