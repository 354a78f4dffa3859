"""Keeps the values that outlive the trace that made them, by session."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from insitu_shard.engine.training import OptimizerValue, ParameterValue
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SessionId = str


@dataclass(frozen=True, slots=True)
class Budgets:
    """How much memory of this process values may take; None for as much as there is."""

    kept: int = 0
    """What one user keeps beyond sessions."""
    session: int | None = None
    """What the steps of one session give to later ones."""
    shard: int | None = None
    """What those of all sessions do together."""


class HandleStore:
    """Values in this process's memory under their session and node.

    A session sees its own values only: whoever asks names the session, which the service takes from
    the scheduler and never from a user.
    """

    def __init__(self, budgets: Budgets | None = None) -> None:
        """Makes an empty store."""
        self.budgets = budgets or Budgets()
        self._sessions: dict[SessionId, SessionValues] = {}
        self._kept: dict[str, KeptValues] = {}

    def kept_for(self, user: str) -> KeptValues:
        """Gives a user's values that outlive their session."""
        return self._kept.setdefault(user, KeptValues(self.budgets.kept))

    def let_go(self, user: str, handle_id: str) -> bool:
        """Frees a value that outlived its session; tells whether there was one."""
        return self.kept_for(user).pop(handle_id, None) is not None

    def values(self, session_id: SessionId) -> SessionValues:
        """Gives the values of a session, to read and to add to."""
        return self._sessions.setdefault(session_id, SessionValues(self))

    def check(self, changed: SessionValues) -> None:
        """Sees to it that the values of a session, and those of all sessions, are within budget.

        Raises:
            CapacityError: LIMIT_EXCEEDED or OUT_OF_MEMORY.
        """
        changed.size = num_bytes(list(changed.values()))
        most, allowed = self.budgets.session, changed.max_bytes
        if allowed is not None and changed.size > allowed and (most is None or allowed <= most):
            raise error(
                Reason.LIMIT_EXCEEDED,
                f"the session's values take {changed.size:,} bytes between its steps, and they may "
                f"take at most {allowed:,}; keep less for later traces, or ask the server's "
                "operator for a higher limit",
                limit="max_handle_bytes",
                bound=allowed,
            )
        if most is not None and changed.size > most:
            raise error(
                Reason.OUT_OF_MEMORY,
                f"the session's values take {changed.size:,} bytes between its steps, and those of "
                f"one session may take at most {most:,} here; keep less for later traces",
                bytes=changed.size,
                maxBytes=most,
            )
        total, most = self.session_bytes, self.budgets.shard
        if most is not None and total > most:
            raise error(
                Reason.OUT_OF_MEMORY,
                f"the session's values take {changed.size:,} bytes between its steps, with those "
                f"of other sessions {total:,}, and all may take at most {most:,} here; keep less "
                "for later traces, or run it again later",
                bytes=changed.size,
                totalBytes=total,
                maxBytes=most,
            )

    def release(self, session_id: SessionId) -> int:
        """Frees all values of a session and tells how many there were."""
        return len(self._sessions.pop(session_id, {}))

    @property
    def session_ids(self) -> list[SessionId]:
        """The sessions that have values here."""
        return list(self._sessions)

    @property
    def num_values(self) -> int:
        """How many values are kept."""
        return sum(len(values) for values in self._all())

    @property
    def num_bytes(self) -> int:
        """How many bytes the kept tensors' memory takes, each memory counted once."""
        return num_bytes([value for values in self._all() for value in values.values()])

    @property
    def session_bytes(self) -> int:
        """How many bytes the values of all sessions take, as they count against the budget."""
        return sum(values.size for values in self._sessions.values())

    @property
    def largest_kept_bytes(self) -> int:
        """How many bytes the values take that one user keeps beyond sessions, at most."""
        return max((num_bytes(kept) for kept in self._kept.values()), default=0)

    def _all(self) -> list[Mapping[Any, object]]:
        return [*self._sessions.values(), *self._kept.values()]


class SessionValues(dict[Any, object]):
    """Values that steps of a session give to later ones, by node."""

    def __init__(self, store: HandleStore) -> None:
        super().__init__()
        self._store = store
        self.size = 0
        """Their bytes when they were last checked."""
        self.max_bytes: int | None = None
        """What the user's API key allows; None for what the store does."""

    def bound(self, max_bytes: int | None) -> None:
        """Takes note of what the user's API key allows, if it says."""
        self.max_bytes = max_bytes

    def check(self) -> None:
        """Sees to it that they are within what the key allows, and the store's budgets.

        Raises:
            CapacityError: LIMIT_EXCEEDED or OUT_OF_MEMORY.
        """
        self._store.check(self)


class KeptValues(dict[str, object]):
    """Values of one user that outlive their session, by handle, within a budget."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self._most_bytes = self._max_bytes = max_bytes

    def bound(self, max_bytes: int | None) -> None:
        """Takes note of what the user's API key allows, if it says."""
        self._max_bytes = self._most_bytes if max_bytes is None else max_bytes
        self._max_bytes = min(self._max_bytes, self._most_bytes)

    def keep(self, values: Mapping[str, object]) -> None:
        """Adds values, all or none.

        Raises:
            CapacityError: OUT_OF_MEMORY, if they do not fit the budget.
        """
        size = num_bytes([*self.values(), *values.values()])
        if size > self._max_bytes:
            raise error(
                Reason.OUT_OF_MEMORY,
                f"kept values would take {size:,} bytes, and a user's take at most "
                f"{self._max_bytes:,}; release() handles that are not needed, or keep less",
                bytes=size,
                maxBytes=self._max_bytes,
            )
        self.update(values)


def num_bytes(values: object) -> int:
    """Gives the memory that the tensors of values take, each memory counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for leaf in pytree.tree_leaves(values)
        for tensor in _tensors(leaf)
    }
    return sum(storages.values())


def _tensors(leaf: object) -> Iterable[torch.Tensor]:
    if isinstance(leaf, ParameterValue | OptimizerValue):
        return leaf.tensors
    return [leaf] if isinstance(leaf, torch.Tensor) else []
