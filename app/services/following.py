"""Following voices at the provider until they are ready or rejected, even if nobody asks, and finding lost ones."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog
from sqlalchemy.exc import IntegrityError

from app.dashscope import Credential, EnrollmentClient
from app.errors import AppError, NoApiKey, UpstreamTimeout, VoiceNotFound
from app.models import Enrollment
from app.services.accounts import AccountService
from app.services.enrollments import ClaimedEnrollment, OpenEnrollments
from app.services.inflight import InFlight
from app.services.rounds import Rounds, again_in
from app.services.voicebook import VoiceBook

log = structlog.get_logger(__name__)

SHORTEST_INTERVAL_SECONDS = 2.0
LONGEST_INTERVAL_SECONDS = 60.0
AGE_SHARE = 0.2  # of the time waited until now, a voice is given until the next check
# Checks in a row that know of no such voice, until that is believed.
GONE_BELIEVED = 3
# How long a voice whose answer was lost may take to turn up, with a provider that can be asked.
LOST_FOR = timedelta(minutes=10)
HOPELESS = timedelta(days=1)
FOLLOWED_FOR = timedelta(days=7)


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

    async def seek(self, claimed: ClaimedEnrollment, credential: Credential) -> str | None:
        """Look in the provider's list for a voice that a lost answer may have named, and end the record with it.

        None while there is none that can be told from others. Raises the AppError that kept it from an answer.
        """
        row = claimed.row
        start = f"{row.target_model}-{row.prefix}-".casefold()
        before = set(json.loads(row.voices_before))
        listed = [each for each in await self._client.find(credential, row.prefix) if each.voice_id not in before]
        mine = [each for each in listed if each.voice_id.casefold().startswith(start)]
        taken = await self._enrollments.attributed(claimed, [each.voice_id for each in mine])
        new = sorted((each for each in mine if each.voice_id not in taken), key=lambda each: each.created_at)
        if not new or not await self._enrollments.is_alone(claimed):
            return None
        found = new[0]
        try:
            ended = await self._enrollments.succeed(claimed, found.voice_id)
        except IntegrityError:  # another lost order was quicker
            return None
        if not ended:
            return None
        log.info("lost_voice_found", record_id=claimed.record.id, voice_id=found.voice_id)
        await self._book.note(row.account, found, datetime.now(UTC))
        return found.voice_id

    async def _ask(self, claimed: ClaimedEnrollment) -> dict[str, Any]:
        row = claimed.row
        credential = await self._accounts.credential(row.user_id)
        if credential.account != row.account:
            raise NoApiKey("创建该音色的百炼 API Key 已被更换")
        if row.voice_id is None:
            return await self._seek_again(claimed, credential)
        asked_at = datetime.now(UTC)
        try:
            report = await self._client.query(credential, row.voice_id)
        except VoiceNotFound:
            if row.misses + 1 < GONE_BELIEVED:
                return _again(claimed) | {"misses": row.misses + 1}
            await self._book.forget(row.account, row.voice_id)
            return {}
        await self._book.note(row.account, report, asked_at)
        if report.status == "DEPLOYING" and not self._is_over(claimed, FOLLOWED_FOR):
            return _again(claimed) | {"misses": 0}
        return {"checked_at": asked_at, "next_check_at": None}

    async def _seek_again(self, claimed: ClaimedEnrollment, credential: Credential) -> dict[str, Any]:
        await self._enrollments.lose(claimed)  # one whose process died is lost as well
        if await self.seek(claimed, credential):
            return {}
        if claimed.age < LOST_FOR:
            return _again(claimed)
        failure = UpstreamTimeout("百炼平台没有返回结果，之后也没有出现新的音色，请重新创建")
        await self._enrollments.fail(claimed, "failed", failure)
        return {}

    def _is_hopeless(self, claimed: ClaimedEnrollment) -> bool:
        return self._is_over(claimed, HOPELESS if claimed.row.voice_id is None else FOLLOWED_FOR)

    async def _give_up(self, claimed: ClaimedEnrollment, failure: AppError) -> None:
        if claimed.row.voice_id is None:
            await self._enrollments.fail(claimed, "failed", failure)
        else:
            await self._enrollments.put_back(claimed, {"next_check_at": None})

    def _is_over(self, claimed: ClaimedEnrollment, patience: timedelta) -> bool:
        return _waited(claimed) > patience


def _waited(claimed: ClaimedEnrollment) -> timedelta:
    return datetime.now(UTC) - (claimed.row.followed_since or claimed.record.created_at)


def _again(claimed: ClaimedEnrollment) -> dict[str, Any]:
    share_seconds = AGE_SHARE * _waited(claimed).total_seconds()
    return again_in(min(max(SHORTEST_INTERVAL_SECONDS, share_seconds), LONGEST_INTERVAL_SECONDS))
