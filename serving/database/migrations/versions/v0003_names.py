"""Owners of models' names, filled from the jobs that registered them."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "names",
        sa.Column("name", sa.String(120), primary_key=True),
        sa.Column("owner", sa.String(16), nullable=False),
        sa.Column("since", sa.DateTime, nullable=False),
        sa.Column("registered", sa.Boolean, nullable=False),
    )
    op.create_index("ix_names_owner", "names", ["owner"])
    op.execute(
        """INSERT INTO names (name, owner, since, registered)
        SELECT j.register, j.owner, j.created, true FROM jobs j
        WHERE j.number IN (SELECT max(number) FROM jobs WHERE registered IS NOT NULL GROUP BY register)"""
    )


def downgrade() -> None:
    op.drop_table("names")
