"""transcriptions

Revision ID: 0002
Revises: 0001
Create Date: 2026-11-21 13:55:59.043329+00:00
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "transcriptions",
        sa.Column("record_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("task_id", sa.String(length=128), nullable=False),
        sa.Column("key_fingerprint", sa.String(length=64), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("submitted_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("scheduled_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("result_url", sa.Text(), nullable=True),
        sa.Column("transcripts", sa.Text(), nullable=True),
        sa.Column("transcripts_with_words", sa.Text(), nullable=True),
        sa.Column("audio_info", sa.Text(), nullable=True),
        sa.Column("misses", sa.Integer(), nullable=False),
        sa.Column("unknowns", sa.Integer(), nullable=False),
        sa.Column("unfits", sa.Integer(), nullable=False),
        sa.Column("checked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("next_check_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("claimed_by", sa.Uuid(), nullable=True),
        sa.Column("claimed_until", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["record_id"], ["records.id"], name=op.f("fk_transcriptions_record_id_records"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name=op.f("fk_transcriptions_user_id_users"), ondelete="RESTRICT"
        ),
        sa.PrimaryKeyConstraint("record_id", name=op.f("pk_transcriptions")),
    )
    op.create_index("ix_transcriptions_next_check_at", "transcriptions", ["next_check_at"])
    op.create_index("ix_transcriptions_user_id_task_id", "transcriptions", ["user_id", "task_id"])
    op.add_column("records", sa.Column("output_data", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("records", "output_data")
    op.drop_index("ix_transcriptions_user_id_task_id", "transcriptions")
    op.drop_index("ix_transcriptions_next_check_at", "transcriptions")
    op.drop_table("transcriptions")
