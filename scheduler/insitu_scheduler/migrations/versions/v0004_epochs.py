"""How often a scheduler has begun to lead: orders of an earlier epoch are refused."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Makes the table, of one row."""
    epochs = op.create_table("epochs", sa.Column("epoch", sa.Integer, nullable=False))
    op.bulk_insert(epochs, [{"epoch": 0}])
