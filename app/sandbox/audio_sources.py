"""Where audio comes from: a data URI, a temporary file (§6), the sandbox's own object storage, or anywhere else.

Nothing is ever fetched from elsewhere. A URL of another host is presumed to hold speech, four seconds for recognition,
unless the name of its file, without its suffix, is one of these:

    missing       the download answers 404          forbidden    the download answers 403
    unreachable   there is no download              broken       no audio
    silent        four seconds without speech       long         thirteen hours of speech
    short         half a second of speech
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal
from urllib.parse import SplitResult, parse_qsl, unquote_to_bytes, urlsplit

from app.sandbox.hearing import STRANGE_SPEECH, Ear, Heard, NotDecodable, Sound, Speech
from app.sandbox.oss_errors import OssError
from app.sandbox.oss_signature import OssRequest
from app.sandbox.request_log import SeenRequest
from app.sandbox.temporary_files import TemporaryFiles

LONGEST_DATA_URI: Final = 10_485_760

Reason = Literal["not_a_url", "unresolved", "missing", "forbidden", "unreachable", "empty", "data_too_long"]

_URL: Final = re.compile(r"[!-~]+")
_DATA_URI: Final = re.compile(r"data:([^,;]*)(?:;[^,;]*)*;base64,", re.IGNORECASE)
_PCM_TYPES: Final = frozenset({"audio/pcm", "audio/l16"})
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_PRESUMED: Final = Heard(4.0, "mp3", "mp3", 16000, (Speech(100, 3900),), STRANGE_SPEECH)
_PRESUMED_BY_NAME: Final = {
    "silent": replace(_PRESUMED, channels=(None,), text=""),
    "long": replace(_PRESUMED, seconds=46_800.0, channels=(Speech(100, 46_799_900),)),
    "short": replace(_PRESUMED, seconds=0.5, channels=(Speech(100, 400),)),
}
_FAILING_NAMES: Final[dict[str, Reason]] = {
    "missing": "missing",
    "forbidden": "forbidden",
    "unreachable": "unreachable",
}


class AudioUnavailable(Exception):
    """The audio can't be had; the services word the reason each in their own way."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Asker:
    """On whose behalf audio is read. `host` is the sandbox as the caller named it."""

    api_key: str
    model: str
    host: str
    resolves_oss: bool


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A file of another host: all that is known of it is its name, without suffix."""

    name: str

    def heard(self, usually: Heard = _PRESUMED) -> Heard:
        """What the file is presumed to hold; `NotDecodable` if that is no audio."""
        if self.name == "broken":
            raise NotDecodable
        return _PRESUMED_BY_NAME.get(self.name, usually)


class AudioSources:
    """Reads audio and listens to it. `read_object` reads the object storage as anybody with the URL could."""

    def __init__(self, ear: Ear, files: TemporaryFiles, read_object: Callable[[OssRequest], bytes]) -> None:
        self._ear = ear
        self._files = files
        self._read_object = read_object

    async def listen(self, url: str, asker: Asker, seen: SeenRequest, *, largest: int | None = None) -> Heard:
        """What is heard behind a URL; `AudioUnavailable`, `NotDecodable`, or `AudioTooLarge` beyond `largest` bytes."""
        found = await self.find(url, asker, seen, largest=largest)
        return found.heard() if isinstance(found, Elsewhere) else await self._ear.listen(found)

    async def find(self, url: str, asker: Asker, seen: SeenRequest, *, largest: int | None = None) -> Sound | Elsewhere:
        """The content behind a URL; `AudioUnavailable`, or `AudioTooLarge` beyond `largest` bytes."""
        found = await self._find(url, asker, seen)
        if isinstance(found, Elsewhere):
            return found
        seen.audio_bytes = (seen.audio_bytes or 0) + len(found.content)
        if largest is not None and len(found.content) > largest:
            raise AudioTooLarge
        if not found.content:
            raise AudioUnavailable("empty")
        return found

    async def _find(self, url: str, asker: Asker, seen: SeenRequest) -> Sound | Elsewhere:
        if url[:5].lower() == "data:":
            seen.audio_source = "data"
            return await asyncio.to_thread(_read_data_uri, url)
        if url.startswith("oss://"):
            seen.audio_source = "oss"
            return self._temporary_file(url.removeprefix("oss://"), asker)
        seen.audio_source = "url"
        parts = _split(url)
        if not _is_own(parts, asker.host):
            return _presume(parts)
        return Sound(self._own_object(parts, asker.host), is_pcm=parts.path.lower().endswith(".pcm"))

    def _temporary_file(self, key: str, asker: Asker) -> Sound:
        if not asker.resolves_oss:
            raise AudioUnavailable("unresolved")
        content = self._files.read(key, asker.api_key, asker.model)
        if content is None:
            raise AudioUnavailable("missing")
        return Sound(content, is_pcm=key.lower().endswith(".pcm"))

    def _own_object(self, parts: SplitResult, host: str) -> bytes:
        query = parse_qsl(parts.query, keep_blank_values=True)
        try:
            return self._read_object(OssRequest("GET", unquote_to_bytes(parts.path), query, {"host": host.encode()}))
        except OssError as error:
            raise AudioUnavailable("missing" if error.status == 404 else "forbidden") from error


class AudioTooLarge(Exception):
    """More bytes than the service takes."""


def file_name(path: str) -> str:
    """The name of a file without its folders and its suffix."""
    return posixpath.splitext(posixpath.basename(path))[0]


def is_audio_url(url: str) -> bool:
    """Whether this is an http(s) URL as it must be written, or one of a temporary file."""
    try:
        _split(url)
    except AudioUnavailable:
        return url.startswith("oss://")
    return True


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise AudioUnavailable("not_a_url") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not _URL.fullmatch(url):
        raise AudioUnavailable("not_a_url")
    return parts


def _is_own(parts: SplitResult, host: str) -> bool:
    """Whether a URL points at the sandbox itself, by the name it was called or by any name of this machine."""
    called = urlsplit(f"//{host}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if port != (called.port or 80):
        return False
    return parts.hostname == called.hostname or parts.hostname in _LOOPBACK


def _presume(parts: SplitResult) -> Elsewhere:
    name = file_name(parts.path)
    if name in _FAILING_NAMES:
        raise AudioUnavailable(_FAILING_NAMES[name])
    return Elsewhere(name)


def _read_data_uri(url: str) -> Sound:
    if len(url) > LONGEST_DATA_URI:
        raise AudioUnavailable("data_too_long")
    head = _DATA_URI.match(url, 0, 256)
    if head is None:
        raise AudioUnavailable("not_a_url")
    try:
        content = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise NotDecodable from None
    return Sound(content, is_pcm=head[1].lower() in _PCM_TYPES)
