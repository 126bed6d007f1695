"""What an admin may do about users: see who there is, shut them out, let them back in, give them a new password."""

import secrets
import uuid
from dataclasses import dataclass

import structlog
from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.database import Database, once_more, queue_up
from app.errors import LastAdmin, UserNotFound
from app.models import ApiKey, User
from app.services.logins import comparable, end_logins
from app.services.passwords import Passwords
from app.services.registration import RegistrationService, require_admin

log = structlog.get_logger(__name__)

PASSWORD_BYTES = 12
# Any number that nothing else on the same PostgreSQL database takes as an advisory lock.
ADMINS_LINE = 7_215_044_093
_STAYS = User.username != ""  # a user who leaves has no name any more


@dataclass(frozen=True, slots=True)
class ListedUser:
    """A user as admins see him."""

    user: User
    has_api_key: bool


class AdministrationService:
    """Looks after users, whose records, texts and audio it never sees."""

    def __init__(self, database: Database, registration: RegistrationService, passwords: Passwords) -> None:
        self._database = database
        self._registration = registration
        self._passwords = passwords

    async def list_users(self, part: str | None, page: int, page_size: int) -> tuple[int, list[ListedUser]]:
        """How many users there are, and some of them, the latest first: those with a part in their names, if given."""
        wanted = [_STAYS]
        if part:
            wanted.append(User.username_key.contains(comparable(part), autoescape=True))
        has_key = select(ApiKey.user_id).where(ApiKey.user_id == User.id).exists()
        newest = select(User, has_key).where(*wanted).order_by(User.created_at.desc(), User.id)
        async with self._database.snapshot() as session:
            total = await session.scalar(select(func.count()).select_from(User).where(*wanted))
            rows = await session.execute(newest.offset((page - 1) * page_size).limit(page_size))
            return total or 0, [ListedUser(user, has_api_key) for user, has_api_key in rows]

    @once_more
    async def change(
        self, admin_id: uuid.UUID, user_id: uuid.UUID, *, is_active: bool | None, is_admin: bool | None
    ) -> ListedUser:
        """Shut a user out or let him back in, make him an admin or none. What is None stays as it is.

        Who is shut out is logged out; what was bought for him is finished. Raises UserNotFound, LastAdmin, or AdminOnly
        if the admin was shut out himself meanwhile.
        """
        values = {"is_active": is_active, "is_admin": is_admin}
        values = {name: value for name, value in values.items() if value is not None}
        async with self._database.transaction() as session:
            await queue_up(session, ADMINS_LINE)
            await require_admin(session, admin_id)
            user = await _find(session, user_id)
            for name, value in values.items():
                setattr(user, name, value)
            await session.flush()
            if False in values.values():
                await _require_admin_left(session)
            if is_active is False:
                await end_logins(session, user_id)
            has_key = await session.get(ApiKey, user_id) is not None
        log.info("user_changed", admin_id=str(admin_id), user_id=str(user_id), **values)
        return ListedUser(user, has_key)

    async def reset_password(self, admin_id: uuid.UUID, user_id: uuid.UUID) -> str:
        """Give a user another password, which only the caller learns, and end his logins. Raises UserNotFound."""
        password = secrets.token_urlsafe(PASSWORD_BYTES)
        await self._replace_password(user_id, await self._passwords.hash(password), admin_id)
        log.info("password_reset", admin_id=str(admin_id), user_id=str(user_id))
        return password

    async def appoint(self, username: str, password: str | None) -> str:
        """Make an admin of a user, as the operator's command does; gives what was done, in a word.

        With a password, that becomes his, and a user is made where there is none. Raises UserNotFound, or WeakPassword.
        """
        async with self._database.snapshot() as session:
            user = await session.scalar(select(User).where(User.username_key == comparable(username)))
        if user is None:
            if password is None:
                raise UserNotFound
            new = await self._registration.make_user(username, password, is_admin=True)
            async with self._database.transaction() as session:
                session.add(new)
            return "created"
        if password is not None:
            await self._passwords.require_strong(password, username)
            await self._replace_password(user.id, await self._passwords.hash(password))
        appointed = update(User).where(User.id == user.id, _STAYS).values(is_admin=True, is_active=True)
        async with self._database.transaction() as session:
            await session.execute(appointed)
        return "appointed"

    @once_more
    async def _replace_password(
        self, user_id: uuid.UUID, password_hash: str, admin_id: uuid.UUID | None = None
    ) -> None:
        async with self._database.transaction() as session:
            if admin_id is not None:
                await require_admin(session, admin_id)
            (await _find(session, user_id)).password_hash = password_hash
            await end_logins(session, user_id)


async def _find(session: AsyncSession, user_id: uuid.UUID) -> User:
    """The user, whom nobody else changes meanwhile. Raises UserNotFound."""
    user = await session.scalar(select(User).where(User.id == user_id, _STAYS).with_for_update())
    if user is None:
        raise UserNotFound
    return user


async def _require_admin_left(session: AsyncSession) -> None:
    """Raise LastAdmin when no active admin is there any more."""
    if await session.scalar(select(User.id).where(User.is_admin, User.is_active).limit(1)) is None:
        raise LastAdmin
