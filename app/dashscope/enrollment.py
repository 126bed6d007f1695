"""Cloned voices: the provider's enrollment service (PROTOCOL §3)."""

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import structlog

from app.dashscope.answers import read_moment, read_object, read_text
from app.dashscope.credential import Credential
from app.dashscope.http import HttpClient
from app.dashscope.uploads import RESOLVE_UPLOADS
from app.errors import UnclearAnswer, UpstreamError
from app.probes import provider_call

log = structlog.get_logger(__name__)

PATH = "/services/audio/tts/customization"
SERVICE = "voice-enrollment"
PAGE_SIZE = 100  # the largest that is allowed is not documented (§14): see `_may_continue`
DEFAULT_PAGE_SIZE = 10
MAX_PAGES = 200
MAX_VOICE_ID_CHARS = 128
MAX_MODEL_CHARS = 64

VoiceStatus = Literal["DEPLOYING", "OK", "UNDEPLOYED"]
_STATUSES: dict[str, VoiceStatus] = {"DEPLOYING": "DEPLOYING", "OK": "OK", "UNDEPLOYED": "UNDEPLOYED"}
WaitForTurn = Callable[[Credential], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class CloningOrder:
    """What voice is to be made: the model it will speak with, the middle part of its id, the sample's languages."""

    target_model: str
    prefix: str
    language_hints: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class VoiceReport:
    """What the provider says of a voice. Its list tells neither the model nor the sample."""

    voice_id: str
    status: VoiceStatus
    created_at: datetime
    modified_at: datetime
    target_model: str | None = None
    resource_link: str | None = None


class EnrollmentClient:
    """Makes, lists, changes and deletes the voices of an account. All actions share one rate limit (§3)."""

    def __init__(self, http: HttpClient, wait_for_turn: WaitForTurn) -> None:
        self._http = http
        self._wait_for_turn = wait_for_turn

    async def create(self, credential: Credential, order: CloningOrder, url: str) -> str:
        """Have a voice made of the sample behind a URL; gives its id. It is DEPLOYING then.

        Raises the AppError that a refusal means. After UnclearAnswer, and every UpstreamTimeout or ConnectionLost but
        those of a connection that never came up, the voice may exist all the same.
        """
        asked: dict[str, Any] = {"target_model": order.target_model, "prefix": order.prefix, "url": url}
        if order.language_hints:
            asked["language_hints"] = list(order.language_hints)
        output = await self._ask(credential, "create_voice", asked)
        voice_id = read_text(output.get("voice_id"))
        if voice_id is None or len(voice_id) > MAX_VOICE_ID_CHARS:
            raise UnclearAnswer("百炼平台没有返回音色ID")
        return voice_id

    async def find(self, credential: Credential, prefix: str | None = None) -> list[VoiceReport]:
        """All voices of the account, or those of a prefix. Raises the AppError that a refusal means.

        What is refused without a better reason is asked for in pages of the default size.
        """
        try:
            return await self._find(credential, prefix, PAGE_SIZE)
        except UpstreamError as error:
            if type(error) is not UpstreamError:
                raise
            log.warning("provider_page_size_refused", page_size=PAGE_SIZE)
            return await self._find(credential, prefix, DEFAULT_PAGE_SIZE)

    async def _find(self, credential: Credential, prefix: str | None, page_size: int) -> list[VoiceReport]:
        asked: dict[str, Any] = {"page_size": page_size} | ({"prefix": prefix} if prefix else {})
        found: dict[str, VoiceReport] = {}
        largest = 0
        for page_index in range(MAX_PAGES):
            output = await self._ask(credential, "list_voice", {**asked, "page_index": page_index}, is_free=True)
            listed = output.get("voice_list")
            if not isinstance(listed, list):
                raise UnclearAnswer
            reports = [report for entry in listed if (report := read_report(read_object(entry)))]
            known = len(found)
            found |= {report.voice_id: report for report in reports}
            largest = max(largest, len(listed))
            if len(found) == known or not _may_continue(len(listed), largest, page_size):
                return list(found.values())
        log.warning("provider_voice_list_endless", pages=MAX_PAGES)
        raise UnclearAnswer

    async def query(self, credential: Credential, voice_id: str) -> VoiceReport:
        """One voice. Raises VoiceNotFound, also for a voice of another account, or another AppError."""
        output = await self._ask(credential, "query_voice", {"voice_id": voice_id}, is_free=True)
        report = read_report({**output, "voice_id": voice_id})
        if report is None:
            raise UnclearAnswer
        return report

    async def update(self, credential: Credential, voice_id: str, url: str) -> None:
        """Have a cloned voice made anew of another sample. Raises as `create` does, and VoiceNotFound."""
        await self._ask(credential, "update_voice", {"voice_id": voice_id, "url": url})

    async def delete(self, credential: Credential, voice_id: str) -> None:
        """Delete a voice for good. Raises VoiceNotFound, or another AppError; it may be gone then, as `create` says."""
        await self._ask(credential, "delete_voice", {"voice_id": voice_id})

    async def _ask(
        self, credential: Credential, action: str, asked: dict[str, Any], *, is_free: bool = False
    ) -> dict[str, Any]:
        await self._wait_for_turn(credential)
        headers = RESOLVE_UPLOADS if str(asked.get("url")).startswith("oss://") else None
        body = {"model": SERVICE, "input": {"action": action, **asked}}
        with provider_call("voice", asked.get("target_model")):
            answer = await self._http.post(credential, PATH, body, headers, is_free=is_free)
        return read_object(answer.get("output"))


def read_report(entry: dict[str, Any]) -> VoiceReport | None:
    """Read what a list or a query tells of a voice; None for what is none."""
    voice_id, told = read_text(entry.get("voice_id")), entry.get("status")
    if voice_id is None or len(voice_id) > MAX_VOICE_ID_CHARS:
        log.warning("provider_voice_unreadable", voice_id=voice_id and voice_id[:64])
        return None
    status = _STATUSES.get(told) if isinstance(told, str) else None
    if status is None:
        log.warning("provider_voice_status_unknown", voice_id=voice_id, status=str(told)[:32])
        status = "DEPLOYING"
    model = read_text(entry.get("target_model"))
    now = datetime.now(UTC).replace(microsecond=0)
    created_at = read_moment(entry.get("gmt_create")) or now
    return VoiceReport(
        voice_id=voice_id,
        status=status,
        created_at=created_at,
        modified_at=read_moment(entry.get("gmt_modified")) or created_at,
        target_model=model if model and len(model) <= MAX_MODEL_CHARS else None,
        resource_link=read_text(entry.get("resource_link")),
    )


def _may_continue(size: int, largest: int, page_size: int) -> bool:
    """Whether more may come after a page of this size: it is full, or as full as a lower limit of theirs would have it.

    Limits are round numbers, and no page before was larger.
    """
    return size > 0 and (size >= page_size or (size == largest and math.gcd(size, 10) == 10))
