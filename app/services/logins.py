"""Logins, from the password to the logout, and who it is that a token names.

password ──► login row ──► access token    for each request, as long as the row is there
                       ──► refresh token   for new tokens of both kinds; one that comes twice ends the login
                       ──► ticket          in place of an access token in a URL, one time
"""

import unicodedata
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog
from sqlalchemy import RowMapping, bindparam, delete, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.database import Database, once_more
from app.errors import InvalidCredentials, Unauthorized, WrongPassword
from app.models import ApiKey, Login, UsedTicket, User
from app.ratelimit import RateLimiter, multiply
from app.security import TICKET_SECONDS, Claims, TokenSigner
from app.services.passwords import Passwords
from app.settings import Settings
from app.timing import note

log = structlog.get_logger(__name__)

# A second one when the hash was replaced while the password was compared, as by a login at the same time.
LOGIN_TRIES = 2
SKEW = timedelta(minutes=5)
# The oldest end when a user has more: a script that logs in for every call must not fill the database.
MAX_LOGINS = 1000
# One address may fail so many times more often with many names than with one: offices share an address, and nobody
# there is to shut all others out.
NAMES_PER_ADDRESS = 50
_OF_USER, _OF_KEY = ([column.name for column in kind.__table__.columns] for kind in (User, ApiKey))
_LIVING = (
    select(*User.__table__.columns, *(column.label(f"key_{column.name}") for column in ApiKey.__table__.columns))
    .join(Login, Login.user_id == User.id)
    .outerjoin(ApiKey, ApiKey.user_id == User.id)
    .where(
        Login.id == bindparam("login_id"),
        Login.expires_at > bindparam("now"),
        User.id == bindparam("user_id"),
        User.is_active,
    )
)


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who is logged in, and by which login."""

    user: User
    login_id: uuid.UUID
    api_key: ApiKey | None = None
    """The key that he has stored, as it was found together with him."""


@dataclass(frozen=True, slots=True, repr=False)
class Tokens:
    """What a login hands out; each is a secret."""

    access: str
    refresh: str
    access_seconds: int
    refresh_seconds: int


class LoginService:
    """Lets users in and out."""

    def __init__(
        self, settings: Settings, database: Database, signer: TokenSigner, limiter: RateLimiter, passwords: Passwords
    ) -> None:
        self._settings = settings
        self._database = database
        self._signer = signer
        self._limiter = limiter
        self._passwords = passwords
        self._refresh_seconds = max(settings.refresh_ttl_seconds, signer.ttl_seconds)

    async def login(self, username: str, password: str, address: str) -> Tokens:
        """Begin a login. Raises InvalidCredentials, or RateLimited after too many failures.

        Takes the same time whether or not the name exists.
        """
        key = comparable(username)
        for _ in range(LOGIN_TRIES):
            await self._require_patience(key, address)
            async with self._database.snapshot() as session:
                user = await session.scalar(select(User).where(User.username_key == key))
            proven, new_hash = await self._prove(user, key, password, address)
            login = await self._begin(proven, new_hash)
            if login is not None:
                log.info("login_begun", user_id=str(proven.id), login_id=str(login.id))
                return self._tokens(login)
        raise InvalidCredentials

    async def authenticate(self, token: str) -> Visitor:
        """Whose access token this is. Raises Unauthorized when it is not valid, its login over or the user gone."""
        return await self._admit(self._signer.read(token))

    async def authenticate_by_url(self, token: str) -> Visitor:
        """Whose ticket this is, which is used up by that; or login token, where those are allowed in URLs.

        Raises Unauthorized.
        """
        try:
            claims = self._signer.read(token, "ticket")
        except Unauthorized:
            if not self._settings.login_tokens_in_urls:
                raise Unauthorized("URL 中的 token 须为 POST /api/auth/ticket 换取的一次性凭证，且尚未使用") from None
            return await self.authenticate(token)
        visitor = await self._admit(claims)
        await self._use_up(claims)
        return visitor

    async def is_in(self, visitor: Visitor) -> bool:
        """Whether a login that was good a while ago still is: for connections that stay open."""
        return await self._find(visitor.user.id, visitor.login_id) is not None

    def ticket(self, visitor: Visitor) -> tuple[str, int]:
        """What stands in for an access token in one URL, and for how many seconds."""
        return self._signer.issue_ticket(visitor.user.id, visitor.login_id), TICKET_SECONDS

    async def refresh(self, token: str) -> Tokens:
        """Give new tokens for a refresh token, which is void from then on.

        One that comes a second time was copied: then its login ends, for whoever has it. (Within
        `REFRESH_OVERLAP_SECONDS` it is taken for a repeat, and answered by the tokens of the same generation.)
        Raises Unauthorized.
        """
        claims = self._signer.read(token, "refresh")
        login = await self._renew(claims)
        if login is not None:
            return self._tokens(login)
        if await self._end(claims):
            log.warning("refresh_token_reused", user_id=str(claims.user_id), login_id=str(claims.login_id))
            raise Unauthorized("刷新令牌已被使用过，为安全起见本次登录已失效，请重新登录")
        raise Unauthorized

    @once_more
    async def logout(self, visitor: Visitor, *, everywhere: bool) -> None:
        """End this login, or all of the user's."""
        chosen = Login.user_id == visitor.user.id if everywhere else Login.id == visitor.login_id
        async with self._database.transaction() as session:
            await session.execute(delete(Login).where(chosen))
        log.info("login_ended", user_id=str(visitor.user.id), everywhere=everywhere)

    async def change_password(self, visitor: Visitor, present: str, wanted: str, address: str) -> Tokens:
        """Replace the user's password, end all of his logins, and begin a new one.

        Raises WrongPassword, RateLimited after too many tries, WeakPassword, or Unauthorized if he left meanwhile.
        """
        user = visitor.user
        await self._limiter.check(self._settings.login_limit, "password", str(user.id), always=True)
        await self._require_patience(user.username_key, address)
        try:
            await self._prove(user, user.username_key, present, address)
        except InvalidCredentials:
            raise WrongPassword from None
        await self._passwords.require_strong(wanted, user.username)
        login = await self._replace_password(user, await self._passwords.hash(wanted))
        log.info("password_changed", user_id=str(user.id))
        return self._tokens(login)

    async def _require_patience(self, username_key: str, address: str) -> None:
        """Raise RateLimited after too many failures of a name or an address, or when too many are being looked at."""
        limit = self._settings.login_limit
        await self._limiter.require(limit, "login", username_key, address, always=True)
        await self._limiter.require(multiply(limit, NAMES_PER_ADDRESS), "logins", address, always=True)
        self._passwords.require_room()

    async def _prove(
        self, user: User | None, username_key: str, password: str, address: str
    ) -> tuple[User, str | None]:
        """See that a password is right; gives its user, and a hash to replace an outdated one.

        Raises InvalidCredentials, or RateLimited after too many failures of a name, or of an address.
        """
        limit, attempt = self._settings.login_limit, ("login", username_key, address)
        fits, new_hash = await self._passwords.verify(password, user.password_hash if user else None)
        if user is None or not fits or not user.is_active:
            log.info("login_failed", address=address, user_id=str(user.id) if user else None)
            await self._limiter.check(multiply(limit, NAMES_PER_ADDRESS), "logins", address, always=True)
            await self._limiter.check(limit, *attempt, always=True)
            raise InvalidCredentials
        await self._limiter.require(limit, *attempt, always=True)  # others may have failed meanwhile
        return user, new_hash

    @once_more
    async def _begin(self, user: User, new_hash: str | None) -> Login | None:
        """Write a login down; None if the password, or only its hash, was replaced meanwhile, or the user has left."""
        login = self._new_login(user)
        same = select(User).where(User.id == user.id, User.is_active, User.password_hash == user.password_hash)
        mine = select(Login.id).where(Login.user_id == user.id).order_by(Login.refreshed_at.desc())
        async with self._database.transaction() as session:
            present = await session.scalar(same.with_for_update())
            if present is None:
                return None
            if new_hash:
                present.password_hash = new_hash
            over = or_(Login.expires_at <= login.created_at, Login.id.in_(mine.offset(MAX_LOGINS - 1)))
            await session.execute(delete(Login).where(Login.user_id == user.id, over))
            session.add(login)
        return login

    async def _admit(self, claims: Claims) -> Visitor:
        found = await self._find(claims.user_id, claims.login_id)
        if found is None:
            raise Unauthorized
        note(user_id=str(claims.user_id))
        user = User(**{name: found[name] for name in _OF_USER})
        key = ApiKey(**{name: found[f"key_{name}"] for name in _OF_KEY}) if found["key_user_id"] else None
        return Visitor(user, claims.login_id, key)

    async def _find(self, user_id: uuid.UUID, login_id: uuid.UUID) -> RowMapping | None:
        """The user of a login, if it is not over, with his key."""
        found = await self._database.look_up(_LIVING, user_id=user_id, login_id=login_id, now=datetime.now(UTC))
        return None if found is None else found._mapping

    async def _use_up(self, claims: Claims) -> None:
        """Let a ticket be of no use any more. Raises Unauthorized if it is not already."""
        # Others' clocks may be behind.
        expired = delete(UsedTicket).where(UsedTicket.expires_at < datetime.now(UTC) - SKEW)
        try:
            async with self._database.transaction() as session:
                session.add(UsedTicket(id=claims.token_id, expires_at=claims.expires_at))
                await session.flush()
                await session.execute(expired)
        except IntegrityError:
            raise Unauthorized("凭证已被使用过，请重新获取") from None

    @once_more
    async def _renew(self, claims: Claims) -> Login | None:
        """Begin the next generation of a login; None for a token that is not of the present one."""
        now = datetime.now(UTC)
        overlap = timedelta(seconds=self._settings.refresh_overlap_seconds)
        mine = Login.id == claims.login_id, Login.expires_at > now
        present = update(Login).where(*mine, Login.generation == claims.generation)
        next_one = {"generation": claims.generation + 1, "refreshed_at": now, "expires_at": self._end_at(now)}
        repeated = Login.generation == claims.generation + 1, Login.refreshed_at > now - overlap
        async with self._database.transaction() as session:
            named = {"user_id": claims.user_id, "login_id": claims.login_id, "now": now}
            if (await session.execute(_LIVING, named)).one_or_none() is None:
                return None
            renewed: Login | None = await session.scalar(present.values(next_one).returning(Login))
            if renewed is None and overlap:
                renewed = await session.scalar(select(Login).where(*mine, *repeated))
            return renewed

    @once_more
    async def _end(self, claims: Claims) -> bool:
        """End a login; says whether it was there."""
        async with self._database.transaction() as session:
            mine = Login.id == claims.login_id, Login.user_id == claims.user_id
            gone = delete(Login).where(*mine).returning(Login.id)
            return await session.scalar(gone) is not None

    @once_more
    async def _replace_password(self, user: User, password_hash: str) -> Login:
        """Write down a password and the only login with it. Raises Unauthorized if somebody else did so meanwhile."""
        login = self._new_login(user)
        same = User.id == user.id, User.is_active, User.password_hash == user.password_hash
        async with self._database.transaction() as session:
            changed = update(User).where(*same).values(password_hash=password_hash).returning(User.id)
            if await session.scalar(changed) is None:
                raise Unauthorized
            await end_logins(session, user.id)
            session.add(login)
        return login

    def _new_login(self, user: User) -> Login:
        now = datetime.now(UTC)
        return Login(
            id=uuid.uuid4(),
            user_id=user.id,
            generation=0,
            created_at=now,
            refreshed_at=now,
            expires_at=self._end_at(now),
        )

    def _end_at(self, now: datetime) -> datetime:
        return now + timedelta(seconds=self._refresh_seconds)

    def _tokens(self, login: Login) -> Tokens:
        access = self._signer.issue(login.user_id, login.id)
        refresh = self._signer.issue_refresh(login.user_id, login.id, login.generation, self._refresh_seconds)
        return Tokens(access, refresh, self._signer.ttl_seconds, self._refresh_seconds)


async def end_logins(session: AsyncSession, user_id: uuid.UUID) -> None:
    """End all logins of a user, inside a transaction."""
    await session.execute(delete(Login).where(Login.user_id == user_id))


def comparable(username: str) -> str:
    """Names that look the same are the same."""
    return unicodedata.normalize("NFKC", username).casefold()
