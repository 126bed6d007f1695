"""voices

Revision ID: 0003
Revises: 0002
Create Date: 2026-11-21 16:47:41.666585+00:00
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "voice_listings",
        sa.Column("account", sa.String(length=64), nullable=False),
        sa.Column("listed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("claimed_by", sa.Uuid(), nullable=True),
        sa.Column("claimed_until", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("account", name=op.f("pk_voice_listings")),
    )
    op.create_table(
        "voices",
        sa.Column("account", sa.String(length=64), nullable=False),
        sa.Column("voice_id", sa.String(length=128), nullable=False),
        sa.Column("target_model", sa.String(length=64), nullable=False),
        sa.Column("prefix", sa.String(length=64), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("modified_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("account", "voice_id", name=op.f("pk_voices")),
    )
    op.create_index("ix_voices_voice_id", "voices", ["voice_id"])
    op.create_table(
        "voice_samples",
        sa.Column("key", sa.String(length=512), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("record_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("account", sa.String(length=64), nullable=False),
        sa.Column("voice_id", sa.String(length=128), nullable=True),
        sa.Column("remove_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name=op.f("fk_voice_samples_user_id_users"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["record_id"], ["records.id"], name=op.f("fk_voice_samples_record_id_records"), ondelete="RESTRICT"
        ),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_voice_samples")),
        sa.UniqueConstraint("record_id", name=op.f("uq_voice_samples_record_id")),
    )
    op.create_index("ix_voice_samples_voice_id", "voice_samples", ["voice_id"])
    op.create_index("ix_voice_samples_remove_at", "voice_samples", ["remove_at"])
    op.create_table(
        "enrollments",
        sa.Column("account", sa.String(length=64), nullable=False),
        sa.Column("target_model", sa.String(length=64), nullable=False),
        sa.Column("prefix", sa.String(length=16), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("voices_before", sa.Text(), nullable=False),
        sa.Column("lost_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("voice_id", sa.String(length=128), nullable=True),
        sa.Column("status", sa.String(length=16), nullable=True),
        sa.Column("followed_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("record_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("misses", sa.Integer(), nullable=False),
        sa.Column("checked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("next_check_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("claimed_by", sa.Uuid(), nullable=True),
        sa.Column("claimed_until", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["record_id"], ["records.id"], name=op.f("fk_enrollments_record_id_records"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name=op.f("fk_enrollments_user_id_users"), ondelete="RESTRICT"
        ),
        sa.PrimaryKeyConstraint("record_id", name=op.f("pk_enrollments")),
        sa.UniqueConstraint("voice_id", "account", name=op.f("uq_enrollments_voice_id_account")),
    )
    op.create_index("ix_enrollments_account_target_model_prefix", "enrollments", ["account", "target_model", "prefix"])
    op.create_index("ix_enrollments_next_check_at", "enrollments", ["next_check_at"])
    op.drop_column("records", "voice_id")


def downgrade() -> None:
    op.add_column("records", sa.Column("voice_id", sa.String(length=128), nullable=True))
    op.drop_index("ix_enrollments_next_check_at", "enrollments")
    op.drop_index("ix_enrollments_account_target_model_prefix", "enrollments")
    op.drop_table("enrollments")
    op.drop_index("ix_voice_samples_remove_at", "voice_samples")
    op.drop_index("ix_voice_samples_voice_id", "voice_samples")
    op.drop_table("voice_samples")
    op.drop_index("ix_voices_voice_id", "voices")
    op.drop_table("voices")
    op.drop_table("voice_listings")
