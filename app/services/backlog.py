"""What the database says is to be done, for whoever watches the service: the same, whichever process is asked."""

import asyncio
import time
from datetime import UTC, datetime, timedelta

import structlog
from sqlalchemy import func, or_, select

from app.database import UNAVAILABLE, Database
from app.jobs import KINDS
from app.metrics import Backlog, JobsDue
from app.models import Enrollment, LongText, Record, SubmittedFile, Transcription

log = structlog.get_logger(__name__)

LOOK_SECONDS = 2.0
FRESH_SECONDS = 1.0
TABLES = (LongText, Transcription, SubmittedFile, Enrollment)


class BacklogService:
    """Looks once a second at most, however many ask."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._looking = asyncio.Lock()
        self._seen: Backlog | None = None
        self._seen_at = float("-inf")

    async def look(self) -> Backlog | None:
        """What is to be done; None when the database does not say so within two seconds."""
        async with self._looking:
            if time.monotonic() - self._seen_at >= FRESH_SECONDS:
                try:
                    async with asyncio.timeout(LOOK_SECONDS):
                        self._seen = await self._count()
                except UNAVAILABLE as error:  # a timeout is an OSError
                    log.warning("backlog_unknown", error=type(error).__name__)
                    self._seen = None
                self._seen_at = time.monotonic()
            return self._seen

    async def _count(self) -> Backlog:
        now = datetime.now(UTC)
        due = []
        running = Record.status == "running"
        orphaned = running & (Record.lease_expires_at < now)
        async with self._database.snapshot() as session:
            for table in TABLES:
                is_free = or_(table.claimed_until.is_(None), table.claimed_until < now)
                waiting = select(func.count(), func.min(table.next_check_at)).where(table.next_check_at <= now, is_free)
                jobs, since = (await session.execute(waiting)).one()
                due.append(JobsDue(KINDS[table.__name__], jobs, _age(since, now)))
            records_running = await session.scalar(select(func.count()).where(running)) or 0
            dead = select(func.count(), func.min(Record.lease_expires_at)).where(orphaned)
            orphans, since = (await session.execute(dead)).one()
        return Backlog(tuple(due), records_running, orphans, _age(since, now))


def _age(since: datetime | None, now: datetime) -> timedelta:
    return max(timedelta(0), now - since) if since else timedelta(0)
