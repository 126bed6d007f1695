"""money

Revision ID: 0005
Revises: 0004
Create Date: 2026-11-22 01:47:12.093114+00:00
"""

from collections.abc import Sequence
from decimal import Decimal

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("users", sa.Column("monthly_budget", _money(), nullable=True))
    op.add_column("records", sa.Column("reserved", _money(), nullable=True))
    op.add_column("records", sa.Column("planned_key", sa.String(length=512), nullable=True))
    op.add_column("records", sa.Column("idempotency_key", sa.String(length=255), nullable=True))
    op.add_column("records", sa.Column("request_digest", sa.String(length=64), nullable=True))
    op.add_column("records", sa.Column("sent_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index("ix_records_user_id_created_at", "records", ["user_id", "created_at"])
    op.create_index("ix_records_user_id_model_name_id", "records", ["user_id", "model_name", "id"])
    op.create_table(
        "submitted_files",
        sa.Column("record_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("misses", sa.Integer(), nullable=False),
        sa.Column("checked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("next_check_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("claimed_by", sa.Uuid(), nullable=True),
        sa.Column("claimed_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("key_fingerprint", sa.String(length=64), nullable=False),
        sa.Column("file_url", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["record_id"], ["records.id"], name=op.f("fk_submitted_files_record_id_records"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name=op.f("fk_submitted_files_user_id_users"), ondelete="RESTRICT"
        ),
        sa.PrimaryKeyConstraint("record_id", name=op.f("pk_submitted_files")),
    )
    op.create_index("ix_submitted_files_next_check_at", "submitted_files", ["next_check_at"])
    op.create_index("ix_transcriptions_task_id", "transcriptions", ["task_id"])
    op.create_index("uq_records_user_id_idempotency_key", "records", ["user_id", "idempotency_key"], unique=True)


def downgrade() -> None:
    # Whoever runs the version before ends the records of what is looked for here.
    op.execute(
        "UPDATE records SET lease_expires_at = created_at"
        " WHERE status = 'running' AND id IN (SELECT record_id FROM submitted_files)"
    )
    op.drop_index("ix_transcriptions_task_id", table_name="transcriptions")
    op.drop_index("ix_submitted_files_next_check_at", table_name="submitted_files")
    op.drop_table("submitted_files")
    op.drop_index("uq_records_user_id_idempotency_key", table_name="records")
    op.drop_index("ix_records_user_id_model_name_id", table_name="records")
    op.drop_index("ix_records_user_id_created_at", table_name="records")
    for column in ("sent_at", "request_digest", "idempotency_key", "planned_key", "reserved"):
        op.drop_column("records", column)
    op.drop_column("users", "monthly_budget")


def _money() -> sa.Numeric[Decimal]:
    return sa.Numeric(28, 12).with_variant(sa.BigInteger(), "sqlite")
