"""Whether a voice sample that a user uploaded is fit for cloning: judged by its content and never by its name.

Strangers upload these files. WAV and MP3 are probed in a thread, as app.recordings does it. But an MP4 can make FFmpeg
take a thousand times its size (measured: 440 MB for 400 KB), so every M4A gets a process of its own, this very module:
it sees the file as its standard input, may open nothing else, and its memory, its processor time and its life are
limited.

Measured on two cores: a minute of AAC takes 0.3 s, half of which is the start of the process, and 2 MB on top of Python
and FFmpeg. Workers that are kept would save the start, but those of app.computation serve others, who need more memory
than these may have, and a worker that hostile bytes went through had better not live on.
"""

import json
import math
import os
import re
import resource
import shutil
import signal
import sys
from array import array
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from logging import getLogger
from pathlib import Path
from tempfile import TemporaryFile
from types import MappingProxyType
from typing import TYPE_CHECKING, BinaryIO, cast

import anyio.abc
from anyio import CancelScope, CapacityLimiter, fail_after, open_process, to_thread
from anyio.lowlevel import RunVar

from app.audio import read_wav
from app.errors import AudioTooLarge, AudioTooLong, InvalidAudio
from app.recordings import M4A, PADDING_MS, is_mp4, probe, read_head

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame

MAX_BYTES = 10 * 1024 * 1024
MIN_MS = 5_000
MAX_MS = 60_000
MIN_SAMPLE_RATE = 16_000
MAX_CHANNELS = 2
CONTAINERS = frozenset({"wav", "mp3", M4A})
# Of full scale, between the lowest and the highest sample: a microphone that is on is far above.
SILENCE = 1 / 1000

PROBES_AT_ONCE = 2
CHILD_SECONDS = 8.0
CHILD_BYTES = 256 * 1024 * 1024  # of address space, half of which are FFmpeg's libraries
# Enough for Python to find itself. What else is in the environment are secrets.
CHILD_ENVIRONMENT = ("PYTHON", "LD_", "DYLD_")
LATE_MODULES = ("av", "av.subtitles.codeccontext", "av.subtitles.stream")  # imported with the first file
_PROJECT = Path(__file__).resolve().parent.parent
_READY = b"ready\n"

_TAKEN = "16 位 PCM 的 WAV、MP3 或 M4A"
_WAV = re.compile(rb"RIFF....WAVE", re.DOTALL)
# How other files begin: formats that users mistake for one that is taken.
_OTHERS: Mapping[str, "re.Pattern[bytes]"] = MappingProxyType(
    {
        name: re.compile(beginning, re.DOTALL)
        for name, beginning in {
            "AAC (ADTS)": rb"\xff[\xf0\xf1\xf8\xf9]",
            "AIFF": rb"FORM....AIF[FC]",
            "AMR": rb"#!AMR",
            "APE": rb"MAC ",
            "AU": rb"\.snd",
            "AVI": rb"RIFF....AVI ",
            "CAF": rb"caff",
            "FLAC": rb"fLaC",
            "FLV": rb"FLV\x01",
            "MIDI": rb"MThd",
            "MP2": rb"\xff[\xf4\xf5\xfc\xfd]",
            "MPEG": rb"\0\0\x01[\xb3\xba]|(G.{187}){2}G",
            "Matroska/WebM": rb"\x1aE\xdf\xa3",
            "Ogg": rb"OggS",
            "QuickTime (MOV)": rb"....(ftypqt  |moov|mdat|wide|free|skip|pnot)",
            "RF64/W64": rb"RF64|riff\x2e\x91\xcf\x11",
            "WMA/WMV": rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11",
            "WavPack": rb"wvpk",
        }.items()
    }
)
_CODINGS: Mapping[str, str] = MappingProxyType(
    {
        "pcm_alaw": "A-law",
        "pcm_f32le": "32 位浮点",
        "pcm_f64le": "64 位浮点",
        "pcm_mulaw": "μ-law",
        "pcm_s24le": "24 位 PCM",
        "pcm_s32le": "32 位 PCM",
        "pcm_u8": "8 位 PCM",
    }
)
_FULL_SCALE: Mapping[str, tuple[str, float]] = MappingProxyType(
    {"flt": ("f", 2.0), "s16": ("h", 2.0**16), "s32": ("i", 2.0**32)}
)

