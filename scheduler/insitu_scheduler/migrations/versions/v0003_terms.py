"""On which terms a session was accepted: a scheduler that takes over holds them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Adds the column."""
    op.add_column("sessions", sa.Column("terms", sa.String, nullable=False, server_default=""))
