"""Fair turns between names, such as users or tiers: who is next, by what each has had. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sortedcontainers import SortedList

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(slots=True)
class _Share:
    tag: float
    """When the next turn is due, on the clock."""
    turn: int
    """Breaks ties: who had a turn longer ago comes first."""
    is_waiting: bool = False
    num_running: int = 0


class FairTurns:
    """Start-time fair queueing by cost (Goyal, Vin and Cheng, SIGCOMM 1996).

    A name is due at its start tag, on a clock that shows the tag of the turn before. A turn puts
    the name's tag off by what it costs. So names that always wait get equal shares, whatever
    their turns cost, and one that was idle starts at the clock: no credit is saved up.
    """

    def __init__(self) -> None:
        self.clock = 0.0
        self._shares: dict[str, _Share] = {}
        self._order: SortedList = SortedList()
        # Tags of names that have nothing here, but have had more than their share.
        self._in_debt: SortedList = SortedList()
        self._num_turns = 0

    def wait(self, name: str) -> None:
        """Takes note that a name wants turns from now on."""
        share = self._share(name)
        share.tag = max(share.tag, self.clock)
        share.is_waiting = True
        self._order.add((share.tag, share.turn, name))

    def rest(self, name: str) -> None:
        """Takes note that a name wants no more turns for now."""
        share = self._shares[name]
        self._order.remove((share.tag, share.turn, name))
        share.is_waiting = False
        self._forget_idle(name, share)

    def begin(self, name: str, cost: float, *, is_due: bool) -> None:
        """Gives a name a turn.

        Args:
            name: whose turn it is.
            cost: what it is expected to cost, divided by the name's weight.
            is_due: whether it comes by its tag. Others, that come early, do not move the clock.
        """
        share = self._share(name)
        if is_due:
            self.clock = max(self.clock, share.tag)
        self._num_turns += 1
        share.num_running += 1
        self._move(name, share, share.tag + cost, turn=self._num_turns)
        while self._in_debt and self._in_debt[0][0] <= self.clock:
            del self._shares[self._in_debt.pop(0)[1]]

    def end(self, name: str, correction: float) -> None:
        """Takes note that a turn ended, and that it cost more, or less, than was charged."""
        share = self._shares[name]
        share.num_running -= 1
        self._move(name, share, share.tag + correction, turn=share.turn)
        self._forget_idle(name, share)

    def tag(self, name: str) -> float:
        """Gives when a name's next turn would be due."""
        share = self._shares.get(name)
        return max(share.tag, self.clock) if share else self.clock

    @property
    def tags(self) -> list[tuple[float, int, str]]:
        """The names that wait as they are due, each after its tag and its last turn."""
        return list(self._order)

    def __iter__(self) -> Iterator[str]:
        """Yields the names that wait, as they are due."""
        return (name for _, _, name in self._order)

    def __len__(self) -> int:
        """Counts the names that are remembered."""
        return len(self._shares)

    def _share(self, name: str) -> _Share:
        if name not in self._shares:
            self._shares[name] = _Share(self.clock, self._num_turns)
        share = self._shares[name]
        self._in_debt.discard((share.tag, name))
        return share

    def _move(self, name: str, share: _Share, tag: float, *, turn: int) -> None:
        if share.is_waiting:
            self._order.remove((share.tag, share.turn, name))
            self._order.add((tag, turn, name))
        share.tag, share.turn = tag, turn

    def _forget_idle(self, name: str, share: _Share) -> None:
        """Forgets a name that has nothing here, now or once the clock has caught up."""
        if share.is_waiting or share.num_running:
            return
        if share.tag <= self.clock:
            del self._shares[name]
        else:
            self._in_debt.add((share.tag, name))
