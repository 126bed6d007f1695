"""Who may come in, and whose DashScope key is used: users, logins and sealed API keys."""

import unicodedata
import uuid
from datetime import UTC, datetime

import structlog
from anyio import CapacityLimiter, to_thread
from sqlalchemy import delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.catalog import DEFAULT_REGION
from app.dashscope import HTTP_URLS, WS_URLS, ConnectionPool, Credential, SpeechClient
from app.database import Database, once_more
from app.errors import InvalidCredentials, NoApiKey, RegistrationClosed, SealBroken, Unauthorized, UsernameTaken
from app.models import ApiKey, User
from app.ratelimit import RateLimiter
from app.security import KeySealer, TokenSigner, hash_password, mask_api_key, verify_password
from app.settings import Settings
from app.timing import note

log = structlog.get_logger(__name__)

# Each hash takes 19 MiB and a core for its time.
HASHING_THREADS = 2
OPENED_AT_ONCE = 500


class AccountService:
    """Registration, login and the user's API key."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        signer: TokenSigner,
        sealer: KeySealer,
        limiter: RateLimiter,
        pool: ConnectionPool,
        speech: SpeechClient,
    ) -> None:
        self._settings = settings
        self._database = database
        self._signer = signer
        self._sealer = sealer
        self._limiter = limiter
        self._pool = pool
        self._speech = speech
        self._hashing = CapacityLimiter(HASHING_THREADS)

    @property
    def token_ttl_seconds(self) -> int:
        """How long a login lasts."""
        return self._signer.ttl_seconds

    async def register(self, username: str, password: str, address: str) -> User:
        """Make a user. Raises RegistrationClosed, RateLimited or UsernameTaken."""
        if self._settings.registration == "closed":
            raise RegistrationClosed
        if self._settings.registration_limit:
            await self._limiter.check(self._settings.registration_limit, "register", address, always=True)
        password_hash = await to_thread.run_sync(hash_password, password, limiter=self._hashing)
        user = User(
            username=username,
            username_key=_comparable(username),
            password_hash=password_hash,
            created_at=datetime.now(UTC),
        )
        try:
            async with self._database.transaction() as session:
                session.add(user)
        except IntegrityError as error:
            raise UsernameTaken from error
        log.info("user_registered", user_id=str(user.id))
        return user

    async def login(self, username: str, password: str, address: str) -> str:
        """Give an access token. Raises InvalidCredentials, or RateLimited after too many failures.

        Takes the same time whether or not the name exists.
        """
        attempt = ("login", _comparable(username), address)
        await self._limiter.require(self._settings.login_limit, *attempt, always=True)
        async with self._database.snapshot() as session:
            user = await session.scalar(select(User).where(User.username_key == attempt[1]))
        fits, new_hash = await to_thread.run_sync(
            verify_password, password, user.password_hash if user else None, limiter=self._hashing
        )
        if user is None or not fits or not user.is_active:
            await self._limiter.check(self._settings.login_limit, *attempt, always=True)
            raise InvalidCredentials
        await self._limiter.require(
            self._settings.login_limit, *attempt, always=True
        )  # others may have failed meanwhile
        if new_hash:
            async with self._database.transaction() as session:
                await session.execute(update(User).where(User.id == user.id).values(password_hash=new_hash))
        return self._signer.issue(user.id)

    async def authenticate(self, token: str) -> User:
        """The user whom a token names. Raises Unauthorized when it is not valid or the user is gone or inactive."""
        user_id = self._signer.read(token)
        async with self._database.snapshot() as session:
            user = await session.get(User, user_id)
        if user is None or not user.is_active:
            raise Unauthorized
        note(user_id=str(user.id))
        return user

    @once_more
    async def store_api_key(
        self, user_id: uuid.UUID, api_key: str, region: str, workspace: str | None, *, verify: bool
    ) -> ApiKey:
        """Seal and keep a key in place of an earlier one; `verify` asks the provider first.

        Raises InvalidApiKey, RateLimited, UpstreamError or UpstreamTimeout when verification fails, and Unauthorized
        for a user who has left meanwhile; nothing is stored then.
        """
        if verify:
            await self._speech.verify(self._credential(user_id, api_key, region, workspace))
        row = ApiKey(
            user_id=user_id,
            sealed=self._sealer.seal(api_key, user_id),
            masked=mask_api_key(api_key),
            region=region,
            workspace=workspace,
            updated_at=datetime.now(UTC),
        )
        async with self._database.transaction() as session:
            # Two saves at once queue on the user's row, so that the later one wins instead of failing.
            if not await session.scalar(select(User.is_active).where(User.id == user_id).with_for_update()):
                raise Unauthorized
            former = await session.get(ApiKey, user_id)
            former_sealed = former.sealed if former else None
            await session.merge(row)
        if former_sealed:
            self._drop_connections(former_sealed, user_id)
        return row

    async def show_api_key(self, user_id: uuid.UUID) -> ApiKey:
        """The row of the user's key, of which only `masked` may be shown. Raises NoApiKey."""
        async with self._database.snapshot() as session:
            row = await session.get(ApiKey, user_id)
        if row is None:
            raise NoApiKey
        return row

    async def has_api_key(self, user_id: uuid.UUID) -> bool:
        """Whether the user has stored a key."""
        async with self._database.snapshot() as session:
            return await session.scalar(select(ApiKey.user_id).where(ApiKey.user_id == user_id)) is not None

    async def region(self, user_id: uuid.UUID) -> str:
        """Where the user's key is valid; Beijing for who has none."""
        async with self._database.snapshot() as session:
            region = await session.scalar(select(ApiKey.region).where(ApiKey.user_id == user_id))
        return region or DEFAULT_REGION

    @once_more
    async def delete_api_key(self, user_id: uuid.UUID) -> None:
        """Forget the user's key; having none is fine."""
        async with self._database.transaction() as session:
            sealed = await session.scalar(delete(ApiKey).where(ApiKey.user_id == user_id).returning(ApiKey.sealed))
        if sealed:
            self._drop_connections(sealed, user_id)

    async def shut_out(self, session: AsyncSession, user_id: uuid.UUID) -> ApiKey | None:
        """Let a user come in no more, inside a transaction: his name is free, his key forgotten. Gives the key's row.

        Raises Unauthorized if that was done before.
        """
        nobody = f" {user_id}"  # nobody can register a name with a blank
        leaving = update(User).where(User.id == user_id, User.is_active).returning(User.id)
        values = {"is_active": False, "username": "", "username_key": nobody, "password_hash": ""}
        if await session.scalar(leaving.values(**values)) is None:
            raise Unauthorized
        return await session.scalar(delete(ApiKey).where(ApiKey.user_id == user_id).returning(ApiKey))

    def disconnect(self, row: ApiKey) -> None:
        """Drop what is connected with a key that was deleted."""
        self._drop_connections(row.sealed, row.user_id)

    async def are_reached(self, accounts: set[str]) -> set[str]:
        """Those of some accounts at the provider that a key of any user reaches."""
        reached: set[str] = set()
        rows = select(ApiKey).order_by(ApiKey.user_id).limit(OPENED_AT_ONCE)
        some = rows
        while accounts - reached:
            async with self._database.snapshot() as session:
                keys = list(await session.scalars(some))
            opened = await to_thread.run_sync(lambda found: {self.account_of(row) for row in found}, keys)
            reached |= accounts & opened
            if len(keys) < OPENED_AT_ONCE:
                break
            some = rows.where(ApiKey.user_id > keys[-1].user_id)
        return reached

    def account_of(self, row: ApiKey) -> str | None:
        """What a stored key reaches at the provider, if it can be opened."""
        try:
            api_key, _ = self._sealer.open(row.sealed, row.user_id)
        except SealBroken:
            return None
        return self._credential(row.user_id, api_key, row.region, row.workspace).account

    async def credential(self, user_id: uuid.UUID) -> Credential:
        """The user's key, opened for a call. Raises NoApiKey or SealBroken.

        A key that an older sealing key protects is sealed anew on the way.
        """
        row = await self.show_api_key(user_id)
        api_key, outdated = self._sealer.open(row.sealed, user_id)
        if outdated:
            resealed = self._sealer.seal(api_key, user_id)
            same_key = (ApiKey.user_id == user_id, ApiKey.sealed == row.sealed)
            async with self._database.transaction() as session:
                await session.execute(update(ApiKey).where(*same_key).values(sealed=resealed))
        return self._credential(user_id, api_key, row.region, row.workspace)

    def _credential(self, user_id: uuid.UUID, api_key: str, region: str, workspace: str | None) -> Credential:
        ws_url = self._settings.dashscope_ws_url or WS_URLS[region]
        http_url = self._settings.dashscope_http_url or HTTP_URLS[region]
        return Credential(api_key, ws_url, http_url, workspace, region, user=str(user_id))

    def _drop_connections(self, sealed: bytes, user_id: uuid.UUID) -> None:
        try:
            api_key, _ = self._sealer.open(sealed, user_id)
        except SealBroken:
            log.warning("former_api_key_unreadable", user_id=str(user_id))  # so nothing was connected with it
        else:
            self._pool.forget(api_key)


async def require_active(session: AsyncSession, user_id: uuid.UUID) -> None:
    """Refuse to begin anything for a user who has left, inside the transaction that writes it down.

    His leaving waits for that transaction. Raises Unauthorized.
    """
    present = select(User.is_active).where(User.id == user_id).with_for_update(read=True, key_share=True)
    if not await session.scalar(present):
        raise Unauthorized


def _comparable(username: str) -> str:
    """Names that look the same are the same."""
    return unicodedata.normalize("NFKC", username).casefold()
