"""The sandbox's ear: how long audio is, where speech is in each of its channels, and what was said.

It knows again what the sandbox spoke itself; everything else that isn't silent is heard as one sentence. Decoding
blocks and runs in a thread.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import av
from av import AudioFrame, AudioResampler
from av.audio.stream import AudioStream

from app.sandbox.spoken_audio import SpokenAudio

STRANGE_SPEECH: Final = "欢迎使用语音识别服务。"
"""What is heard in audio that the sandbox did not speak."""

_DEMUXERS: Final = (
    "aac,ac3,amr,amrnb,amrwb,avi,aiff,flac,flv,matroska,webm,mp3,mpeg,mpegts,mpegvideo,ogg,wav,w64,caf,asf,mov,mp4,m4a"
)
"""Containers only: playlists would make the decoder open what they name."""
_FORMAT_NAMES: Final = {"matroska,webm": "webm", "mov,mp4,m4a,3gp,3g2,mj2": "m4a", "asf": "wma"}
_LISTENING_RATE: Final = 8000
_WINDOW_MILLISECONDS: Final = 10
_WINDOW: Final = _LISTENING_RATE * _WINDOW_MILLISECONDS // 1000
_LOUDEST_SILENCE: Final = 64


class NotDecodable(Exception):
    """The content is no audio."""


@dataclass(frozen=True, slots=True)
class Speech:
    """From where to where a channel holds speech, in milliseconds."""

    begin_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class Heard:
    """What the ear makes of a recording. A channel without speech is None; `text` is empty if all are."""

    seconds: float
    format: str
    codec: str
    sample_rate: int
    channels: tuple[Speech | None, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Sound:
    """Audio to listen to; `is_pcm` says that it is 16 kHz samples without a header."""

    content: bytes
    is_pcm: bool = False


class Ear:
    """Listens to sounds with the memory of what was spoken."""

    def __init__(self, spoken: SpokenAudio) -> None:
        self._spoken = spoken

    async def listen(self, sound: Sound) -> Heard:
        """What is in a sound; `NotDecodable` if it isn't one."""
        return await asyncio.to_thread(self._listen, sound)

    def _listen(self, sound: Sound) -> Heard:
        options = {"format_whitelist": _DEMUXERS}
        pcm = {"sample_rate": "16000", "ch_layout": "mono"} if sound.is_pcm else {}
        try:
            with av.open(
                io.BytesIO(sound.content),
                "r",
                format="s16le" if sound.is_pcm else None,
                container_options=pcm or options,
            ) as container:
                if not container.streams.audio:
                    raise NotDecodable
                stream = container.streams.audio[0]
                listening = _Listening()
                for frame in frames_of(container, stream):
                    listening.hear(frame)
                name = container.format.name
                codec = stream.codec_context.codec.canonical_name
                sample_rate = stream.codec_context.sample_rate
        except (av.FFmpegError, ValueError) as error:
            raise NotDecodable from error
        if not listening.seconds:
            raise NotDecodable
        channels = listening.channels
        known = self._spoken.text_of(sound.content)
        return Heard(
            seconds=listening.seconds,
            format="pcm" if sound.is_pcm else _FORMAT_NAMES.get(name, name),
            codec=codec,
            sample_rate=sample_rate,
            channels=channels,
            text=(STRANGE_SPEECH if known is None else known) if any(channels) else "",
        )


def frames_of(container: av.container.InputContainer, stream: AudioStream) -> Iterator[AudioFrame]:
    """The frames up to the end, or to where a file breaks off."""
    begun = False
    try:
        for frame in container.decode(stream):
            begun = True
            yield frame
    except av.FFmpegError:
        if not begun:
            raise


class _Listening:
    """Adds up frames: their length, and the first and last loud window of every channel."""

    def __init__(self) -> None:
        self._samples = 0
        self._rate = 1
        self._resampler = AudioResampler(format="s16p", layout=None, rate=_LISTENING_RATE)
        self._position = 0
        self._loud: list[tuple[int, int] | None] = []

    @property
    def seconds(self) -> float:
        return self._samples / self._rate

    @property
    def channels(self) -> tuple[Speech | None, ...]:
        return tuple(window and Speech(*window) for window in self._loud)

    def hear(self, frame: AudioFrame) -> None:
        self._samples += frame.samples
        self._rate = frame.sample_rate
        for piece in self._resampler.resample(frame):
            for channel, plane in enumerate(piece.planes):
                self._scan(channel, memoryview(bytes(plane)[: piece.samples * 2]).cast("h"))
            self._position += piece.samples

    def _scan(self, channel: int, samples: memoryview[int]) -> None:
        if channel == len(self._loud):
            self._loud.append(None)
        for start in range(0, len(samples), _WINDOW):
            window = samples[start : start + _WINDOW]
            if max(window) <= _LOUDEST_SILENCE and min(window) >= -_LOUDEST_SILENCE:
                continue
            at = (self._position + start) * 1000 // _LISTENING_RATE
            until = min(at + _WINDOW_MILLISECONDS, round(self.seconds * 1000))
            begun = self._loud[channel]
            self._loud[channel] = (begun[0] if begun else at, max(until, at + 1))
