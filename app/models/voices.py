"""Cloned voices: their making, what the provider has of them, and the samples that we keep."""

import uuid
from datetime import datetime

from sqlalchemy import ForeignKey, Index, String, Text, UniqueConstraint, Uuid
from sqlalchemy.orm import Mapped, mapped_column

from app.columns import UtcDateTime
from app.models.calls import Watched
from app.models.table import PROVIDER_ID_CHARS, Table


class Enrollment(Watched, Table):
    """The making of a voice: from before the provider is asked until the voice is ready or rejected.

    Until its answer is here, `voice_id` is empty, and `voices_before` (JSON) are the voices of that prefix that there
    were when it was asked, null if they could not be listed, so that the new one is told from them should the answer be
    lost: `lost_at`. `digest` names the same order of the same sample. Then `status` follows the voice, since
    `followed_since`.
    """

    __tablename__ = "enrollments"
    __table_args__ = (
        Index("ix_enrollments_next_check_at", "next_check_at"),
        Index("ix_enrollments_account_target_model_prefix", "account", "target_model", "prefix"),
        UniqueConstraint("voice_id", "account"),
    )

    account: Mapped[str] = mapped_column(String(64))
    target_model: Mapped[str] = mapped_column(String(64))
    prefix: Mapped[str] = mapped_column(String(16))
    digest: Mapped[str] = mapped_column(String(64))
    voices_before: Mapped[str] = mapped_column(Text)
    lost_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    voice_id: Mapped[str | None] = mapped_column(String(PROVIDER_ID_CHARS))
    status: Mapped[str | None] = mapped_column(String(16))
    followed_since: Mapped[datetime | None] = mapped_column(UtcDateTime)


class Voice(Table):
    """A cloned voice of an account at the provider, as it was last seen there: at `seen_at`, by whatever call.

    One that we deleted stays as `deleted_at` for a while, because the provider's list may still name it.
    """

    __tablename__ = "voices"
    __table_args__ = (Index("ix_voices_voice_id", "voice_id"),)

    account: Mapped[str] = mapped_column(String(64), primary_key=True)
    voice_id: Mapped[str] = mapped_column(String(PROVIDER_ID_CHARS), primary_key=True)
    target_model: Mapped[str] = mapped_column(String(64))
    prefix: Mapped[str] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    modified_at: Mapped[datetime] = mapped_column(UtcDateTime)
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime)
    deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class VoiceListing(Table):
    """When an account's voices were last listed at the provider, and who lists them now."""

    __tablename__ = "voice_listings"

    account: Mapped[str] = mapped_column(String(64), primary_key=True)
    listed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    claimed_by: Mapped[uuid.UUID | None] = mapped_column(Uuid)
    claimed_until: Mapped[datetime | None] = mapped_column(UtcDateTime)


class VoiceSample(Table):
    """A recorded voice in our store, which only the provider may hear. It is removed once `remove_at` has passed.

    Until its voice is known to exist, that is soon: what a crash leaves behind goes away by itself. `record_id` is that
    of the voice's making; samples that it was updated with have none.
    """

    __tablename__ = "voice_samples"
    __table_args__ = (
        Index("ix_voice_samples_voice_id", "voice_id"),
        Index("ix_voice_samples_remove_at", "remove_at"),
    )

    key: Mapped[str] = mapped_column(String(512), primary_key=True)
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="RESTRICT"))
    record_id: Mapped[int | None] = mapped_column(ForeignKey("records.id", ondelete="RESTRICT"), unique=True)
    account: Mapped[str] = mapped_column(String(64))
    voice_id: Mapped[str | None] = mapped_column(String(PROVIDER_ID_CHARS))
    remove_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
