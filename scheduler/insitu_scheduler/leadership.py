"""Which of several schedulers leads: the one whose connection to the journal has the lock."""

from __future__ import annotations

import sqlalchemy as sa

from insitu_scheduler.migrations import upgrade

# "insitu", for this is the database's lock and not a table's.
_LOCK = 0x696E73697475
_EPOCHS = sa.table("epochs", sa.column("epoch", sa.Integer))


def try_to_lead(connection: sa.Connection) -> int | None:
    """Takes the lead, brings the tables up to date, and gives the new epoch.

    None if another scheduler leads. The lock goes with the connection: whoever loses it can not
    write any more, and orders of an earlier epoch are refused by the shard groups.
    """
    if connection.dialect.name == "postgresql":
        lock = sa.select(sa.func.pg_try_advisory_lock(_LOCK))
        if not connection.scalar(lock):
            return None
    upgrade(connection)
    raised = sa.update(_EPOCHS).values(epoch=_EPOCHS.c.epoch + 1).returning(_EPOCHS.c.epoch)
    epoch: int = connection.scalars(raised).one()
    return epoch


def check_alive(connection: sa.Connection) -> None:
    """Finds out whether the connection is there."""
    connection.execute(sa.select(1))