log = getLogger(__name__)
_probing: RunVar[CapacityLimiter] = RunVar("app.samples")


@dataclass(frozen=True, slots=True)
class Sample:
    """A voice sample that the provider takes for cloning."""

    container: str
    """wav, mp3 or m4a: fit as a file suffix."""
    content_type: str
    """audio/wav, audio/mpeg or audio/mp4."""
    duration_ms: int
    """Of what a player would play, whatever the headers say."""
    sample_rate: int
    channels: int


async def examine_sample(source: BinaryIO) -> Sample:
    """Measure a sample and hold it against the provider's rules.

    PROBES_AT_ONCE are examined at a time in each event loop, the others wait. The source stays open, at no position in
    particular; it must not be used meanwhile.

    Raises InvalidAudio, or AudioTooLarge of these, with what is wrong and what to do. Raises RuntimeError where the
    process for M4A does not start.
    """
    async with _limiter():
        if await to_thread.run_sync(_needs_confinement, source):
            return await _examine_confined(source)
        return await to_thread.run_sync(_examine, source)


def _limiter() -> CapacityLimiter:
    limiter = _probing.get(None)
    if limiter is None:
        limiter = CapacityLimiter(PROBES_AT_ONCE)
        _probing.set(limiter)
    return limiter


def _needs_confinement(source: BinaryIO) -> bool:
    """Whether this is MP4. Raises InvalidAudio where the size or the first bytes say enough."""
    size = source.seek(0, os.SEEK_END)
    if not size:
        raise InvalidAudio("音频文件为空（0 字节），请重新选择录音后上传")
    if size > MAX_BYTES:
        raise AudioTooLarge(f"音频文件有 {size} 字节，超过 {MAX_BYTES} 字节（10 MB）的限制，请剪短或压缩后重新上传")
    head = read_head(source)
    for name, beginning in _OTHERS.items():
        if beginning.match(head):
            raise InvalidAudio(f"文件是 {name} 格式，声音复刻只支持 {_TAKEN}，请转换后重新上传")
    if _WAV.match(head) and read_wav(source) is None:
        raise InvalidAudio("WAV 文件不完整，其中没有音频数据，请重新导出后上传")
    return is_mp4(head)


def _examine(source: BinaryIO) -> Sample:
    """Decode and judge. Blocks."""
    heard = _Heard()
    try:
        recording = probe(source, containers=CONTAINERS, max_ms=MAX_MS, listen=heard.listen)
    except AudioTooLong as error:
        raise InvalidAudio(error.message) from error
    if recording.content_type.startswith("video/"):
        raise InvalidAudio(f"文件是带画面的 MP4 视频，声音复刻只支持 {_TAKEN}，请只导出声音后重新上传")
    if recording.container == "wav" and recording.codec != "pcm_s16le":
        coding = _CODINGS.get(recording.codec, f"{recording.codec} 编码")
        raise InvalidAudio(f"WAV 文件是 {coding}，声音复刻要求 16 位 PCM，请转换为 16 位 WAV 后重新上传")
    if heard.sample_rate < MIN_SAMPLE_RATE:
        raise InvalidAudio(
            f"音频采样率为 {heard.sample_rate} Hz，声音复刻要求不低于 {MIN_SAMPLE_RATE} Hz，请以更高的采样率重新录制"
        )
    if heard.channels > MAX_CHANNELS:
        raise InvalidAudio(f"音频有 {heard.channels} 个声道，声音复刻只支持单声道或双声道，请转换后重新上传")
    if recording.duration_ms < MIN_MS - PADDING_MS:
        raise InvalidAudio(
            f"音频时长为 {recording.duration_ms / 1000:.1f} 秒，声音复刻要求不少于 {MIN_MS // 1000} 秒，"
            f"请上传 {MIN_MS // 1000} 至 {MAX_MS // 1000} 秒的录音"
        )
    if heard.is_silent:
        raise InvalidAudio("音频从头到尾都没有声音，请检查麦克风后重新录制")
    return Sample(recording.container, recording.content_type, recording.duration_ms, heard.sample_rate, heard.channels)


