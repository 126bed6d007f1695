"""scale

Revision ID: 0008
Revises: 0007
Create Date: 2026-11-22 11:00:00.000000+00:00
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0008"
down_revision: str | None = "0007"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "subtotals",
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("month_began", sa.DateTime(timezone=True), nullable=False),
        sa.Column("billed_before", sa.DateTime(timezone=True), nullable=False),
        sa.Column("amount", sa.Numeric(28, 12).with_variant(sa.BigInteger(), "sqlite"), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_subtotals_user_id_users"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("user_id", name=op.f("pk_subtotals")),
    )
    for name in ("user_id_id", "user_id_type_id", "user_id_model_name_id", "user_id_created_at"):
        op.drop_index(f"ix_records_{name}", table_name="records")
    op.create_index("ix_records_history", "records", ["user_id", "created_at", "id"])
    op.create_index("ix_records_history_by_type", "records", ["user_id", "type", "created_at", "id"])
    op.create_index("ix_records_history_by_model", "records", ["user_id", "model_name", "created_at", "id", "type"])
    running, named = sa.text("status = 'running'"), sa.text("idempotency_key IS NOT NULL")
    op.create_index(
        "ix_records_running", "records", ["user_id", "created_at"], sqlite_where=running, postgresql_where=running
    )
    op.drop_index("uq_records_user_id_idempotency_key", table_name="records")
    op.create_index(
        "uq_records_user_id_idempotency_key",
        "records",
        ["user_id", "idempotency_key"],
        unique=True,
        sqlite_where=named,
        postgresql_where=named,
    )

    if op.get_context().dialect.name == "postgresql":
        # An index tells by itself what is visible to all: where vacuum has been. By default that is at each fifth.
        op.execute("ALTER TABLE records SET (autovacuum_vacuum_scale_factor = 0.05)")
        op.execute("ALTER TABLE records SET (autovacuum_vacuum_insert_scale_factor = 0.05)")


def downgrade() -> None:
    if op.get_context().dialect.name == "postgresql":
        op.execute("ALTER TABLE records RESET (autovacuum_vacuum_scale_factor, autovacuum_vacuum_insert_scale_factor)")
    op.drop_index("uq_records_user_id_idempotency_key", table_name="records")
    op.create_index("uq_records_user_id_idempotency_key", "records", ["user_id", "idempotency_key"], unique=True)
    for name in ("running", "history_by_model", "history_by_type", "history"):
        op.drop_index(f"ix_records_{name}", table_name="records")
    op.create_index("ix_records_user_id_created_at", "records", ["user_id", "created_at"])
    op.create_index("ix_records_user_id_model_name_id", "records", ["user_id", "model_name", "id"])
    op.create_index("ix_records_user_id_type_id", "records", ["user_id", "type", "id"])
    op.create_index("ix_records_user_id_id", "records", ["user_id", "id"])
    op.drop_table("subtotals")
