"""Refuses orders of a scheduler that another has replaced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from insitu_wire.errors import Reason, error
from insitu_wire.limits import EPOCH_METADATA

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]


class Epochs:
    """The highest epoch of a scheduler that this group has heard of."""

    def __init__(self) -> None:
        self._highest = 0

    def heard(self, epoch: int) -> None:
        """Takes note that a scheduler leads."""
        self._highest = max(self._highest, epoch)

    def check(self, context: Context) -> None:
        """Checks a call; other shard groups, that carry no epoch, may always ask.

        Raises:
            SessionStateError: SCHEDULER_REPLACED.
        """
        shown = str(dict(context.invocation_metadata() or ()).get(EPOCH_METADATA, ""))
        if not shown.isdecimal():
            return
        epoch = int(shown)
        if epoch < self._highest:
            raise error(
                Reason.SCHEDULER_REPLACED,
                f"the order is of epoch {epoch}, and the scheduler of epoch {self._highest} leads "
                "by now; this scheduler has been replaced",
                epoch=epoch,
                highest=self._highest,
            )
        self.heard(epoch)
