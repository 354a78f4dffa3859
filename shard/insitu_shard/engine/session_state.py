"""What a session has where it runs: models, values, and how it wants to be run."""

from __future__ import annotations

from collections import ChainMap, Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from insitu_shard.compiler import Limits
from insitu_shard.engine.cancellation import Cancellation
from insitu_shard.engine.graph import UNSET, references, resolve
from insitu_shard.engine.handles import SessionValues
from insitu_shard.engine.memory import compact, copied
from insitu_shard.engine.training import ParameterValue, seen

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from insitu_shard.engine.graph import Node, NodeId
    from insitu_shard.engine.handles import KeptValues
    from insitu_shard.engine.liveness import Liveness
    from insitu_shard.engine.memory import StorageKey
    from insitu_shard.engine.module import LoadedModule


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a session's traces may be run together."""

    is_exact: bool = False
    """Each trace has a pass of its own, of all positions and layers that the model itself runs."""
    may_pad: bool = False
    """Traces of different lengths may share a pass."""
    checkpoints: bool = False
    """Passes that take gradients keep the inputs of decoder layers alone."""
    limits: Limits = field(default_factory=Limits)
    """How large a pass may be."""


@dataclass(slots=True, kw_only=True)
class SessionState:
    """The state of one session while a segment of it runs."""

    models: Mapping[str, LoadedModule]
    """What its traces run on, by name."""
    values: dict[NodeId, object]
    """Values of steps that have ended."""
    brought: AbstractSet[StorageKey]
    """Memory of the user's own tensors."""
    handles: KeptValues
    """The user's values that are kept beyond sessions."""
    liveness: Liveness
    """Which values are used later."""
    seed: int
    options: Options
    writes_in_place: bool
    """Whether any step writes into an existing value."""
    cancellation: Cancellation = field(default_factory=Cancellation)
    early: dict[NodeId, object] = field(default_factory=dict)
    """Values of traces that have run, but not ended."""
    _num_runs: Counter[NodeId] = field(default_factory=Counter)

    @property
    def any_model(self) -> LoadedModule:
        """What runs computations between traces: they run where any of the models is."""
        return next(iter(self.models.values()))

    @property
    def earlier(self) -> Mapping[NodeId, object]:
        """All values that are there, as they come and go."""
        return ChainMap(self.values, self.early)

    def resolve(self, value: object) -> object:
        """Puts values in the place of references; UNSET if one is not set."""
        earlier = self.earlier
        if any(node_id not in earlier for node_id in references(value)):
            return UNSET
        # Of a parameter a copy: it is trained on.
        return resolve(
            value,
            lambda node_id: (
                copied(seen(found))
                if isinstance(found := earlier[node_id], ParameterValue)
                else found
            ),
        )

    def keep(self, outliving: Mapping[NodeId, object]) -> None:
        """Takes in what a step gives to later ones.

        Raises:
            CapacityError: LIMIT_EXCEEDED or OUT_OF_MEMORY.
        """
        beside = list(self.values.values()) if self.writes_in_place else None
        self.values.update(compact(outliving, beside=beside))
        if outliving and isinstance(self.values, SessionValues):
            self.values.check()

    def free(self, used_later: frozenset[NodeId]) -> None:
        """Frees values that no later step uses."""
        for node_id in self.values.keys() - used_later:
            del self.values[node_id]

    def block_seed(self, nodes: Sequence[Node], seed: int) -> str:
        """Gives what makes the random numbers of a block its own, and those of each item."""
        first_id = nodes[0].id if nodes else 0
        self._num_runs[first_id] += 1
        return f"{seed or self.seed}:{self._num_runs[first_id]}"
