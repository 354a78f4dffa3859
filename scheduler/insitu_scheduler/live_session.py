"""A session between its acceptance and its end."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from insitu_scheduler import events
from insitu_scheduler.cost_model import Work
from insitu_scheduler.run_clock import RunClock
from insitu_scheduler.terms import Terms
from insitu_wire.errors import Error, Reason, error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from insitu_proto.v1.event_pb2 import Event
    from insitu_proto.v1.session_pb2 import Session
    from insitu_scheduler.events import EventLog
    from insitu_scheduler.places import SessionPlaces
    from insitu_scheduler.queue import SessionId, WaitingSession
    from insitu_scheduler.registry import LeaseId

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class LiveSession:
    """A session that waits or runs."""

    log: EventLog
    session: Session
    model: str | None
    needed_leases: Mapping[str, LeaseId] = field(default_factory=dict)
    """The groups that alone can run it, by model, for they keep what the session loads."""
    keepers: frozenset[SessionId] = frozenset()
    """The sessions that keep what it loads: it runs after them."""
    terms: Terms = field(default_factory=Terms)
    """What it may take."""
    work: asyncio.Task[None] | None = None
    """What runs it; None while it waits."""
    asked: Work = field(default_factory=Work)
    """What it asks of its models, as far as it is known before it runs."""
    expected_cost: float = 0.0
    """Seconds of a group's time that it is expected to take."""
    is_suspect: bool = False
    """Whether a group was lost that ran it, perhaps by its doing: nothing runs beside it then."""
    num_bytes: int = field(init=False)
    """Its size, as it was sent."""
    places: SessionPlaces | None = None
    """What it has of the groups that run it; None before that."""
    turn: WaitingSession | None = None
    """What its user is charged for while it has a place."""
    turn_began_at: float = 0.0
    """How many seconds of shard time it had taken when the turn began."""
    came_at: float = 0.0
    """How many it had taken when it last got a place."""
    seconds: float | None = None
    """How many it has taken so far; None if that is not known."""
    pausing: asyncio.Task[None] | None = None
    """What has its group hold it, or go on with it."""
    clock: RunClock = field(init=False)
    """Bounds how long it runs."""
    ended_by: Event | None = None
    """How it ends whatever becomes of its work: it was cancelled, or its time is over."""
    verdict: Event | None = None
    """How it is to end, once its work has been stopped from outside."""

    def __post_init__(self) -> None:
        self.num_bytes = self.session.ByteSize()
        self.clock = RunClock(self.terms.limits.max_run_seconds)

    @property
    def lease_ids(self) -> frozenset[LeaseId]:
        """The groups that run it."""
        return frozenset(self.places.leases.values() if self.places else ())

    def stop(self, verdict: Event) -> None:
        """Stops its work; the first verdict stands."""
        if self.work is not None and self.verdict is None:
            self.verdict = verdict
            self.work.cancel()


async def ending(live: LiveSession) -> Event:
    """Waits for the work of a session that runs and tells how it ended."""
    assert live.work is not None
    try:
        await live.work
    except asyncio.CancelledError:
        return live.verdict or events.cancelled()
    except Error as err:
        return events.failed(err)
    except Exception:  # noqa: BLE001 - the owner answers for what nobody foresaw
        session_id = live.log.session_id
        _log.exception("session %s met a flaw of the scheduler", session_id)
        flaw = error(
            Reason.INTERNAL,
            f"the server met a flaw of its own; its log has it under {session_id}",
            logId=session_id,
        )
        return events.failed(flaw)
    return events.completed()
