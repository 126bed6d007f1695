"""The rotation of CREDENTIAL_KEYS: API keys that a former sealing key protects are sealed by the first one."""

import uuid
from dataclasses import dataclass, field

from sqlalchemy import select, update

from app.database import Database, once_more
from app.errors import SealBroken
from app.models import ApiKey
from app.security import KeySealer

AT_ONCE = 500


@dataclass(slots=True)
class Resealed:
    """How many keys were sealed anew, and were so before; and whose cannot be opened by any sealing key."""

    anew: int = 0
    before: int = 0
    closed: list[uuid.UUID] = field(default_factory=list)


class Resealer:
    """Seals keys anew, one when it is used, or all of them, while others go on using them."""

    def __init__(self, database: Database, sealer: KeySealer) -> None:
        self._database = database
        self._sealer = sealer

    @once_more
    async def renew(self, row: ApiKey, api_key: str) -> None:
        """Seal an opened key by the first sealing key, unless it was replaced meanwhile."""
        same_key = ApiKey.user_id == row.user_id, ApiKey.sealed == row.sealed
        resealed = self._sealer.seal(api_key, row.user_id)
        async with self._database.transaction() as session:
            await session.execute(update(ApiKey).where(*same_key).values(sealed=resealed))

    async def renew_all(self) -> Resealed:
        """Seal every key by the first sealing key that is not yet."""
        done = Resealed()
        rows = select(ApiKey).order_by(ApiKey.user_id).limit(AT_ONCE)
        some = rows
        while True:
            async with self._database.snapshot() as session:
                found = list(await session.scalars(some))
            for row in found:
                await self._renew_if_outdated(row, done)
            if len(found) < AT_ONCE:
                return done
            some = rows.where(ApiKey.user_id > found[-1].user_id)

    async def _renew_if_outdated(self, row: ApiKey, done: Resealed) -> None:
        try:
            api_key, is_outdated = self._sealer.open(row.sealed, row.user_id)
        except SealBroken:
            done.closed.append(row.user_id)
            return
        if is_outdated:
            await self.renew(row, api_key)
        done.anew += is_outdated
        done.before += not is_outdated
