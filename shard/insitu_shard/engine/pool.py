"""Runs segments of several sessions beside each other, round by round, and merges their passes."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from insitu_shard.compiler import Limits
from insitu_shard.engine.events import Finished, SegmentEvent, StepFollows, TraceStarted
from insitu_shard.engine.pass_run import run_next_pass
from insitu_shard.engine.turns import Turns
from insitu_wire.errors import Error

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from insitu_shard.compiler import Pass
    from insitu_shard.engine.pending import Pending
    from insitu_shard.engine.segment import SegmentRun

# A segment that computes on and on without a pass lets the others have theirs.
_MAX_STEPS = 100


@dataclass(frozen=True, slots=True)
class PassReport:
    """What a pass took, and for how many."""

    seconds: float
    num_segments: int
    plan: Pass


class SegmentPool:
    """The segments that run now.

    Every rank of a group has one. What is added and dropped between rounds, in which order, must be
    the same on all of them, for a round has collectives.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        """Makes an empty pool.

        Args:
            limits: how large a pass may be.
        """
        self._limits = limits or Limits()
        self._running: dict[str, _Running] = {}
        self._turns = Turns()
        self.on_pass: Callable[[PassReport], None] | None = None
        """Called after each pass."""

    def add(self, key: str, run: SegmentRun, *, user: str = "") -> None:
        """Takes in a segment; it runs from the next round on.

        Args:
            key: names it for as long as it is here.
            run: the segment; it has not been started.
            user: whose it is: each user gets an equal part of what passes cost.
        """
        if key in self._running:
            raise ValueError(f"a segment {key!r} runs already")
        self._running[key] = _Running(run)
        self._turns.add(key, user)

    def drop(self, key: str) -> None:
        """Ends a segment at once, without a word; one that has ended stays ended."""
        if running := self._forget(key):
            running.close()

    def cancel(self, key: str) -> None:
        """Has a segment do nothing more until it is dropped. From any thread, on one rank.

        A pass that runs for it alone ends at the next decoder layer; of several ranks a long one.
        """
        if running := self._running.get(key):
            running.cancel()

    def pause(self, key: str, *, goes_on: bool = False) -> None:
        """Holds a segment before its next trace, or lets it go on; its values stay."""
        if key in self._running:
            self._running[key].is_paused = not goes_on

    @property
    def is_idle(self) -> bool:
        """Whether no segment could go on."""
        return all(running.is_held for running in self._running.values())

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the segments, in the order in which they were added."""
        return tuple(self._running)

    def __len__(self) -> int:
        """Counts the segments."""
        return len(self._running)

    def round(self) -> Iterator[tuple[str, SegmentEvent | Error]]:
        """Has each segment go on until it needs a pass, and runs one pass.

        The pass is one that the segment needs whose turn it is, with what fits into it of the
        others. Yields what happens with the segment's key; a segment's last event is `Finished`, or
        the error that it failed with. It is not in the pool any more when that is told, and the
        others do not notice.
        """
        yield from self._go_on()
        waiting = [key for key, at in self._running.items() if at.pending and not at.is_held]
        if waiting:
            self._run_pass(self._turns.order(waiting))
            yield from self._go_on()

    def _run_pass(self, keys: Sequence[str]) -> None:
        # Also of those that are held: they may be in a generation that others go on with.
        owners = {
            id(at.trace): key for key, running in self._running.items() for at in running.pending
        }
        pending = [at for key in keys for at in self._running[key].pending]
        started = time.perf_counter()
        ran = run_next_pass(pending, self._limits)
        seconds = time.perf_counter() - started
        self._turns.took(keys[0])
        if ran is None:
            return
        costs, sessions = ran.plan.costs, [owners[id(member.trace)] for member in ran.members]
        for key, cost in zip(sessions, costs, strict=True):
            self._turns.charge(key, cost)
            self._running[key].seconds += seconds * cost / sum(costs)
        if self.on_pass is not None:
            self.on_pass(PassReport(seconds, len(set(sessions)), ran.plan))

    def _go_on(self) -> Iterator[tuple[str, SegmentEvent | Error]]:
        for key, running in list(self._running.items()):
            if running.is_held:
                continue
            for event in running.go_on():
                if self._running.get(key) is not running:
                    break
                if isinstance(event, Finished | Error):
                    self._forget(key)
                yield key, event

    def _forget(self, key: str) -> _Running | None:
        if running := self._running.pop(key, None):
            self._turns.remove(key)
        return running


class _Running:
    """A segment on its way."""

    def __init__(self, run: SegmentRun) -> None:
        self.cancel = run.cancel
        self._run = run
        self._told = _told(run)
        self._pending: Sequence[Pending] = ()
        self.seconds = 0.0
        """What it has taken of the engine's time."""
        self.is_paused = False

    @property
    def is_held(self) -> bool:
        """Whether it is not to go on."""
        return self.is_paused or self._run.is_cancelled

    @property
    def pending(self) -> list[Pending]:
        """Its traces that may run and have not; the first is the one that it waits for."""
        return [at for at in self._pending if not at.trace.has_run]

    def go_on(self) -> Iterator[SegmentEvent | Error]:
        """Yields what it tells until it waits for a pass."""
        if self._pending and not (head := self._pending[0].trace).has_run:
            # It has a step of its generation behind it, and others before it.
            yield from head.new_tokens()
            return
        self._pending = ()
        num_steps = 0
        while event := self._next_event():
            if not isinstance(event, StepFollows):
                yield event
                continue
            self._pending = event.pending
            num_steps += 1
            if self.pending or num_steps == _MAX_STEPS:
                return

    def _next_event(self) -> SegmentEvent | StepFollows | Error | None:
        started = time.perf_counter()
        event = next(self._told, None)
        self.seconds += time.perf_counter() - started
        if isinstance(event, Finished | TraceStarted):
            return replace(event, seconds=self.seconds)
        return event

    def close(self) -> None:
        """Ends it."""
        self._told.close()


def _told(run: SegmentRun) -> Generator[SegmentEvent | StepFollows | Error]:
    try:
        yield from run.run()
    except Error as err:
        yield err
    else:
        yield Finished(run.has_exited)
