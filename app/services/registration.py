"""Who may become a user: anybody, whoever has an invite, or nobody; and who is the first admin."""

import hashlib
import secrets
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog
from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.database import Database, once_more, queue_up
from app.errors import AdminOnly, InvalidInvite, InviteNotFound, RegistrationClosed, UsernameTaken
from app.models import Invite, User
from app.ratelimit import RateLimiter
from app.services.logins import comparable
from app.services.passwords import Passwords
from app.settings import Settings

log = structlog.get_logger(__name__)

CODE_PREFIX = "invite-"
CODE_BYTES = 24
# Any number that nothing else on the same PostgreSQL database takes as an advisory lock: that of migrations plus one.
FIRST_USER_LINE = 7_215_044_092


@dataclass(frozen=True, slots=True, repr=False)
class Invitation:
    """An invite with its code, which is not known to us any more once this is gone."""

    invite: Invite
    code: str


class RegistrationService:
    """Makes users, and the invites that some of them need."""

    def __init__(self, settings: Settings, database: Database, limiter: RateLimiter, passwords: Passwords) -> None:
        self._settings = settings
        self._database = database
        self._limiter = limiter
        self._passwords = passwords

    async def register(self, username: str, password: str, address: str, invite_code: str | None = None) -> User:
        """Make a user; the first one is an admin, unless in production, where only a command makes admins.

        Raises RegistrationClosed, InvalidInvite, RateLimited, WeakPassword or UsernameTaken.
        """
        if self._settings.registration == "closed":
            raise RegistrationClosed
        if self._settings.registration_limit:
            await self._limiter.check(self._settings.registration_limit, "register", address, always=True)
        needs_invite = self._settings.registration == "invite"
        if needs_invite:
            await self._require_invite(invite_code)
        user = await self.make_user(username, password)
        try:
            await self._admit(user, invite_code if needs_invite else None)
        except IntegrityError as error:
            raise UsernameTaken from error
        log.info("user_registered", user_id=str(user.id), is_admin=user.is_admin)
        return user

    async def make_user(self, username: str, password: str, *, is_admin: bool = False) -> User:
        """A user who is not stored yet. Raises WeakPassword or RateLimited."""
        await self._passwords.require_strong(password, username)
        return User(
            id=uuid.uuid4(),
            username=username,
            username_key=comparable(username),
            password_hash=await self._passwords.hash(password),
            is_admin=is_admin,
            created_at=datetime.now(UTC),
        )

    async def invite(self, admin_id: uuid.UUID, lifetime: timedelta, note: str | None) -> Invitation:
        """Make an invite for one person. Raises AdminOnly if the admin was shut out meanwhile."""
        code = f"{CODE_PREFIX}{secrets.token_urlsafe(CODE_BYTES)}"
        now = datetime.now(UTC)
        invite = Invite(
            id=uuid.uuid4(),
            code_digest=_digest(code),
            note=note,
            made_by=admin_id,
            created_at=now,
            expires_at=now + lifetime,
        )
        async with self._database.transaction() as session:
            await require_admin(session, admin_id)
            session.add(invite)
        log.info("invite_made", invite_id=str(invite.id), admin_id=str(admin_id))
        return Invitation(invite, code)

    async def list_invites(self, page: int, page_size: int) -> tuple[int, list[Invite]]:
        """How many invites there are, and some of them, the latest first."""
        newest = select(Invite).order_by(Invite.created_at.desc(), Invite.id)
        async with self._database.snapshot() as session:
            total = await session.scalar(select(func.count()).select_from(Invite))
            invites = await session.scalars(newest.offset((page - 1) * page_size).limit(page_size))
            return total or 0, list(invites)

    @once_more
    async def withdraw(self, admin_id: uuid.UUID, invite_id: uuid.UUID) -> None:
        """Take an invite back; whoever used it stays. Raises InviteNotFound, or AdminOnly as above."""
        async with self._database.transaction() as session:
            await require_admin(session, admin_id)
            gone = delete(Invite).where(Invite.id == invite_id).returning(Invite.id)
            if await session.scalar(gone) is None:
                raise InviteNotFound
        log.info("invite_withdrawn", invite_id=str(invite_id))

    async def _require_invite(self, code: str | None) -> None:
        """Look whether an invite is good before a password is hashed for whoever shows it. Raises InvalidInvite."""
        good = select(Invite.id).where(*_is_good(code))
        async with self._database.snapshot() as session:
            if await session.scalar(good) is None:
                raise InvalidInvite

    @once_more
    async def _admit(self, user: User, invite_code: str | None) -> None:
        """Store a user and use up his invite, both or neither. Raises IntegrityError or InvalidInvite."""
        async with self._database.transaction() as session:
            if self._settings.environment != "production":
                user.is_admin = await _is_first(session)
            session.add(user)
            await session.flush()
            if invite_code is not None:
                used = update(Invite).where(*_is_good(invite_code)).values(used_at=datetime.now(UTC), used_by=user.id)
                if await session.scalar(used.returning(Invite.id)) is None:
                    raise InvalidInvite


async def require_admin(session: AsyncSession, user_id: uuid.UUID) -> None:
    """Refuse what is done in the name of somebody who is no admin any more, inside a transaction. Raises AdminOnly."""
    acting = select(User.id).where(User.id == user_id, User.is_admin, User.is_active)
    if await session.scalar(acting.with_for_update(read=True, key_share=True)) is None:
        raise AdminOnly


async def _is_first(session: AsyncSession) -> bool:
    """Whether there is no user yet; who asks at the same time waits until it is known."""
    anybody = select(User.id).limit(1)
    if await session.scalar(anybody) is not None:
        return False
    await queue_up(session, FIRST_USER_LINE)
    return await session.scalar(anybody) is None


def _is_good(code: str | None) -> tuple[ColumnElement[bool], ...]:
    return Invite.code_digest == _digest(code or ""), Invite.used_at.is_(None), Invite.expires_at > datetime.now(UTC)


def _digest(code: str) -> str:
    return hashlib.sha256(code.encode()).hexdigest()
