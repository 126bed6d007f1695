"""Work that should have been done long ago: nobody does it."""

from datetime import UTC, datetime, timedelta

from sqlalchemy import func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.doctor.case import Case
from app.doctor.finding import Finding, fail, ok, warn
from app.models import Enrollment, LongText, Record, SubmittedFile, Transcription, Watched

CHECK = "jobs"
# Rounds are made every few seconds, and leases swept as often: what is so late waits for nobody.
OVERDUE = timedelta(minutes=2)
LONG_OVERDUE = timedelta(hours=1)
_KINDS: dict[str, type[Watched]] = {
    "transcriptions": Transcription,
    "submitted files": SubmittedFile,
    "long texts": LongText,
    "voices being made": Enrollment,
}


async def examine_jobs(case: Case, session: AsyncSession) -> list[Finding]:
    """Find jobs that are due and claimed by nobody, and records whose process died."""
    now = datetime.now(UTC)
    findings = []
    worker = "`serve`" if case.settings.background_jobs else "a worker (`python -m app worker`)"
    for kind, table in _KINDS.items():
        late = (table.next_check_at < now - OVERDUE) & or_(
            table.claimed_until.is_(None), table.claimed_until < now - OVERDUE
        )
        count, oldest = (await session.execute(select(func.count(), func.min(table.next_check_at)).where(late))).one()
        if count and oldest:
            age = now - oldest
            minutes = age.total_seconds() / 60
            found = f"{count} {kind} wait for somebody to work on them, the first for {minutes:.0f} min"
            advice = f"Start {worker}; if it runs, look into its log for round_failed."
            findings.append(fail(CHECK, found, advice) if age > LONG_OVERDUE else warn(CHECK, found, advice))
    orphaned = (Record.status == "running") & (Record.lease_expires_at < now - OVERDUE)
    orphans = await session.scalar(select(func.count()).select_from(Record).where(orphaned))
    if orphans:
        found = f"{orphans} records are still running although their process is gone"
        findings.append(warn(CHECK, found, "Start `serve`: it settles them within a minute."))
    return findings or [ok(CHECK, "no job is overdue, no record orphaned")]
