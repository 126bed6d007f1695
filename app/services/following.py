"""Following voices at the provider until they are ready or rejected, even if nobody asks, and finding lost ones."""

import asyncio
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog
from sqlalchemy.exc import IntegrityError

from app.catalog import read_voice_id
from app.dashscope import Credential, EnrollmentClient, VoiceReport
from app.errors import AppError, NoApiKey, UpstreamTimeout, VoiceNotFound
from app.inflight import InFlight
from app.jobs import Rounds, again_in
from app.models import Enrollment
from app.services.accounts import AccountService
from app.services.enrollments import ClaimedEnrollment, OpenEnrollments
from app.services.voicebook import VoiceBook

log = structlog.get_logger(__name__)

SHORTEST_INTERVAL_SECONDS = 2.0
FRESH = timedelta(seconds=1.5)  # who waits for a voice asks more often: what that brings is enough
LONGEST_INTERVAL_SECONDS = 60.0
AGE_SHARE = 0.2  # of the time waited until now, a voice is given until the next check
# Checks in a row that know of no such voice, until that is believed.
GONE_BELIEVED = 3
# How long a voice whose answer was lost may take to turn up, with a provider that can be asked. Its record says earlier
# that it failed, and is corrected if need be.
LOST_FOR = timedelta(minutes=10)
DESPAIR = timedelta(seconds=30)
INSPECTION_SECONDS = 60.0
CLOCKS_DIFFER = timedelta(minutes=1)  # ours and the provider's, at most
LOST_SO_FAR = "百炼平台没有返回结果，至今也没有出现新的音色；后台还会查找一段时间，找到后更新本记录"
LOST_FOR_GOOD = "百炼平台没有返回结果，之后也没有出现新的音色，请重新创建"
HOPELESS = timedelta(days=1)
FOLLOWED_FOR = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Sought:
    """What a search brought: the voice, or nothing; `is_open` if there are new ones that can't be told apart yet."""

    voice_id: str | None
    is_open: bool = False


