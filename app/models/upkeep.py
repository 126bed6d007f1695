"""What is to be done in the background for the sake of order, and what machines agree on."""

import uuid
from datetime import datetime

from sqlalchemy import ForeignKey, Index, Integer, String, Text, Uuid
from sqlalchemy.orm import Mapped, mapped_column

from app.columns import UtcDateTime
from app.models.table import Table


class Removal(Table):
    """An object that is to disappear from the store, written down when the database forgets where it was.

    It is removed once `remove_at` has passed, and again a day after it was `removed_at` for the first time. Whoever
    works on it puts `remove_at` off and is named by `claimed_by`. `erasure_id` names an erasure, and no user.
    """

    __tablename__ = "removals"
    __table_args__ = (
        Index("ix_removals_remove_at", "remove_at"),
        Index("ix_removals_erasure_id_remove_at", "erasure_id", "remove_at"),
    )

    id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True, default=uuid.uuid4)
    key: Mapped[str] = mapped_column(String(512))
    remove_at: Mapped[datetime] = mapped_column(UtcDateTime)
    removed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    misses: Mapped[int] = mapped_column(Integer, default=0)
    claimed_by: Mapped[uuid.UUID | None] = mapped_column(Uuid)
    erasure_id: Mapped[uuid.UUID | None] = mapped_column(Uuid)


class Erasure(Table):
    """A user who is to vanish, from when he may come in no more until nothing is left of him, this row included.

    `accounts` (JSON) are those that his keys reached at the provider. Somebody goes on with it once `next_at` has
    passed, and puts that off; `claimed_by` names who did so last.
    """

    __tablename__ = "erasures"
    __table_args__ = (Index("ix_erasures_next_at", "next_at"),)

    id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True, default=uuid.uuid4)
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="RESTRICT"), unique=True)
    accounts: Mapped[str] = mapped_column(Text)
    next_at: Mapped[datetime] = mapped_column(UtcDateTime)
    claimed_by: Mapped[uuid.UUID | None] = mapped_column(Uuid)


class GeneratedSecret(Table):
    """Tells machines that made a secret themselves whether they have the same one: by a fingerprint of it."""

    __tablename__ = "generated_secrets"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
