"""Speech that comes in pieces, made into one clean file. Pure, no settings.

Raw samples are encoded once, while later pieces still arrive: no seam can be heard, the length is exact to the sample,
and there is one header. Streams that are encoded already are another matter: see app.chaining. No more than about a
second of audio is kept in memory. Everything blocks: call it in a thread.
"""

import contextlib
import math
import os
import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType
from typing import TYPE_CHECKING, BinaryIO, Literal, NamedTuple

from app.audio import MAX_SIZE, PCM_FRAME_BYTES, AudioFormat

# FFmpeg's libraries are large: they are loaded by whoever encodes the first file.
if TYPE_CHECKING:
    import av

NO_TAGS = {"id3v2_version": "0"}

OPUS_RATE = 48_000
OPUS_INPUT_RATES = frozenset({8000, 16000, 24000, 48000})
"""What libopus takes as it is: faster than resampled first, at 8 kHz up to four times, and mostly better to hear."""
OPUS_KBPS = range(6, 257)

_MPEG1_KBPS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_MPEG2_KBPS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
MP3_KBPS: Mapping[int, Sequence[int]] = MappingProxyType(
    {
        8000: _MPEG2_KBPS[:8],  # MPEG 2.5
        **dict.fromkeys((16000, 22050, 24000), _MPEG2_KBPS),
        **dict.fromkeys((44100, 48000), _MPEG1_KBPS),
    }
)
"""The constant bit rates of layer III by sample rate."""


def samples_to_ms(samples: int, rate: int) -> int:
    """The length of so many samples in milliseconds, rounded."""
    return round(samples * 1000 / rate)


class Joiner:
    """One audio file made of 16-bit mono samples that come piece by piece.

    The target is empty, seekable and for reading and writing; it is never closed here, and is a file only after
    `finish`. `kbps` counts for mp3, where it becomes the nearest constant rate that there is for the sample rate, and
    for opus, which varies around it. What the target raises comes out of `add` and `finish` as it is.
    """

    def __init__(self, target: BinaryIO, format: AudioFormat, sample_rate: int, kbps: int) -> None:
        self._sample_rate = sample_rate
        self._samples = 0
        self._odd = b""
        target.seek(0)
        self._target = target
        self._file: _PlainFile | _EncodedFile | None = _create_file(target, format, sample_rate, kbps)

    @property
    def samples_joined(self) -> int:
        """How many whole samples were taken so far."""
        return self._samples

    def add(self, samples: bytes) -> None:
        """Append little-endian samples; one that is cut in two between calls is put together."""
        rest = memoryview(samples)
        if self._odd and rest:
            split, rest = self._odd + rest[:1], rest[1:]
            self._append(memoryview(split))
            self._odd = b""
        whole = len(rest) // PCM_FRAME_BYTES * PCM_FRAME_BYTES
        self._append(rest[:whole])
        if whole < len(rest):
            self._odd = bytes(rest[whole:])

    def finish(self) -> int:
        """Complete the file, and give its length in milliseconds. A last byte without its other half is dropped."""
        self._unfinished().finish()
        self._target.flush()
        self.close()
        return samples_to_ms(self._samples, self._sample_rate)

    def close(self) -> None:
        """Give back what the encoder holds. Without `finish` the target holds nothing of use, and is left alone."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _unfinished(self) -> "_PlainFile | _EncodedFile":
        if self._file is None:
            raise ValueError("the joined file is finished or closed")
        return self._file

    def _append(self, samples: memoryview) -> None:
        file = self._unfinished()
        if samples:
            file.write(samples)
            self._samples += len(samples) // PCM_FRAME_BYTES


# ---- Files under way


def _create_file(target: BinaryIO, format: AudioFormat, sample_rate: int, kbps: int) -> "_PlainFile | _EncodedFile":
    match format:
        case "pcm":
            return _PlainFile(target, None)
        case "wav":
            return _PlainFile(target, sample_rate)
        case "mp3":
            return _EncodedFile(target, sample_rate, _mp3(sample_rate, kbps))
        case "opus":
            return _EncodedFile(target, sample_rate, _opus(_opus_input_rate(sample_rate), kbps))


class _PlainFile:
    """The samples as they are, for WAV behind a header that is right in the end."""

    def __init__(self, target: BinaryIO, wav_rate: int | None) -> None:
        self._target = target
        self._wav_rate = wav_rate
        self._bytes = 0
        self._write_header()

    def write(self, samples: memoryview) -> None:
        self._target.write(samples)
        self._bytes += len(samples)

    def finish(self) -> None:
        self._target.seek(0)
        self._write_header()
        self._target.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Nothing is held."""

    def _write_header(self) -> None:
        if self._wav_rate is not None:
            self._target.write(_wav_header(self._wav_rate, self._bytes))


