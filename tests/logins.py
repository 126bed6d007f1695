"""Logins that were never made with a password: to hash one for each would take a tenth of all tests."""

import uuid
from datetime import UTC, datetime, timedelta

from app.models import Login
from app.security import TokenSigner
from tests.databases import rows
from tests.servers import Server

LOGIN = "INSERT INTO logins (id, user_id, generation, created_at, refreshed_at, expires_at) VALUES (?, ?, 0, ?, ?, ?)"


def begin_login(user_id: uuid.UUID) -> Login:
    """A login of somebody, not stored yet."""
    now = datetime.now(UTC)
    return Login(
        id=uuid.uuid4(),
        user_id=user_id,
        generation=0,
        created_at=now,
        refreshed_at=now,
        expires_at=now + timedelta(hours=1),
    )


def let_in(server: Server, user_id: uuid.UUID) -> str:
    """An access token of a user of a server that made its own secrets."""
    login = begin_login(user_id)
    rows(server, LOGIN, login.id, user_id, login.created_at, login.refreshed_at, login.expires_at)
    secret = (server.data / "jwt_secret").read_text().strip()
    return TokenSigner((secret,), 3600).issue(user_id, login.id)
