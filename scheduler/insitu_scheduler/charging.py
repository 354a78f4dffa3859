"""Charges users for their sessions: what these are expected to cost, and then what they did."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from insitu_scheduler.cost_model import CostModel
from insitu_scheduler.segments import models_of, work_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from insitu_scheduler.fair_queue import FairQueue
    from insitu_scheduler.live_session import LiveSession
    from insitu_scheduler.metrics import SchedulerMetrics
    from insitu_scheduler.observing import Observer
    from insitu_scheduler.queue import WaitingSession


class Charging:
    """A session is charged a turn at a time: a quantum, or what it takes until it gives way."""

    def __init__(
        self,
        queue: FairQueue,
        observer: Observer,
        metrics: SchedulerMetrics,
        depths: Callable[[str], Mapping[str, float]],
    ) -> None:
        """Makes it.

        Args:
            queue: has the turns.
            observer: is told what users have had.
            metrics: count that.
            depths: as for `work_of`.
        """
        self._depths = depths
        self._queue = queue
        self._observer = observer
        self._metrics = metrics
        self._costs = CostModel()

    def expect(self, live: LiveSession) -> None:
        """Takes note of what a session is expected to take."""
        live.asked = work_of(live.session, self._depths)
        live.expected_cost = self._costs.expect(live.model, live.asked)

    def begin_turn(self, live: LiveSession, waiting: WaitingSession) -> None:
        """Takes note that a session has got a place, and that the queue has charged its turn."""
        live.turn, live.turn_began_at = waiting, live.seconds or 0.0
        live.came_at = live.turn_began_at

    def renew_turn(self, live: LiveSession, seconds: float) -> None:
        """Charges a session that has had a turn, and keeps its place, for another.

        So whoever had a group for themselves does not owe all of that to those who come.

        Args:
            live: the session.
            seconds: what the turn is expected to take.
        """
        assert live.turn is not None
        again = replace(live.turn, estimated_cost=seconds)
        self.end_turn(live)
        self._queue.renew(again)
        live.turn, live.turn_began_at = again, live.seconds or 0.0

    def spent(self, live: LiveSession) -> float:
        """Gives the seconds that a session has had in this turn."""
        return max((live.seconds or 0.0) - live.turn_began_at, 0.0)

    def spent_here(self, live: LiveSession) -> float:
        """Gives the seconds that a session has had since it last got a place."""
        return max((live.seconds or 0.0) - live.came_at, 0.0)

    def end_turn(self, live: LiveSession) -> None:
        """Charges what a session has had in this turn; what was expected, if that is not known."""
        turn, live.turn = live.turn, None
        if turn is not None:
            cost = turn.estimated_cost if live.seconds is None else self.spent(live)
            self._queue.settle(turn, cost)
            self._observer.served(turn, seconds=cost)
            self._metrics.charged(turn.model or "", seconds=cost)

    def end(self, live: LiveSession, seconds: float | None) -> None:
        """Charges a session whose work has ended, and learns from what it took.

        Args:
            live: the session.
            seconds: what it took in all; None if that is not known.
        """
        if seconds is not None:
            live.seconds = seconds
        self.end_turn(live)
        if seconds is None:
            return
        self._metrics.cost_known(live.model or "", expected=live.expected_cost, seconds=seconds)
        if len(models_of(live.session)) <= 1:
            self._costs.learn(live.model, live.asked, seconds)
