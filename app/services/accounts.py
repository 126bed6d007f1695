"""Whose DashScope key is used: users' sealed API keys."""

import uuid
from datetime import UTC, datetime
from decimal import Decimal

import structlog
from anyio import to_thread
from sqlalchemy import Connection, bindparam, delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.catalog import DEFAULT_REGION
from app.dashscope import HTTP_URLS, WS_URLS, ConnectionPool, Credential, SpeechClient
from app.database import Database, once_more
from app.errors import NoApiKey, SealBroken, Unauthorized
from app.models import ApiKey, User
from app.security import KeySealer, mask_api_key
from app.services.logins import end_logins
from app.services.resealing import Resealer
from app.settings import Settings

log = structlog.get_logger(__name__)

OPENED_AT_ONCE = 500
_KEY = select(*ApiKey.__table__.columns).where(ApiKey.user_id == bindparam("user_id"))
_PRESENT = (
    select(User.is_active, User.monthly_budget)
    .where(User.id == bindparam("user_id"))
    .with_for_update(read=True, key_share=True)
)


class AccountService:
    """Keeps users' API keys, and opens them for calls."""

    def __init__(
        self, settings: Settings, database: Database, sealer: KeySealer, pool: ConnectionPool, speech: SpeechClient
    ) -> None:
        self._settings = settings
        self._database = database
        self._sealer = sealer
        self._resealer = Resealer(database, sealer)
        self._pool = pool
        self._speech = speech

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
        found = await self._database.look_up(_KEY, user_id=user_id)
        if found is None:
            raise NoApiKey
        return ApiKey(**found._mapping)

    async def has_api_key(self, user_id: uuid.UUID) -> bool:
        """Whether the user has stored a key."""
        return await self._database.look_up(_KEY, user_id=user_id) is not None

    async def region(self, user_id: uuid.UUID) -> str:
        """Where the user's key is valid; Beijing for who has none."""
        found = await self._database.look_up(_KEY, user_id=user_id)
        return DEFAULT_REGION if found is None else found.region

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
        await end_logins(session, user_id)
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

    async def credential(self, user_id: uuid.UUID, stored: ApiKey | None = None) -> Credential:
        """The user's key, opened for a call; `stored` is its row, if that was just read. Raises NoApiKey or SealBroken.

        A key that an older sealing key protects is sealed anew on the way.
        """
        row = stored or await self.show_api_key(user_id)
        api_key, outdated = self._sealer.open(row.sealed, user_id)
        if outdated:
            await self._resealer.renew(row, api_key)
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


def require_active(connection: Connection, user_id: uuid.UUID) -> Decimal | None:
    """Refuse to begin anything for a user who has left, inside the transaction that writes it down.

    His leaving waits for that transaction. Gives what he allows himself a month, if he does. Raises Unauthorized.
    """
    user = connection.execute(_PRESENT, {"user_id": user_id}).one_or_none()
    if user is None or not user.is_active:
        raise Unauthorized
    budget: Decimal | None = user.monthly_budget
    return budget
