"""What a block has given: what comes after a stop, or after its failure, does not count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from insitu_shard.engine.gradients import detached
from insitu_shard.engine.graph import UNSET

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Set as AbstractSet

    from insitu_shard.engine.execute import Executor
    from insitu_shard.engine.graph import NodeId
    from insitu_shard.engine.plan import Plan


@dataclass(frozen=True, slots=True)
class Outcome:
    """The values and messages of a block's run."""

    plan: Plan
    executor: Executor
    counted: AbstractSet[NodeId] | None
    """Nodes whose turn came before one failed; None if none did."""
    has_graph: bool
    """Whether values may hang on the graph of gradients."""

    @property
    def saved(self) -> dict[NodeId, object]:
        """Values of the save nodes that ran."""
        values = self.executor.values.saved
        return {key: values[key] for key in self._counting(values)}

    @property
    def kept(self) -> dict[str, object]:
        """Values to be kept beyond the session, by handle."""
        return dict(self.executor.kept[key] for key in self._counting(self.executor.kept))

    @property
    def logs(self) -> list[str]:
        """Messages of the log nodes that ran, in the order of definition."""
        return [self.executor.logs[key] for key in self._counting(self.executor.logs)]

    @property
    def outliving(self) -> dict[NodeId, object]:
        """Values that are needed after the block."""
        values = {**self.executor.values.given, **self.executor.values.assigned}
        wanted = self.plan.outliving | (values.keys() - self.plan.nodes.keys())
        return {
            key: detached(values[key]) if self.has_graph else values[key]
            for key in self._counting(wanted & values.keys())
            if values[key] is not UNSET
        }

    def _counting(self, node_ids: Iterable[NodeId]) -> list[NodeId]:
        """Gives what counts, in order: a stop is as if nothing had been defined after it."""
        stopped_at = self.executor.stopped_at
        return [
            key
            for key in sorted(node_ids)
            if (stopped_at is None or key < stopped_at)
            and (self.counted is None or key in self.counted)
        ]
