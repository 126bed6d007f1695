"""Users, how they come in, and what they bring along."""

import uuid
from datetime import datetime
from decimal import Decimal

from sqlalchemy import Boolean, ForeignKey, Index, Integer, LargeBinary, String, Text, Uuid, false
from sqlalchemy.orm import Mapped, mapped_column

from app.columns import BUDGET_DECIMALS, Money, UtcDateTime
from app.models.table import Table


class User(Table):
    """Somebody who may log in. `username_key` is the name as it is compared: normalised and case-folded.

    An admin looks after who may come in, and sees nothing of what others do. Calls that would bring a month's cost
    above `monthly_budget`, if there is one, are refused.
    """

    __tablename__ = "users"

    id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True, default=uuid.uuid4)
    username: Mapped[str] = mapped_column(String(64))
    username_key: Mapped[str] = mapped_column(Text, unique=True)
    password_hash: Mapped[str] = mapped_column(String(255))
    is_active: Mapped[bool] = mapped_column(Boolean, default=True)
    is_admin: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    monthly_budget: Mapped[Decimal | None] = mapped_column(Money(BUDGET_DECIMALS))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class Login(Table):
    """A login from its beginning to its end, which takes the row away: its tokens are void from then on.

    Each refresh makes the tokens of a new `generation`; the one of an older generation can only be a copy of it.
    """

    __tablename__ = "logins"
    __table_args__ = (Index("ix_logins_user_id_refreshed_at", "user_id", "refreshed_at"),)

    id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True, default=uuid.uuid4)
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    generation: Mapped[int] = mapped_column(Integer, default=0)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    refreshed_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)


class UsedTicket(Table):
    """A ticket that has let somebody in, until it would have expired anyway: it lets nobody in a second time."""

    __tablename__ = "used_tickets"
    __table_args__ = (Index("ix_used_tickets_expires_at", "expires_at"),)

    id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)


class Invite(Table):
    """What lets one person register: of its code only a digest is kept. It is used up by `used_by`."""

    __tablename__ = "invites"

    id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True, default=uuid.uuid4)
    code_digest: Mapped[str] = mapped_column(String(64), unique=True)
    note: Mapped[str | None] = mapped_column(String(200))
    made_by: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("users.id", ondelete="SET NULL"), index=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    used_by: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("users.id", ondelete="SET NULL"), index=True)


class ApiKey(Table):
    """A user's DashScope key, sealed: `masked` is all of it that can ever be shown."""

    __tablename__ = "api_keys"

    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    sealed: Mapped[bytes] = mapped_column(LargeBinary)
    masked: Mapped[str] = mapped_column(String(32))
    region: Mapped[str] = mapped_column(String(16))
    workspace: Mapped[str | None] = mapped_column(String(64))
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime)
