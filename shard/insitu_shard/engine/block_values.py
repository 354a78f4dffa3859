"""The values of a block: kept until their last use, seen by each node as it is to see them."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from insitu_shard.engine.graph import UNSET, Assign, Call, Ref, resolve
from insitu_shard.engine.memory import (
    MemoryMap,
    copied,
    copied_if_in,
    copied_together,
    parted,
    seen_in_part,
    storages,
)
from insitu_shard.engine.training import ParameterValue, seen
from insitu_wire.operations import is_in_place, writes_into_container

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet

    from insitu_shard.engine.gradients import Gradients
    from insitu_shard.engine.graph import Node, NodeId
    from insitu_shard.engine.memory import StorageKey
    from insitu_shard.engine.plan import Plan


class BlockValues:
    """What the nodes of one block gave, and what they see of each other.

    Attributes:
        given: what nodes gave, until nothing of the block uses it any more.
        assigned: what variables of this block and of earlier steps were given.
        saved: values of save nodes.
        done: nodes that ran, or whose condition did not hold.
    """

    def __init__(
        self,
        plan: Plan,
        earlier: Mapping[NodeId, object] = MappingProxyType({}),
        brought: AbstractSet[StorageKey] = frozenset(),
        gradients: Gradients | None = None,
    ) -> None:
        """Makes it, empty.

        Args:
            plan: the block.
            earlier: values of earlier steps.
            brought: memory of the user's own tensors, which other sessions may be using too: nodes
                read it, and get a copy where they could write to it.
            gradients: takes the block's gradients, if it has any.
        """
        self._plan = plan
        self._earlier = earlier
        self._brought = brought
        self._gradients = gradients
        self._num_uses = dict(plan.num_uses)
        self._copies: dict[NodeId, dict[NodeId, object]] = {}
        self._memory = MemoryMap() if plan.writes_in_place else None
        self.given: dict[NodeId, object] = {}
        self.assigned: dict[NodeId, object] = {}
        self.saved: dict[NodeId, object] = {}
        self.done: set[NodeId] = set()

    def add(self, node: Node, value: object) -> None:
        """Takes what a node gave, and frees what nothing uses after it."""
        self.done.add(node.id)
        if self._num_uses.get(node.id) or node.id in self._plan.outliving:
            self._keep(self.given, node.id, value)
        self._copies.pop(node.id, None)
        for used in self._plan.uses[node.id] & self._num_uses.keys():
            self._num_uses[used] -= 1
            if not self._num_uses[used] and used not in self._plan.outliving:
                self.given.pop(used, None)

    def save(self, node: Node, value: object) -> None:
        """Takes what a save node saves."""
        self._keep(self.saved, node.id, value)

    def assign(self, node: Node, target: NodeId, value: object) -> None:
        """Gives a variable a value, or a parameter its elements."""
        self.copy_for_earlier_readers(node)
        new = self.own(self.resolve(value, node.id))
        if isinstance(parameter := self._current(target), ParameterValue):
            parameter.update(new)
        else:
            self.assigned[target] = new

    @property
    def are_written_to(self) -> bool:
        """Whether nodes of the block write into values."""
        return self._memory is not None

    def resolve(self, value: Any, reader: NodeId) -> Any:
        """Puts values in the place of references, as a node is to see them."""
        return resolve(value, lambda used: self._seen(used, self.value_of(used, reader)))

    def value_of(self, used: NodeId, reader: NodeId) -> object:
        """Gives a value as a node that uses it is to have it; UNSET if there is none."""
        copies = self._copies.get(reader, {})
        return copies[used] if used in copies else self._current(used)

    def own(self, value: Any) -> Any:
        """Copies what lies in memory of the user's tensors."""
        is_brought = self._brought and not self._brought.isdisjoint(storages(value))
        return copied_if_in(self._brought, value) if is_brought else value

    def before_write(self, writer: Node) -> None:
        """Lets a write in place be seen by whom it concerns, and by nobody else."""
        assert isinstance(writer.operation, Call)
        self.copy_for_earlier_readers(writer)
        if not writes_into_container(writer.operation.name):
            self._part_from_strangers(writer, writer.operation.args[0])

    def copy_for_earlier_readers(self, writer: Node) -> None:
        """Before a write: keeps for waiting, earlier-defined readers what they are to see."""
        is_assignment = isinstance(writer.operation, Assign)
        for reader_id in self._plan.readers_before.get(writer.id, ()):
            if reader_id in self.done:
                continue
            copies = self._copies.setdefault(reader_id, {})
            for used in self._plan.uses[reader_id] - _written(self._plan.nodes[reader_id]):
                if used in copies or (value := self._current(used)) is UNSET:
                    continue
                if isinstance(value, ParameterValue):
                    copies[used] = copied(self._seen(used, value))
                else:
                    copies[used] = value if is_assignment else copied(value)

    def part_from(self, memory: AbstractSet[StorageKey]) -> None:
        """Copies values that share memory which others, such as the model, may write into."""
        for (place, node_id), value in parted(self._by_place(), memory).items():
            self._keep(self._places[place], node_id, value)

    def let_go(self, memory: AbstractSet[StorageKey]) -> None:
        """Copies the parts that values have of memory, so that the rest can be freed."""
        self.part_from(seen_in_part(self._by_place().values(), memory))

    @property
    def memory(self) -> frozenset[StorageKey]:
        """The memory of all values."""
        return storages(list(self._by_place().values()))

    def _keep(self, values: dict[NodeId, object], node_id: NodeId, value: object) -> None:
        values[node_id] = value
        if self._memory is not None:
            self._memory.add(node_id, value)

    def _seen(self, node_id: NodeId, value: object) -> object:
        """Gives what nodes see of a value: of a parameter its elements, which stay as they are."""
        if not isinstance(value, ParameterValue):
            return value
        self._brought = self._brought | storages(value.leaf)
        is_trained = self._gradients is not None and self._gradients.is_trained(node_id)
        return value.leaf if is_trained else seen(value)

    def _current(self, used: NodeId) -> object:
        if used in self.assigned:
            return self.assigned[used]
        values = self.given if used in self._plan.nodes else self._earlier
        return values.get(used, UNSET)

    @property
    def _places(self) -> tuple[dict[NodeId, object], ...]:
        return self.given, self.assigned, self.saved

    def _by_place(self) -> dict[tuple[int, NodeId], object]:
        return {
            (place, node_id): value
            for place, values in enumerate(self._places)
            for node_id, value in values.items()
        }

    def _part_from_strangers(self, writer: Node, target: object) -> None:
        """Copies values that happen to share the written memory, but are no views of it.

        What a layer gives is what the next one takes, and yet to the user these are two values.
        """
        assert self._memory is not None
        roots = self._plan.roots[writer.id]
        sharing = self._memory.sharing(self.resolve(target, writer.id))
        for values in (self.given, self.saved):
            strangers = {
                node_id: values[node_id]
                for node_id in sharing
                if node_id in values and not self._plan.roots[node_id] & roots
            }
            for node_id, copy in copied_together(strangers).items():
                self._keep(values, node_id, copy)


def _written(node: Node) -> frozenset[NodeId]:
    """Gives what a node writes into itself: a copy of that would take the write with it."""
    match node.operation:
        case Call(name=name, args=(Ref(node_id=target), *_)) if is_in_place(name):
            return frozenset({target})
    return frozenset()
