"""Keeps the values that outlive the trace that made them, by session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from insitu_shard.engine.graph import NodeId

SessionId = str


class HandleStore:
    """Values in this process's memory under their session and node.

    A session sees its own values only: whoever asks names the session, which the service takes from
    the scheduler and never from a user.
    """

    def __init__(self) -> None:
        self._sessions: dict[SessionId, dict[NodeId, object]] = {}

    def values(self, session_id: SessionId) -> dict[NodeId, object]:
        """Gives the values of a session, to read and to add to."""
        return self._sessions.setdefault(session_id, {})

    def release(self, session_id: SessionId) -> int:
        """Frees all values of a session and tells how many there were."""
        return len(self._sessions.pop(session_id, {}))

    @property
    def num_values(self) -> int:
        """How many values are kept."""
        return sum(map(len, self._sessions.values()))

    @property
    def num_bytes(self) -> int:
        """How many bytes the kept tensors' memory takes, each memory counted once."""
        storages = {
            leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
            for values in self._sessions.values()
            for leaf in pytree.tree_leaves(list(values.values()))
            if isinstance(leaf, torch.Tensor)
        }
        return sum(storages.values())
