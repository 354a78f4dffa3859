"""The journal's tables, version by version: `upgrade` brings a journal to the newest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

if TYPE_CHECKING:
    from sqlalchemy import Connection

# Of journals from before versions were written down.
_UNVERSIONED = "0001"


def upgrade(connection: Connection) -> None:
    """Makes the tables, or brings those of an older version up to date, in one transaction."""
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", "insitu_scheduler:migrations")
    config.set_main_option("path_separator", "os")
    names = sa.inspect(connection).get_table_names()
    if "sessions" in names and "alembic_version" not in names:
        command.stamp(config, _UNVERSIONED)
    command.upgrade(config, "head")
