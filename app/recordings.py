"""What a user uploaded, judged by its content and never by its name. Pure, no settings.

Strangers upload these files, so FFmpeg gets a short leash: it sees the bytes of this one file and cannot open another
file or address, it has a few containers and audio codecs to choose from, no picture is decoded, and time, streams,
channels and memory are bounded. Everything blocks: call it in a thread.

MP4 (m4a, mp4, mov, 3gp) is no part of RECOGNIZABLE on purpose: 400 KB of it can unpack to tables that take FFmpeg
440 MB of memory. Name M4A only in a process of its own whose memory is limited, as app.samples does.
"""

import os
import re
import struct
import time
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, BinaryIO

from app.audio import MAX_SIZE, Wav, read_wav
from app.errors import AudioTooLong, InvalidAudio

# FFmpeg's libraries are large: they are loaded by whoever opens the first file.
if TYPE_CHECKING:
    import av

# FFmpeg's demuxers that may hold each container.
_DEMUXERS: Mapping[str, str] = MappingProxyType(
    {
        "aac": "aac",
        "aiff": "aiff",
        "amr": "amr",
        "avi": "avi",
        "flac": "flac",
        "flv": "flv",
        "m4a": "mov",
        "mkv": "matroska",
        "mp3": "mp3",
        "mpeg": "mpeg,mpegts,mp3",
        "ogg": "ogg",
        "opus": "ogg",
        "wav": "wav",
        "webm": "webm",
        "wma": "asf",
        "wmv": "asf",
    }
)
M4A = "m4a"
"""MP4, for `probe` in a confined process only."""
RECOGNIZABLE: frozenset[str] = frozenset(_DEMUXERS) - {M4A}
"""The containers that the provider's recognition takes, all of which can be probed."""
# What begins as one of these is tried as nothing else.
_SEALED = frozenset({"wav", M4A})

# Without a picture; with one, audio/... becomes video/....
_CONTENT_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "aac": "audio/aac",
        "aiff": "audio/aiff",
        "amr": "audio/amr",
        "avi": "video/x-msvideo",
        "flac": "audio/flac",
        "flv": "video/x-flv",
        "m4a": "audio/mp4",
        "mkv": "audio/x-matroska",
        "mp3": "audio/mpeg",
        "mpeg": "audio/mpeg",
        "ogg": "audio/ogg",
        "opus": "audio/ogg",
        "wav": "audio/wav",
        "webm": "audio/webm",
        "wma": "audio/x-ms-wma",
        "wmv": "video/x-ms-wmv",
    }
)

# What these containers hold in practice. Left out are rarities, and decoders that allocate whatever a header claims.
_DECODERS = (
    "aac,aac_latm,ac3,eac3,amrnb,amrwb,libopencore_amrnb,libopencore_amrwb,flac,g722,g726,g726le,gsm,gsm_ms,nellymoser,"
    "mp1,mp1float,mp2,mp2float,mp3,mp3float,opus,libopus,speex,vorbis,wmav1,wmav2,wmapro,wmalossless,wmavoice,"
    "adpcm_ima_qt,adpcm_ima_wav,adpcm_ms,adpcm_swf,adpcm_yamaha,"
    "pcm_alaw,pcm_mulaw,pcm_bluray,pcm_dvd,pcm_f32be,pcm_f32le,pcm_f64be,pcm_f64le,pcm_s8,pcm_u8,pcm_s16be,pcm_s16le,"
    "pcm_u16be,pcm_u16le,pcm_s24be,pcm_s24le,pcm_s32be,pcm_s32le"
)
_M4A_DECODERS = "aac,alac"

