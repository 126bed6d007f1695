"""Asking again is not ordering again: a request that its client named is done once.

The name is kept on the record itself, unique for its user. So it is written together with the record, before the
provider is asked, and its answer is told from the record: no crash can come between them.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TypeVar

import structlog
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from app.database import Database, once_more
from app.errors import Abandoned, AppError, AskedBefore, BudgetExceeded, IdempotencyConflict, NotReady
from app.inflight import InFlight
from app.models import Record
from app.services.calls import IdempotencyKey
from app.services.history import HistoryService, RecordedCall
from app.services.ledger import FORGETTING
from app.services.records import NAMES_REMEMBERED
from app.timing import note

log = structlog.get_logger(__name__)

LOOK_SECONDS = (0.05, 0.1, 0.2, 0.4)

Answer = TypeVar("Answer")


def has_ended(call: RecordedCall) -> bool:
    """Whether a record has its end."""
    return call.record.status != "running"


async def _stays() -> bool:
    return False


class RepeatService:
    """Answers a request again that was asked before under the same name."""

    def __init__(self, database: Database, history: HistoryService, in_flight: InFlight) -> None:
        self._database = database
        self._history = history
        self._in_flight = in_flight

    async def once(
        self,
        user_id: uuid.UUID,
        name: IdempotencyKey | None,
        perform: Callable[[], Awaitable[Answer]],
        recall: Callable[[RecordedCall], Answer],
        *,
        is_answered: Callable[[RecordedCall], bool] = has_ended,
        otherwise: Callable[[], object] = bool,
        has_left: Callable[[], Awaitable[bool]] = _stays,
    ) -> tuple[Answer, bool]:
        """Perform a request, or answer it from the record of when it was performed; says whether it was a repeat.

        One that is under way is waited for, until `has_left` says that nobody wants its answer any more. What it failed
        with is raised again, and marked as a repeat. If it surely bought nothing, its name is free: who asks later
        orders anew, and so does who waited for one whose process died. `otherwise` is called if nothing is performed.
        Raises IdempotencyConflict for a name that stands for another request, Abandoned, and NotReady when this process
        ends meanwhile.
        """
        if name is None:
            return await perform(), False
        is_new = False
        try:
            call = await self._find(user_id, name)
            if call is None:
                is_new = True
                try:
                    return await perform(), False
                except (AskedBefore, BudgetExceeded) as refusal:  # another request was quicker, and may hold the rest
                    call = await self._find(user_id, name)
                    if call is None and isinstance(refusal, BudgetExceeded):
                        raise
                    if call is None:
                        message = "相同 Idempotency-Key 的请求刚刚失败，未产生费用，请重试"
                        raise NotReady(message, retry_after_seconds=1) from None
            looks = 0
            while not is_answered(call):
                if self._in_flight.hurried:
                    raise NotReady("服务正在重启，请用相同的 Idempotency-Key 重试", retry_after_seconds=5)
                if await has_left():
                    raise Abandoned
                await asyncio.sleep(LOOK_SECONDS[min(looks, len(LOOK_SECONDS) - 1)])
                looks += 1
                call = await self._history.find(user_id, call.record.id, whole=False)
            if call.record.status == "interrupted" and call.record.idempotency_key is None and not is_new:
                is_new = True  # the first died before it had bought anything
                return await self.once(
                    user_id, name, perform, recall, is_answered=is_answered, otherwise=otherwise, has_left=has_left
                )
            log.info("request_repeated", record_id=call.record.id)
            note(record_id=call.record.id)
            try:
                return recall(call), True
            except AppError as error:
                error.is_repeat = True
                raise
        finally:
            if not is_new:
                otherwise()

    @once_more
    async def give_name(self, user_id: uuid.UUID, record_id: int, name: IdempotencyKey) -> None:
        """Let a name stand for a record that has none: the one that an earlier order brought. Raises AskedBefore."""
        outdated = {"of_user": user_id, "named": name.key, "until": datetime.now(UTC) - NAMES_REMEMBERED}
        naming = update(Record).where(Record.id == record_id, Record.idempotency_key.is_(None))
        try:
            async with self._database.transaction() as session:
                await session.execute(FORGETTING, outdated)
                await session.execute(naming.values(idempotency_key=name.key, request_digest=name.digest))
        except IntegrityError:
            raise AskedBefore from None

    async def _find(self, user_id: uuid.UUID, name: IdempotencyKey) -> RecordedCall | None:
        named = select(Record.id, Record.request_digest).where(
            Record.user_id == user_id,
            Record.idempotency_key == name.key,
            Record.created_at > datetime.now(UTC) - NAMES_REMEMBERED,
        )
        async with self._database.snapshot() as session:
            found = (await session.execute(named)).one_or_none()
        if found is None:
            return None
        if found.request_digest != name.digest:
            raise IdempotencyConflict
        return await self._history.find(user_id, found.id, whole=False)
