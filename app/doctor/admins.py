"""Whether somebody is there who can let others in."""

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.doctor.case import Case
from app.doctor.finding import Finding, ok, warn
from app.models import User

CHECK = "admins"


async def examine_admins(case: Case, session: AsyncSession) -> list[Finding]:
    """Count who may invite and help users; with nobody, some ways of registration lead nowhere."""
    active = select(func.count()).select_from(User).where(User.is_active)
    users = await session.scalar(active) or 0
    admins = await session.scalar(active.where(User.is_admin)) or 0
    if admins:
        return [ok(CHECK, f"{admins} of {users} users")]
    advice = "Make one with: python -m app admin NAME"
    if case.settings.registration == "invite":
        return [warn(CHECK, "nobody can invite anybody (REGISTRATION=invite)", advice)]
    if case.settings.registration == "closed" and not users:
        return [warn(CHECK, "there is no user, and nobody can register (REGISTRATION=closed)", advice)]
    return [ok(CHECK, f"none of {users} users; python -m app admin NAME makes one")]