class _Heard:
    """What really came out of the decoder."""

    def __init__(self) -> None:
        self.sample_rate = 0
        self.channels = 0
        self._lowest = math.inf
        self._highest = -math.inf

    @property
    def is_silent(self) -> bool:
        """Whether the samples, which may be off zero, hardly ever moved."""
        return self._highest - self._lowest < SILENCE

    def listen(self, frame: "AudioFrame") -> None:
        """Take in a frame. Its samples are looked at until one was loud."""
        self.sample_rate = min(self.sample_rate or frame.sample_rate, frame.sample_rate)
        self.channels = max(self.channels, frame.layout.nb_channels)
        kind = frame.format.packed.name
        if kind not in _FULL_SCALE or not self.is_silent:
            return
        code, full_scale = _FULL_SCALE[kind]
        samples_per_plane = frame.samples if frame.format.is_planar else frame.samples * frame.layout.nb_channels
        for plane in frame.planes:
            samples = array(code, bytes(plane))[:samples_per_plane]
            self._lowest = min(self._lowest, min(samples, default=math.inf) / full_scale)
            self._highest = max(self._highest, max(samples, default=-math.inf) / full_scale)


async def _examine_confined(source: BinaryIO) -> Sample:
    with TemporaryFile() as copy:
        await to_thread.run_sync(_copy, source, copy)
        try:
            with fail_after(CHILD_SECONDS):
                status, output = await _run_child(copy)
        except TimeoutError as error:
            raise InvalidAudio("M4A 解析超时，请转换为 mp3 或 wav 后重新上传") from error
    ready, _, answer = output.partition(_READY)
    if ready or _READY not in output:
        raise RuntimeError(f"The process that examines M4A does not start: it ended with {status}")
    if status:
        log.warning("The process that examines M4A ended with %s", status)
        raise InvalidAudio("M4A 文件结构异常，无法解析，请转换为 mp3 或 wav 后重新上传")
    said = json.loads(answer)
    if isinstance(said, str):
        raise InvalidAudio(said)
    return Sample(**said)


def _copy(source: BinaryIO, copy: BinaryIO) -> None:
    source.seek(0)
    shutil.copyfileobj(source, copy)
    copy.flush()


async def _run_child(audio: BinaryIO) -> tuple[int, bytes]:
    """Have a file judged by this module in a process of its own; give its exit status and its output."""
    with CancelScope(shield=True):  # it takes a moment; cancelled in the middle, nobody would wait for the process
        process = await open_process(
            [sys.executable, "-m", __name__],
            stdin=audio,
            stderr=None,
            cwd=_PROJECT,
            env={name: value for name, value in os.environ.items() if name.startswith(CHILD_ENVIRONMENT)},
            start_new_session=True,
        )
    async with process:
        stdout = cast(anyio.abc.ByteReceiveStream, process.stdout)
        try:
            output = b"".join([part async for part in stdout])
            return await process.wait(), output
        except BaseException:
            with suppress(ProcessLookupError):
                process.kill()
            raise


def _main() -> None:
    """Judge standard input, and answer on standard output: with the fields of a Sample, or with what is wrong."""
    _confine()
    sys.stdout.buffer.write(_READY)
    sys.stdout.flush()
    try:
        answer: object = asdict(_examine(sys.stdin.buffer))
    except InvalidAudio as error:
        answer = error.message
    sys.stdout.write(json.dumps(answer))


def _confine() -> None:
    """Take away what hostile bytes could use: from here on no file can be opened, no socket, and no module."""
    for module in LATE_MODULES:
        import_module(module)
    signal.alarm(math.ceil(CHILD_SECONDS))
    _limit(resource.RLIMIT_CPU, math.ceil(CHILD_SECONDS))
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, 0)
    try:
        _limit(resource.RLIMIT_AS, CHILD_BYTES)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"The memory for examining M4A is not limited on this system: {error}\n")


def _limit(what: int, most: int) -> None:
    hard = resource.getrlimit(what)[1]
    allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (allowed, allowed))


if __name__ == "__main__":
    _main()
