"""Users of a backend who never registered: to hash a password for each would take longer than what is measured."""

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import insert

from app.database import Database
from app.models import ApiKey, Login, User
from app.security import KeySealer, TokenSigner, mask_api_key
from tests.bench.servers import CREDENTIAL_KEY, JWT_SECRET

LOGIN_TIME = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Tenant:
    """Somebody with a login and an API key."""

    user_id: uuid.UUID
    token: str


async def let_in(url: str, user_ids: list[uuid.UUID]) -> list[Tenant]:
    """Log users in who never gave a password."""
    signer, now, database = (
        TokenSigner((JWT_SECRET,), int(LOGIN_TIME.total_seconds())),
        datetime.now(UTC),
        Database(url),
    )
    login_ids = [uuid.uuid4() for _ in user_ids]
    logins = [
        {
            "id": login_id,
            "user_id": user_id,
            "generation": 0,
            "created_at": now,
            "refreshed_at": now,
            "expires_at": now + LOGIN_TIME,
        }
        for user_id, login_id in zip(user_ids, login_ids, strict=True)
    ]
    async with database.transaction() as session:
        await session.execute(insert(Login), logins)
    await database.close()
    return [
        Tenant(user_id, signer.issue(user_id, login_id)) for user_id, login_id in zip(user_ids, login_ids, strict=True)
    ]


async def move_in(url: str, count: int) -> list[Tenant]:
    """Make users, each with an API key of his own, and log them in."""
    sealer, now, database = KeySealer((CREDENTIAL_KEY,)), datetime.now(UTC), Database(url)
    users, keys = [], []
    for user_id in (uuid.uuid4() for _ in range(count)):
        name, api_key = f"user-{user_id.hex}", f"sk-test-{user_id.hex}"
        users.append(
            {"id": user_id, "username": name, "username_key": name, "password_hash": "none", "created_at": now}
            | {"is_active": True}
        )
        keys.append(
            {"user_id": user_id, "sealed": sealer.seal(api_key, user_id), "masked": mask_api_key(api_key)}
            | {"region": "beijing", "updated_at": now}
        )
    async with database.transaction() as session:
        await session.execute(insert(User), users)
        await session.execute(insert(ApiKey), keys)
    await database.close()
    return await let_in(url, [uuid.UUID(str(user["id"])) for user in users])
