"""machines

Revision ID: 0006
Revises: 0005
Create Date: 2026-11-22 04:40:00.000000+00:00
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "generated_secrets",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_generated_secrets")),
    )

    op.add_column("records", sa.Column("erased_at", sa.DateTime(timezone=True), nullable=True))
    unerased = sa.text("erased_at IS NULL")
    op.create_index(
        "ix_records_finished_at", "records", ["finished_at"], sqlite_where=unerased, postgresql_where=unerased
    )

    op.create_table(
        "removals",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("key", sa.String(length=512), nullable=False),
        sa.Column("remove_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("removed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("misses", sa.Integer(), nullable=False),
        sa.Column("claimed_by", sa.Uuid(), nullable=True),
        sa.Column("erasure_id", sa.Uuid(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_removals")),
    )
    op.create_index("ix_removals_remove_at", "removals", ["remove_at"])
    op.create_index("ix_removals_erasure_id_remove_at", "removals", ["erasure_id", "remove_at"])

    op.create_table(
        "erasures",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("accounts", sa.Text(), nullable=False),
        sa.Column("next_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("claimed_by", sa.Uuid(), nullable=True),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_erasures_user_id_users"), ondelete="RESTRICT"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_erasures")),
        sa.UniqueConstraint("user_id", name=op.f("uq_erasures_user_id")),
    )
    op.create_index("ix_erasures_next_at", "erasures", ["next_at"])


def downgrade() -> None:
    op.drop_index("ix_erasures_next_at", table_name="erasures")
    op.drop_table("erasures")
    op.drop_index("ix_removals_erasure_id_remove_at", table_name="removals")
    op.drop_index("ix_removals_remove_at", table_name="removals")
    op.drop_table("removals")
    op.drop_index("ix_records_finished_at", table_name="records")
    op.drop_column("records", "erased_at")
    op.drop_table("generated_secrets")
