"""Audio as the provider sends it: how long it is, and WAV headers that tell the truth. Pure, no settings.

Nothing here keeps more than a few blocks of a file in memory. Everything blocks: call it in a thread.
"""

import os
import struct
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import BinaryIO, Literal, NamedTuple

from app.errors import InvalidAudio

AudioFormat = Literal["mp3", "wav", "pcm", "opus"]

CONTENT_TYPES: Mapping[AudioFormat, str] = MappingProxyType(
    {"mp3": "audio/mpeg", "wav": "audio/wav", "pcm": "audio/pcm", "opus": "audio/ogg"}
)

PCM_FRAME_BYTES = 2  # the provider's raw PCM is 16-bit mono
MAX_SIZE = 0xFFFFFFFF  # RIFF sizes have 32 bits; a longer file keeps the largest, as other writers do
MAX_CHUNKS = 64
RIFF_HEADER_BYTES = 12
CHUNK_HEADER_BYTES = 8
# Formats whose frames all have the same size: PCM, float, A-law, mu-law, and the extensible form of these.
FIXED_FRAME_TAGS = frozenset({0x0001, 0x0003, 0x0006, 0x0007, 0xFFFE})


def measure_duration_ms(source: BinaryIO, format: AudioFormat, sample_rate: int) -> int:
    """Count the samples that a player would play, and give their length in milliseconds, rounded.

    MP3 and Ogg Opus are decoded, so encoder delay, padding and pre-skip count only where the stream fails to
    declare them; WAV is measured by the bytes that are there, whatever its header says. A cut-off tail is left
    out. `sample_rate` is needed for raw PCM only. Raises InvalidAudio for what holds no audio in this format.
    """
    source.seek(0)
    match format:
        case "pcm":
            frames, rate = _end(source) // PCM_FRAME_BYTES, sample_rate
        case "wav":
            frames, rate = _wav_frames(source)
        case "mp3":
            frames, rate = _decoded_frames(source, "mp3")
        case "opus":
            frames, rate = _decoded_frames(source, "ogg")
    if not frames:
        raise InvalidAudio("音频内容为空，请重新生成")
    return round(frames * 1000 / rate)


def correct_wav_header(source: BinaryIO) -> bool:
    """Make the RIFF and data sizes of a streamed WAV file say what is there. True when bytes were changed.

    The file must be readable, writable and seekable. A header that is right stays as it is, with chunks before
    or after the data, and so does everything that is not WAV or ends before its data.
    """
    wav = read_wav(source)
    if wav is None:
        return False
    # Writers disagree on whether the last pad byte counts.
    riff_is_right = abs(CHUNK_HEADER_BYTES + wav.riff_size - wav.end) <= 1
    if wav.data_bytes == wav.data.size and riff_is_right:
        return False
    data_changed = _write_size(source, wav.data.start - 4, wav.data.size, wav.data_bytes)
    riff_changed = _write_size(source, 4, wav.riff_size, wav.end - CHUNK_HEADER_BYTES)
    return data_changed or riff_changed


class _Chunk(NamedTuple):
    name: bytes
    start: int
    size: int

    @property
    def end(self) -> int:
        """Where the next chunk begins: chunks are padded to an even size."""
        return self.start + self.size + self.size % 2


class Wav(NamedTuple):
    """A WAV file up to its data: what the sizes say, and what is there."""

    riff_size: int
    form: bytes
    data: _Chunk
    data_bytes: int
    end: int


def read_wav(source: BinaryIO) -> Wav | None:
    """Walk the chunks up to the data; None when this is not WAV, or ends before."""
    end = _end(source)
    source.seek(0)
    riff = source.read(RIFF_HEADER_BYTES)
    if len(riff) < RIFF_HEADER_BYTES or riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
        return None
    (riff_size,) = struct.unpack_from("<I", riff, 4)
    form = b""
    for chunk in _chunks(source, RIFF_HEADER_BYTES):
        if chunk.name == b"fmt ":
            form = source.read(min(chunk.size, 40))
        elif chunk.name == b"data":
            there = end - chunk.start
            right = chunk.size <= there and _chunks_fill(source, chunk.end, end)
            return Wav(riff_size, form, chunk, chunk.size if right else there, end)
    return None


def _chunks(source: BinaryIO, offset: int) -> Iterator[_Chunk]:
    """Chunk after chunk from an offset; the source then stands at the content of the chunk just given."""
    for _ in range(MAX_CHUNKS):
        source.seek(offset)
        header = source.read(CHUNK_HEADER_BYTES)
        if len(header) < CHUNK_HEADER_BYTES:
            return
        chunk = _Chunk(header[:4], offset + CHUNK_HEADER_BYTES, int.from_bytes(header[4:], "little"))
        yield chunk
        offset = chunk.end


def _chunks_fill(source: BinaryIO, offset: int, end: int) -> bool:
    """Whether whole chunks reach from the offset exactly to the end; the last pad byte may be missing."""
    for chunk in _chunks(source, offset):
        if not (chunk.name.isascii() and chunk.name.decode("ascii").isprintable()):
            return False
        offset = chunk.end
    return offset - end in (0, 1)


def _write_size(source: BinaryIO, offset: int, declared: int, size: int) -> bool:
    size = min(size, MAX_SIZE)
    if size == declared:
        return False
    source.seek(offset)
    source.write(struct.pack("<I", size))
    return True


def _wav_frames(source: BinaryIO) -> tuple[int, int]:
    """Count the frames of a WAV file, and read its sample rate."""
    wav = read_wav(source)
    if wav is None or len(wav.form) < 16:
        raise InvalidAudio
    tag, _, rate, _, frame_bytes = struct.unpack_from("<HHIIH", wav.form)
    if tag not in FIXED_FRAME_TAGS or not rate or not frame_bytes:
        raise InvalidAudio
    return wav.data_bytes // frame_bytes, rate


def _decoded_frames(source: BinaryIO, container_format: str) -> tuple[int, int]:
    """Decode, and count the samples of one channel.

    The container is named and not guessed: some that FFmpeg would guess make it open other files. Packets that
    do not decode are skipped, but must be the smaller part: MP3 frame headers also turn up in what is no audio.
    """
    import av  # here, because FFmpeg's libraries take 20 MB, and who needs no decoder does not pay for them

    frames = rate = decoded = failed = 0
    try:
        with av.open(source, "r", format=container_format) as container:
            if not container.streams.audio:
                raise InvalidAudio
            for packet in container.demux(container.streams.audio[0]):
                try:
                    for frame in packet.decode():
                        frames, rate = frames + frame.samples, frame.sample_rate
                    decoded += 1
                except av.error.InvalidDataError:
                    failed += 1
    except av.error.FFmpegError as error:
        if not decoded:
            raise InvalidAudio from error
    if failed >= decoded:
        raise InvalidAudio
    return frames, rate


def _end(source: BinaryIO) -> int:
    return source.seek(0, os.SEEK_END)