class VoiceFollower(Rounds[Enrollment]):
    """Checks voices that are being made: in the background with growing intervals, and at once when somebody asks."""

    def __init__(
        self,
        enrollments: OpenEnrollments,
        book: VoiceBook,
        accounts: AccountService,
        client: EnrollmentClient,
        in_flight: InFlight,
    ) -> None:
        super().__init__(enrollments, in_flight)
        self._enrollments = enrollments
        self._book = book
        self._accounts = accounts
        self._client = client

    async def seek(self, claimed: ClaimedEnrollment, credential: Credential, *, is_told: bool = False) -> Sought:
        """Look in the provider's list for a voice that a lost answer may have named, and end the record with it.

        `is_told` says that the client who ordered it hears of it. Raises the AppError that kept it from an answer.
        """
        row = claimed.row
        asked_at = datetime.now(UTC)
        listed = await self._client.find(credential, listed_prefix(row.prefix))
        mine = [each for each in _not_there_before(listed, claimed) if _is_of(each.voice_id, row)]
        taken = await self._enrollments.attributed(claimed, [each.voice_id for each in mine])
        new = [each for each in mine if each.voice_id not in taken][::-1]  # of a list whose newest come first
        new.sort(key=lambda each: each.created_at)  # in whole seconds
        orders = await self._enrollments.lost_rivals(claimed)
        if not new:
            return Sought(None)
        if orders is None or (len(new) < len(orders) and not _is_over(row.lost_at, DESPAIR)):
            return Sought(None, is_open=True)
        mine_among_orders = orders.index(row.record_id)
        if mine_among_orders >= len(new):
            return Sought(None)
        found = new[mine_among_orders]
        try:
            ended = await self._enrollments.succeed(claimed, found.voice_id, is_told=is_told)
        except IntegrityError:  # another lost order was quicker
            return Sought(None, is_open=True)
        if not ended:
            return Sought(None)
        log.info("lost_voice_found", record_id=claimed.record.id, voice_id=found.voice_id)
        await self._book.note(row.account, found, asked_at)
        return Sought(found.voice_id)

    async def _ask(self, claimed: ClaimedEnrollment) -> dict[str, Any]:
        row = claimed.row
        credential = await self._accounts.credential(row.user_id)
        if credential.account != row.account:
            raise NoApiKey("创建该音色的百炼 API Key 已被更换")
        try:
            async with asyncio.timeout(INSPECTION_SECONDS):
                if row.voice_id is None:
                    return await self._seek_again(claimed, credential)
                return await self._inspect(claimed, credential, row.voice_id)
        except TimeoutError:
            raise UpstreamTimeout from None

    async def _inspect(self, claimed: ClaimedEnrollment, credential: Credential, voice_id: str) -> dict[str, Any]:
        row = claimed.row
        asked_at = datetime.now(UTC)
        if await self._book.is_being_made(row.account, voice_id, asked_at - FRESH):
            return _again(claimed) | {"misses": 0}
        try:
            report = await self._client.query(credential, voice_id)
        except VoiceNotFound:
            if row.misses + 1 < GONE_BELIEVED:
                return _again(claimed) | {"misses": row.misses + 1}
            await self._book.forget(row.account, voice_id)
            return {}
        await self._book.note(row.account, report, asked_at)
        if report.status == "DEPLOYING" and _waited(claimed) < FOLLOWED_FOR:
            return _again(claimed) | {"misses": 0}
        return {"checked_at": asked_at, "next_check_at": None}

    async def _seek_again(self, claimed: ClaimedEnrollment, credential: Credential) -> dict[str, Any]:
        await self._enrollments.lose(claimed)  # one whose process died is lost as well
        sought = await self.seek(claimed, credential, is_told=False)
        if sought.voice_id is not None:
            return {}
        if _is_over(claimed.row.lost_at, LOST_FOR) and not sought.is_open:
            await self._enrollments.fail(claimed, "failed", UpstreamTimeout(LOST_FOR_GOOD))
            return {}
        if _is_over(claimed.row.lost_at, DESPAIR) and claimed.record.status == "running":
            await self._enrollments.despair(claimed, UpstreamTimeout(LOST_SO_FAR))
        return _again(claimed)

    def _is_hopeless(self, claimed: ClaimedEnrollment) -> bool:
        return _waited(claimed) > (HOPELESS if claimed.row.voice_id is None else FOLLOWED_FOR)

    async def _give_up(self, claimed: ClaimedEnrollment, failure: AppError) -> None:
        if claimed.row.voice_id is None:
            await self._enrollments.fail(claimed, "failed", failure)
        else:
            await self._enrollments.put_back(claimed, {"next_check_at": None})


def _is_of(voice_id: str, row: Enrollment) -> bool:
    """Whether a voice is a clone of this order's model and prefix; whether capitals are kept is not documented."""
    model, prefix = read_voice_id(voice_id) or ("", "")
    named = f"{row.target_model}-{row.prefix}-".casefold()
    is_named = (model, prefix.casefold()) == (row.target_model, row.prefix.casefold())
    return is_named and voice_id.casefold().startswith(named)  # the id of a designed voice has more before its prefix


def _not_there_before(listed: list[VoiceReport], claimed: ClaimedEnrollment) -> list[VoiceReport]:
    """The voices that were not there before the order; by their time where it is not known which were."""
    before = json.loads(claimed.row.voices_before)
    if before is None:
        return [voice for voice in listed if voice.created_at > claimed.record.created_at - CLOCKS_DIFFER]
    known = set(before)
    return [voice for voice in listed if voice.voice_id not in known]


def listed_prefix(prefix: str) -> str | None:
    """What to ask the provider's list for: whether it keeps capital letters is not documented (PROTOCOL §14)."""
    return prefix if prefix == prefix.lower() else None


def _is_over(since: datetime | None, patience: timedelta) -> bool:
    return since is not None and datetime.now(UTC) - since > patience


def _waited(claimed: ClaimedEnrollment) -> timedelta:
    return datetime.now(UTC) - (claimed.row.followed_since or claimed.record.created_at)


def _again(claimed: ClaimedEnrollment) -> dict[str, Any]:
    share_seconds = AGE_SHARE * _waited(claimed).total_seconds()
    return again_in(min(max(SHORTEST_INTERVAL_SECONDS, share_seconds), LONGEST_INTERVAL_SECONDS))