def _wav_header(rate: int, data_bytes: int) -> bytes:
    form = struct.pack("<HHIIHH", 1, 1, rate, rate * PCM_FRAME_BYTES, PCM_FRAME_BYTES, 8 * PCM_FRAME_BYTES)
    riff_bytes = len(b"WAVEfmt ....") + len(form) + len(b"data....") + data_bytes
    head = struct.pack("<4sI8sI", b"RIFF", min(riff_bytes, MAX_SIZE), b"WAVEfmt ", len(form))
    return head + form + struct.pack("<4sI", b"data", min(data_bytes, MAX_SIZE))


class _Encoding(NamedTuple):
    """How FFmpeg is to encode and wrap."""

    container: str
    codec: Literal["libmp3lame", "libopus"]
    options: Mapping[str, str]
    sample_format: str
    rate: int
    kbps: int


def _mp3(rate: int, kbps: int) -> _Encoding:
    nearest = min(MP3_KBPS[rate], key=lambda possible: (abs(possible - kbps), -possible))
    # Level 7 takes half the time of LAME's default; on speech its noise lies as far below what masks it, or further.
    return _Encoding("mp3", "libmp3lame", {"compression_level": "7"}, "s16p", rate, nearest)


def _opus(rate: int, kbps: int) -> _Encoding:
    within = min(max(kbps, OPUS_KBPS.start), OPUS_KBPS.stop - 1)
    # Left unconstrained, clear voices come out at up to twice the bit rate.
    return _Encoding("ogg", "libopus", {"vbr": "constrained"}, "s16", rate, within)


def _opus_input_rate(sample_rate: int) -> int:
    return sample_rate if sample_rate in OPUS_INPUT_RATES else OPUS_RATE


class _EncodedFile:
    """One encoder and one muxer from the first sample to the last, and one resampler where the rates differ."""

    def __init__(self, target: BinaryIO, sample_rate: int, encoding: _Encoding) -> None:
        import av

        self._sample_rate = sample_rate
        self._encoding = encoding
        self._taken = self._encoded = 0  # samples at the two rates
        self._resampler: av.AudioResampler | None = None
        if sample_rate != encoding.rate:
            self._resampler = av.AudioResampler(format="s16", layout="mono", rate=encoding.rate)
        self._sink = _Sink(target)
        self._container = av.open(self._sink, "w", format=encoding.container, container_options=NO_TAGS)
        self._stream = self._container.add_stream(encoding.codec, rate=encoding.rate, options=dict(encoding.options))
        self._stream.layout = "mono"
        self._stream.format = encoding.sample_format
        self._stream.bit_rate = encoding.kbps * 1000
        self._container.start_encoding()

    def write(self, samples: memoryview) -> None:
        second = self._sample_rate * PCM_FRAME_BYTES
        for start in range(0, len(samples), second):
            self._write_frame(samples[start : start + second])

    def finish(self) -> None:
        if self._resampler is not None:
            for frame in self._resampler.resample(None):
                self._encode(frame)
            # A filter that was never filled gives nothing.
            missing = math.ceil(self._taken * self._encoding.rate / self._sample_rate) - self._encoded
            if missing > 0:
                self._encode(_frame(bytes(missing * PCM_FRAME_BYTES)))
        for packet in self._stream.encode(None):
            # LAME may end with a frame of padding alone, after which the muxer would declare only that as padding.
            if packet.duration:
                self._container.mux(packet)
        self._container.close()

    def close(self) -> None:
        """Let go of the target first: FFmpeg completes a file on closing, also one that was abandoned."""
        import av

        self._sink.let_go()
        with contextlib.suppress(av.error.FFmpegError):
            self._container.close()

    def _write_frame(self, samples: memoryview) -> None:
        frame = _frame(bytes(samples))
        frame.sample_rate, frame.time_base, frame.pts = self._sample_rate, Fraction(1, self._sample_rate), self._taken
        self._taken += frame.samples
        for each in [frame] if self._resampler is None else self._resampler.resample(frame):
            self._encode(each)

    def _encode(self, frame: "av.AudioFrame") -> None:
        rate = self._encoding.rate
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), self._encoded
        self._encoded += frame.samples
        for packet in self._stream.encode(frame):
            self._container.mux(packet)


def _frame(samples: bytes) -> "av.AudioFrame":
    import av

    frame = av.AudioFrame(format="s16", layout="mono", samples=len(samples) // PCM_FRAME_BYTES)
    frame.planes[0].update(samples)
    return frame


class _Sink:
    """The target as FFmpeg sees it, until it is let go: from then on nothing is written any more."""

    def __init__(self, target: BinaryIO) -> None:
        self._target: BinaryIO | None = target

    def write(self, content: bytes) -> int:
        return len(content) if self._target is None else self._target.write(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return offset if self._target is None else self._target.seek(offset, whence)

    def tell(self) -> int:
        """Not called, but without it PyAV takes this for a pipe."""
        raise NotImplementedError

    def let_go(self) -> None:
        """Touch the target no more, whatever comes."""
        self._target = None