PADDING_MS = 100  # encoders round up to whole frames: a clip cut to the limit may come out a little longer
PROBE_SECONDS = 5.0
MAX_STREAMS = 16
MAX_CHANNELS = 8
MAX_SAMPLE_RATE = 384_000
# Read before the codecs are known: frames of a few bytes each take fifty times their size until then.
MAX_PROBED_BYTES = 1024 * 1024
MAX_TAGS = 8
TAG_HEADER_BYTES = 10
HEAD_BYTES = 512
HINT_BYTES = 32_768
# An ID3v2 tag may hold pictures deflated a thousandfold, which FFmpeg inflates wherever a tag can be.
_TAG = re.compile(rb"ID3[\x02-\x04].{2}[\x00-\x7f]{4}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Recording:
    """Audio that really decodes: what it is wrapped in, how it is coded, how long it plays."""

    container: str
    """RECOGNIZABLE or M4A, fit as a file suffix; Ogg that holds Opus is `opus`, MPEG layers 1 and 2 are `mpeg`."""
    content_type: str
    """The MIME type for a data URI; video/... only where there is a moving picture."""
    codec: str
    """FFmpeg's name, such as pcm_s16le, mp3 or opus."""
    duration_ms: int
    sample_rate: int
    channels: int


def probe(
    source: BinaryIO,
    *,
    containers: Collection[str],
    max_ms: int | None = None,
    listen: "Callable[[av.AudioFrame], None] | None" = None,
) -> Recording:
    """Tell what a file holds by decoding it, as far as `max_ms` if that is given.

    `containers` are names of RECOGNIZABLE, or M4A where memory is limited. The duration is that of the samples a
    player would play, whatever the headers say; PCM in WAV is measured by the bytes that are there, and read only for
    `listen`, which is given all that decodes.
    Blocks for PROBE_SECONDS at most, not counting the last read: call it in a thread. Keeps a few megabytes in
    memory. The source stays open, at no position in particular.

    Raises InvalidAudio for everything that is no audio in one of these containers or takes too long to decode, and
    AudioTooLong for what plays longer than `max_ms`, give or take PADDING_MS.
    """
    import av

    view = _View(source, read_wav(source), time.monotonic() + PROBE_SECONDS)
    if not view.size:
        raise InvalidAudio("音频文件为空，请重新上传")
    try:
        with _open(view, containers) as opened:
            return _examine(opened, view, containers, max_ms, listen)
    except av.error.FFmpegError as error:
        _require_time(view)
        raise _unrecognized(view, containers) from error


def _open(view: "_View", containers: Collection[str]) -> "av.container.InputContainer":
    """Open with FFmpeg on its leash; what it does not recognize raises FFmpegError."""
    import av

    candidates = {view.sealed} if view.sealed else RECOGNIZABLE - _SEALED
    demuxers = {_DEMUXERS[name] for name in candidates.intersection(containers)}
    leash = {
        "format_whitelist": ",".join(sorted(demuxers)) or "none",
        "codec_whitelist": _decoders(view),
        "protocol_whitelist": "",
        "max_streams": str(MAX_STREAMS),
        "probesize": str(MAX_PROBED_BYTES),
    }
    # Tags are often in GBK or worse.
    return av.open(view, "r", container_options=leash, metadata_errors="replace")


def _examine(
    opened: "av.container.InputContainer",
    view: "_View",
    containers: Collection[str],
    max_ms: int | None,
    listen: "Callable[[av.AudioFrame], None] | None",
) -> Recording:
    import av
    from av.stream import Discard, Disposition

    stream = opened.streams.best("audio")
    if not isinstance(stream, av.AudioStream):
        raise InvalidAudio("文件中没有音轨，请上传含有声音的文件")
    decoder = getattr(stream.codec_context, "name", None)  # there is no context where FFmpeg has no decoder
    if decoder not in _decoders(view).split(","):
        raise InvalidAudio(f"不支持该音频编码{f'（{decoder}）' if decoder else ''}，请转换为 mp3 或 wav 后重新上传")
    if not (0 < stream.sample_rate <= MAX_SAMPLE_RATE and 0 < stream.channels <= MAX_CHANNELS):
        raise InvalidAudio(
            f"采样率或声道数不受支持（最高 {MAX_SAMPLE_RATE} Hz、{MAX_CHANNELS} 声道），请转换后重新上传"
        )
    codec = stream.codec_context.codec.canonical_name
    has_picture = any(not video.disposition & Disposition.attached_pic for video in opened.streams.video)
    container = _container(opened.format.name, codec, has_picture, view)
    if container not in containers:
        raise _unrecognized(view, containers)
    for other in opened.streams:
        if other.index != stream.index:
            other.discard = Discard.all
    pcm_bytes = view.wav.data_bytes if view.wav and codec.startswith("pcm_") else None
    duration_ms = _measure_ms(opened, stream, view, pcm_bytes, max_ms, listen)
    if duration_ms is None:
        raise _unrecognized(view, containers)
    content_type = _CONTENT_TYPES[container]
    return Recording(
        container=container,
        content_type=content_type.replace("audio/", "video/") if has_picture else content_type,
        codec=codec,
        duration_ms=duration_ms,
        sample_rate=stream.sample_rate,
        channels=stream.channels,
    )


def _decoders(view: "_View") -> str:
    return _M4A_DECODERS if view.sealed == M4A else _DECODERS


def _container(demuxer: str, codec: str, has_picture: bool, view: "_View") -> str:
    match demuxer:
        case "asf":
            return "wmv" if has_picture else "wma"
        case "matroska,webm":
            return "webm" if view.begins_as_webm() else "mkv"
        case "mov,mp4,m4a,3gp,3g2,mj2":
            return M4A
        case "mp3":
            return "mp3" if codec == "mp3" else "mpeg"
        case "mpegts":
            return "mpeg"
        case "ogg":
            return "opus" if codec == "opus" else "ogg"
    return demuxer


def _measure_ms(
    opened: "av.container.InputContainer",
    stream: "av.AudioStream",
    view: "_View",
    pcm_bytes: int | None,
    max_ms: int | None,
    listen: "Callable[[av.AudioFrame], None] | None",
) -> int | None:
    """Decode and add up, or with the size of all PCM judge by the beginning. None when it does not decode.

    Packets that fail are skipped, but must be the smaller part: frame headers also turn up in what is no audio.
    """
    import av

    duration_ms = 0.0
    decoded = failed = 0
    for packet in _packets(opened, stream):
        _require_time(view)
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            failed += 1
            continue
        decoded += 1
        if pcm_bytes is None:
            duration_ms += sum(frame.samples * 1000 / frame.sample_rate for frame in frames)
        elif frames and not duration_ms:
            frame_bytes = packet.size // sum(frame.samples for frame in frames)
            duration_ms = pcm_bytes // frame_bytes * 1000 / stream.sample_rate
        if max_ms is not None and duration_ms > max_ms + PADDING_MS:
            raise AudioTooLong(
                f"音频时长至少 {duration_ms / 1000:.1f} 秒，超过 {max_ms / 1000:g} 秒的限制，请剪短后重新上传"
            )
        if listen is not None:
            for frame in frames:
                listen(frame)
        elif frames and pcm_bytes is not None:
            break
    _require_time(view)
    return round(duration_ms) if duration_ms and failed < decoded else None


def _packets(opened: "av.container.InputContainer", stream: "av.AudioStream") -> "Iterator[av.Packet[av.AudioStream]]":
    """The packets up to the end, or to where the file is damaged beyond reading."""
    import av

    # PyAV stumbles, with an IndexError, at the end over streams that turned up late.
    with suppress(IndexError, av.error.FFmpegError):
        yield from opened.demux(stream)


def _require_time(view: "_View") -> None:
    if view.is_over:
        raise InvalidAudio("音频解析超时，请转换为 mp3 或 wav 后重新上传")


def _unrecognized(view: "_View", containers: Collection[str]) -> InvalidAudio:
    if view.sealed in containers:
        return InvalidAudio(f"{view.sealed} 文件已损坏或不完整，没有可播放的声音，请重新导出后上传")
    supported = "、".join(sorted(containers))
    if _resembles_pcm(view.middle()):
        return InvalidAudio(f"无法识别音频格式；如果是裸 PCM 数据，请封装为 WAV 后上传。支持的格式：{supported}")
    return InvalidAudio(f"不是可识别的音频文件，请上传以下格式之一：{supported}")


def _resembles_pcm(content: bytes) -> bool:
    """Whether 16-bit samples wander as sound does, in small steps around their mean."""
    samples = array("h", content[: len(content) // 2 * 2])
    if not samples:
        return False
    mean = sum(samples) / len(samples)
    steps = sum(abs(after - before) for before, after in pairwise(samples))
    return 0 < steps < sum(abs(sample - mean) for sample in samples) / 2


class _View:
    """The file as FFmpeg sees it: no name, no tags, nothing after the deadline, and seeking never fails.

    Of a WAV file it is the form and the data only: FFmpeg allocates whatever size the other chunks claim.
    """

    def __init__(self, source: BinaryIO, wav: Wav | None, deadline: float) -> None:
        self.wav = wav
        self._source = source
        self._deadline = deadline
        self._position = 0
        if wav is None:
            self._head = b""
            self._start = _skip_tags(source)
            self.size = max(0, source.seek(0, os.SEEK_END) - self._start)
        else:
            self._head = _wav_head(wav)
            self._start = wav.data.start - len(self._head)
            self.size = len(self._head) + wav.data_bytes
        self.sealed = "wav" if wav else M4A if is_mp4(read_head(source)) else None
        """What this is tried as and nothing else, if it is one of _SEALED."""

    @property
    def is_over(self) -> bool:
        """Whether the time for probing is used up."""
        return time.monotonic() > self._deadline

    def read(self, size: int) -> bytes:
        if self.is_over:
            return b""
        head = self._head[self._position : self._position + size]
        content = head or self._read_source(min(size, self.size - self._position))
        self._position += len(content)
        return content

    def _read_source(self, size: int) -> bytes:
        # Some bytes more on both sides, for tags that lie across the edges.
        before = min(TAG_HEADER_BYTES, self._start + self._position)
        self._source.seek(self._start + self._position - before)
        content = self._source.read(before + size + TAG_HEADER_BYTES)
        if b"ID3" in content:
            content = _TAG.sub(bytes(TAG_HEADER_BYTES), content)
        return content[before : before + size]

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = min(max(0, origin + offset), self.size)
        return self._position

    def tell(self) -> int:
        return self._position

    def begins_as_webm(self) -> bool:
        """Whether the document type, near the beginning of every Matroska file, is WebM. Moves nothing."""
        self._source.seek(self._start)
        return b"\x42\x82\x84webm" in self._source.read(64)

    def middle(self) -> bytes:
        """Bytes from the middle, beginning at an even offset."""
        self.seek(max(0, self.size - HINT_BYTES) // 4 * 2)
        return self.read(HINT_BYTES)


def read_head(source: BinaryIO) -> bytes:
    """The first bytes behind the tags in front: what containers are known by."""
    source.seek(_skip_tags(source))
    return source.read(HEAD_BYTES)


def is_mp4(head: bytes) -> bool:
    """Whether a file that begins like this is MP4, of whatever kind."""
    return head[4:8] == b"ftyp"


def _wav_head(wav: Wav) -> bytes:
    form = struct.pack("<4sI", b"fmt ", len(wav.form)) + wav.form + bytes(len(wav.form) % 2)
    size = min(wav.data_bytes, MAX_SIZE)
    return struct.pack("<4sI4s", b"RIFF", MAX_SIZE, b"WAVE") + form + struct.pack("<4sI", b"data", size)


def _skip_tags(source: BinaryIO) -> int:
    """Where the audio begins: after the ID3v2 tags, which may be larger than it."""
    offset = 0
    for _ in range(MAX_TAGS):
        source.seek(offset)
        header = source.read(TAG_HEADER_BYTES)
        if not _TAG.fullmatch(header):
            break
        size = 0
        for byte in header[6:]:
            size = size << 7 | byte
        has_footer = bool(header[5] & 0x10)
        offset += TAG_HEADER_BYTES + size + TAG_HEADER_BYTES * has_footer
    return offset
