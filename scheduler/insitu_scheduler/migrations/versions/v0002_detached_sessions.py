"""Whether a session lives without anybody watching it: a scheduler that takes over must know."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Adds the column."""
    column = sa.Column("is_detached", sa.Boolean, nullable=False, server_default=sa.false())
    op.add_column("sessions", column)
