"""Shows each trace of a pass its own rows of what the model holds, and joins what they write."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from insitu_shard.engine.boundary_value import InputValue, OutputValue
from insitu_shard.engine.inputs import Batch
from insitu_shard.engine.invokes import narrowed
from insitu_shard.engine.memory import copied
from insitu_shard.engine.row_pieces import RowPieces

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from collections.abc import Set as AbstractSet

    from insitu_proto.v1 import model_pb2
    from insitu_shard.engine.head_rows import HeadPart
    from insitu_shard.engine.inputs import InvokeRows


class NotPlacedError(Exception):
    """It can not be told whose rows are whose: the traces have to run one by one."""


@dataclass(frozen=True, slots=True)
class RowView:
    """How rows lie in a value."""

    structure: model_pb2.StructureSpec
    num_rows: int
    length: int

    def first(self) -> RowView:
        """Gives the same for the first argument of a call."""
        args, kwargs = self.structure.tuple.items
        items = args.tuple.items or kwargs.dict.items
        return replace(self, structure=items[0])

    def of(self, value: Any, at: InvokeRows) -> Any:
        """Gives views of rows in all tensors of a value.

        Raises:
            NotPlacedError: the value is not what the model's description says.
        """
        rows = ((0,) * self.length,) * self.num_rows
        return narrowed(self._fitted(value, self.structure), self.structure, at, Batch(rows, ()))

    def _fitted(self, value: Any, structure: model_pb2.StructureSpec) -> Any:
        """Checks that a value has the rows that it is said to have; one made for all gets them."""
        match structure.WhichOneof("kind"):
            case "tensor" if isinstance(value, torch.Tensor):
                sizes = self._sizes(structure.tensor, self.num_rows)
                if list(value.shape) == sizes:
                    return value
                if list(value.shape) == self._sizes(structure.tensor, 1):
                    return value.expand(sizes)
            case "tuple" | "list" as kind if isinstance(value, tuple | list):
                items = getattr(structure, kind).items
                if len(items) == len(value):
                    return type(value)(map(self._fitted, value, items))
            case "dict" if isinstance(value, dict):
                known = dict(zip(structure.dict.keys, structure.dict.items, strict=True))
                if value.keys() <= known.keys():
                    fitted = {key: self._fitted(item, known[key]) for key, item in value.items()}
                    return type(value)(fitted)
        leaves = pytree.tree_leaves(value)
        if any(not isinstance(leaf, str | int | float | None) for leaf in leaves):
            raise NotPlacedError(type(value).__name__)
        return value

    def _sizes(self, tensor: model_pb2.TensorSpec, num_rows: int) -> list[int]:
        return [
            size.factor * num_rows**size.batch_power * self.length**size.length_power
            for size in tensor.dimensions
        ]


class Parts:
    """What the model holds at one boundary, by trace.

    Traces of one lane that write there write the same: the first of them writes into the model's
    value, the others into copies of what was there.
    """

    def __init__(
        self,
        whole: InputValue | OutputValue,
        view: RowView,
        *,
        at: Mapping[int, InvokeRows],
        lanes: Mapping[int, int],
        writers: AbstractSet[int],
        head: Mapping[int, HeadPart] | None,
        all_inputs: AbstractSet[int],
    ) -> None:
        """Makes the parts.

        Args:
            whole: what the model holds.
            view: how rows lie in it.
            at: the rows of each trace.
            lanes: the lane of each trace.
            writers: traces that write.
            head: where each trace's logits are, if these are the logits.
            all_inputs: traces that see all arguments of the call.
        """
        self._whole = whole
        self._view = view.first() if isinstance(whole, InputValue) else view
        self._all_view = view
        self._at = at
        self._lanes = lanes
        self._writers = writers
        self._head = head
        self._all_inputs = all_inputs
        self._core = core(whole)
        self._pieces = None
        if head is None:
            rows = {"num_rows": view.num_rows, "length": view.length}
            self._pieces = RowPieces.of(self._core, at, **rows)
        self._given: dict[int, Any] = {}
        self._owners: dict[int, int] = {}
        self._pristine: dict[int, Any] = {}
        self._replaced: list[tuple[int, Any]] = []

    @property
    def are_parts(self) -> bool:
        """Whether a trace sees less than the whole."""
        return any(not self._is_all(place) for place in self._at)

    def __iter__(self) -> Iterator[tuple[int, InputValue | OutputValue]]:
        """Yields each trace and what it sees, in the order of definition."""
        num_writers: dict[int, int] = {}
        for place in self._writers:
            num_writers[self._lanes[place]] = num_writers.get(self._lanes[place], 0) + 1
        for place in self._at:
            lane = self._lanes[place]
            part = self._part(place)
            if place in self._writers:
                if lane in self._owners:
                    part = copied(self._pristine[lane])
                else:
                    self._owners[lane] = place
                    if lane in self._pristine:
                        _copy_into(part, self._pristine[lane])
                    elif num_writers[lane] > 1:
                        self._pristine[lane] = copied(part)
            self._given[place] = part
            yield place, self._showing(place, part)

    def is_owner(self, place: int) -> bool:
        """Whether it is a trace's own write that the model goes on with."""
        return self._owners.get(self._lanes[place]) == place

    def disown(self, place: int) -> None:
        """Lets another trace of the lane write in the place of one that failed or has stopped."""
        del self._owners[self._lanes[place]]

    def written(self, place: int, raw: Any) -> None:
        """Takes what a trace would have the model go on with; None if that is what it saw."""
        if raw is None or not self.is_owner(place):
            return
        new = core(self._whole.holding(raw))
        if new is not self._given[place]:
            self._replaced.append((place, new))

    def joined(self) -> Any:
        """Gives what the model is to go on with; None if nobody wrote."""
        if not self._writers:
            return None
        if not self._replaced:
            return self._whole.raw
        if len(self._replaced) == 1 and self._is_all(self._replaced[0][0]):
            joined = self._replaced[0][1]
        else:
            joined = self._with_replaced()
        return with_core(self._whole, joined).raw

    def _with_replaced(self) -> Any:
        joined = self._pieces.joined(dict(self._replaced)) if self._pieces else None
        if joined is None:
            joined = copied(self._core)
            for place, new in self._replaced:
                _copy_into(self._narrowed(place, joined), new)
        return joined

    def _part(self, place: int) -> Any:
        if self._is_all(place):
            return self._core
        narrow = self._narrowed(place, self._core)
        cut = self._pieces.cut.get(place) if self._pieces else None
        return cut if cut is not None and cut.shape == narrow.shape else narrow

    def _narrowed(self, place: int, value: Any) -> Any:
        if self._head is not None:
            return self._head[place].of(value)
        return self._view.of(value, self._at[place])

    def _is_all(self, place: int) -> bool:
        at = self._at[place]
        if self._head is not None:
            part = self._head[place]
            return not part.stride and part.length == self._view.length == at.length and (
                at.num_rows == self._view.num_rows
            )  # fmt: skip
        return at.num_rows == self._view.num_rows and at.length == self._view.length

    def _showing(self, place: int, part: Any) -> InputValue | OutputValue:
        if part is self._core:
            return self._whole.holding(self._whole.raw)
        if place in self._all_inputs:
            return self._whole.holding(self._all_view.of(self._whole.raw, self._at[place]))
        return with_core(self._whole, part)


def _copy_into(target: Any, value: Any) -> None:
    pairs = zip(pytree.tree_leaves(target), pytree.tree_leaves(value), strict=True)
    for old, new in pairs:
        if isinstance(old, torch.Tensor):
            old.copy_(new)


def core(value: InputValue | OutputValue) -> Any:
    """Gives what has rows: the first argument, or the result; of a block's, the hidden state."""
    if isinstance(value, InputValue):
        return value.first
    is_tuple = value.is_block and isinstance(value.result, tuple)
    return value.result[0] if is_tuple else value.result  # type: ignore[index]


def with_core(value: InputValue | OutputValue, new: Any) -> InputValue | OutputValue:
    """Gives a value whose part that has rows is another."""
    if isinstance(value, OutputValue):
        is_tuple = value.is_block and isinstance(value.result, tuple)
        return value.holding((new, *value.result[1:]) if is_tuple else new)  # type: ignore[index]
    if value.args:
        return InputValue((new, *value.args[1:]), value.kwargs)
    return InputValue((), {**value.kwargs, next(iter(value.kwargs)): new})
