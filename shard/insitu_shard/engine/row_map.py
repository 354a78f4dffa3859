"""Keeps track, while a pass runs, of which of its rows are whose, and moves them as lanes fork."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from insitu_shard.engine.head_rows import HeadRows
from insitu_shard.engine.inputs import InvokeRows
from insitu_shard.engine.packing import Packing, pack, packed_attention
from insitu_shard.engine.parts import NotPlacedError, Parts, RowView, core, with_core
from insitu_shard.engine.unchanged import UnchangedLanes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet
    from contextlib import AbstractContextManager

    from insitu_shard.compiler import Pass
    from insitu_shard.engine.block_run import BlockRun
    from insitu_shard.engine.boundary_value import InputValue, OutputValue
    from insitu_shard.engine.graph import Boundary
    from insitu_shard.engine.module import LoadedModule

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class RowMap:
    """The rows of one pass.

    Attributes:
        places: where rows move or are chosen: (module path, whether it is its input).
    """

    def __init__(self, model: LoadedModule, plan: Pass, runs: Sequence[BlockRun]) -> None:
        """Begins a pass.

        Args:
            model: what it runs on.
            plan: the pass.
            runs: its traces.
        """
        self._plan = plan
        self._tree = plan.tree
        self._unchanged = UnchangedLanes(plan.tree)
        self._runs = runs
        self._outline = outline = plan.outline
        self._structure = model.structure
        self._model = model
        self._lanes = self._tree.alive(0)
        self._first_rows: dict[int, int] = {}
        self._num_rows = 0
        self._packing: Packing | None = None
        self._root_index: torch.Tensor | None = None
        self._place_rows()
        self._num_root_rows = self._num_rows
        self._root_rows = dict(self._first_rows)
        self._changes = self._tree.changes()
        self._head = HeadRows(plan, self._reads_after_head())
        self.places = {
            (block, False)
            for number, block in enumerate(outline.blocks)
            if 2 * number + 3 in self._changes
        }
        self.places |= {
            (block, False)
            for number, block in enumerate(outline.blocks)
            if 2 * number + 3 in self._unchanged.moments
        }
        if 1 in self._changes:
            self.places.add((outline.blocks[0], True))
        if plan.is_packed:
            self.places.add((outline.blocks[-1], False))
        if self._num_root_rows > 1 or plan.is_packed:
            self.places |= {(block, True) for block in outline.blocks}
        if self._head.is_trimmed:
            self.places.add((outline.head_path, True))

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """Token ids of the rows that the pass begins with."""
        rows = (row for lane in self._lanes for row in self._tree.lanes[lane].rows)
        if not self._plan.has_own_lengths:
            return tuple(rows)
        # What fills them up behind goes before the first block.
        return tuple(row + row[:1] * (self._plan.length - len(row)) for row in rows)

    @property
    def is_packed(self) -> bool:
        """Whether the model holds tokens in place of rows now."""
        return self._packing is not None

    def are_all_of_one(self, boundary: Boundary) -> bool:
        """Whether one trace has all that the model holds at a boundary."""
        is_head = (boundary.module_path, boundary.is_input) == (self._outline.head_path, False)
        sees_part = self._plan.traces[0].head != (0, self._plan.length)
        return len(self._runs) == 1 and not (is_head and sees_part)

    def beside(self, boundary: Boundary, place: int) -> list[int]:
        """Gives the other traces that have the rows of a trace at a boundary."""
        moment = self._outline.moment(boundary.module_path, is_input=boundary.is_input)
        assert moment is not None
        lane = self._unchanged.lane_at(place, moment)
        return [
            other
            for other in self._tree.traces[lane]
            if other != place and self._unchanged.lane_at(other, moment) == lane
        ]

    def enter(self, boundary: Boundary, arguments: Arguments) -> Arguments | None:
        """Fits the arguments of a block to the rows that run through it; None if they fit."""
        if boundary.module_path not in self._outline.blocks:
            return None
        if boundary.call_index:
            raise NotPlacedError(boundary.module_path)
        hidden, rest = _split(arguments)
        moved = None
        if boundary.module_path == self._outline.blocks[0]:
            moved = self._move(2, hidden)
        if moved is None and not self._has_moved and self._packing is None:
            return None
        return _join(arguments, hidden if moved is None else moved, self._fitted(rest))

    def fork(self, boundary: Boundary, result: Any) -> Any:
        """Gives lanes that begin at the end of a block their rows; None if none does."""
        return self._moved(boundary, result, 0)

    def drop(self, boundary: Boundary, result: Any) -> Any:
        """Drops the rows that are not needed after a block; None if all are."""
        self._find_unchanged(boundary, result)
        return self._moved(boundary, result, 1)

    def trim(self, boundary: Boundary, arguments: Arguments) -> Arguments | None:
        """Gives the head the positions that are read only; None if it is to run on all."""
        is_head = boundary.module_path == self._outline.head_path and boundary.is_input
        if not is_head or not self._head.is_trimmed or boundary.call_index:
            return None
        hidden, rest = _split(arguments)
        chosen = self._head.chosen(hidden, self._first_rows, self._unchanged)
        return _join(arguments, chosen, rest)

    def parts(
        self,
        boundary: Boundary,
        whole: InputValue | OutputValue,
        places: Sequence[int],
        due: AbstractSet[Boundary],
    ) -> Parts:
        """Gives each trace its own part of what the model holds at a boundary.

        Args:
            boundary: the boundary.
            whole: what the model holds there.
            places: the traces that wait for it.
            due: boundaries at which traces write.
        """
        moment = self._outline.moment(boundary.module_path, is_input=boundary.is_input)
        assert moment is not None  # or else the trace runs alone
        lanes = {place: self._unchanged.lane_at(place, moment) for place in places}
        is_head = (boundary.module_path, boundary.is_input) == (self._outline.head_path, False)
        view = RowView(
            self._structure(boundary.module_path, is_input=boundary.is_input),
            num_rows=self._num_rows,
            length=self._plan.length,
        )
        return Parts(
            whole,
            view,
            at={place: self._rows_of(place, lane) for place, lane in lanes.items()},
            lanes=lanes,
            writers={
                place
                for place in places
                if boundary in due and self._runs[place].plan.holds(boundary)
            },
            head=self._head.parts(places, lanes, self._first_rows) if is_head else None,
            all_inputs={
                place for place in places if boundary in self._runs[place].plan.inputs_seen
            },
        )

    def attention(self) -> AbstractContextManager[None]:
        """Gives the context in which the pass is to run."""
        if not self._plan.is_packed:
            return nullcontext()
        return packed_attention(self._model.module.config)  # type: ignore[arg-type]

    def spread(self, whole: InputValue | OutputValue) -> InputValue | OutputValue:
        """Gives what the model holds in rows of all positions."""
        return with_core(whole, self._packing.spread(core(whole))) if self._packing else whole

    def packed(self, written: Any, whole: InputValue | OutputValue) -> Any:
        """Gives what traces have written, as the model goes on with it; None if nobody wrote."""
        if written is None or self._packing is None:
            return written
        value = whole.holding(written)
        return with_core(value, self._packing.gathered(core(value))).raw

    def _rows_of(self, place: int, lane: int) -> InvokeRows:
        trace = self._plan.traces[place]
        padding = self._plan.padding(trace)
        return InvokeRows(self._first_rows[lane], trace.num_rows, padding, trace.length)

    @property
    def _has_moved(self) -> bool:
        return self._first_rows != self._root_rows

    def _find_unchanged(self, boundary: Boundary, result: Any) -> None:
        moment = self._end_of_block(boundary)
        if moment in self._unchanged.moments and not boundary.call_index:
            self._unchanged.find(
                moment,
                result[0] if isinstance(result, tuple) else result,
                self._packing or Packing.whole(self._num_rows, self._plan.length),
                self._first_rows,
                self._model.ranks,
            )

    def _end_of_block(self, boundary: Boundary) -> int | None:
        """Gives the moment of a place where rows move at the end of a block; None at others."""
        is_place = (boundary.module_path, False) in self.places and not boundary.is_input
        if not is_place or boundary.module_path not in self._outline.blocks:
            return None
        return 2 * self._outline.blocks.index(boundary.module_path) + 3

    def _moved(self, boundary: Boundary, result: Any, later: int) -> Any:
        moment = self._end_of_block(boundary)
        if moment is None:
            return None
        if boundary.call_index:
            raise NotPlacedError(boundary.module_path)
        hidden = self._move(moment + later, result[0] if isinstance(result, tuple) else result)
        if hidden is None:
            return None
        if not isinstance(result, tuple):
            return hidden
        if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(result[1:])):
            raise NotPlacedError(boundary.module_path)
        return (hidden, *result[1:])

    def _move(self, moment: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """Goes over to the lanes of a moment; gives their hidden state, if they are others."""
        lanes = self._unchanged.alive(moment)
        is_last = moment > 2 * len(self._outline.blocks)
        # Traces that failed need no rows, and yet the ranks have to go on together.
        is_due = self._packing is not None if is_last else self._has_to_be_packed
        if not lanes or (lanes == self._lanes and not is_due):
            return None
        index: list[int] = []
        for lane in lanes:
            first = self._first_rows[self._unchanged.there(lane, self._first_rows)]
            index.extend(range(first, first + len(self._tree.lanes[lane].rows)))
        before, num_rows = self._packing, self._num_rows
        self._lanes = lanes
        self._place_rows()
        self._packing = None if is_last else self._packed()
        if before is None and self._packing is None:
            return hidden.index_select(0, torch.tensor(index, device=hidden.device))
        before = before or Packing.whole(num_rows, self._plan.length)
        after = self._packing or Packing.whole(self._num_rows, self._plan.length)
        pack(self._packing)
        return before.moved(hidden, index, after)

    @property
    def _has_to_be_packed(self) -> bool:
        return self._plan.has_own_lengths and self._packing is None

    def _packed(self) -> Packing | None:
        """Gives where tokens are, if rows do not have all positions."""
        starts: list[int] = []
        ends: list[int] = []
        sources: list[int] = []
        for number in self._lanes:
            lane = self._tree.lanes[number]
            source = number if lane.source is None else lane.source
            first = self._first_rows[self._unchanged.resolved(source)]
            starts += [lane.start] * len(lane.rows)
            ends += map(len, lane.rows) if self._plan.has_own_lengths else []
            sources += range(first, first + len(lane.rows))
        if not any(starts) and all(end == self._plan.length for end in ends):
            return None
        return Packing.of(starts, sources, self._plan.length, ends)

    def _place_rows(self) -> None:
        self._first_rows, self._num_rows = {}, 0
        self._root_index = None
        for lane in self._lanes:
            self._first_rows[lane] = self._num_rows
            self._num_rows += len(self._tree.lanes[lane].rows)

    def _fitted(self, rest: Any) -> Any:
        """Gives what the pass made for the rows that it began with, for the rows that run now."""
        if self._num_root_rows == 1 and self._packing is None:
            return rest  # made for one row, it fits any number
        if self._root_index is None:
            rows = [row for lane in self._lanes for row in self._rows_of_root(lane)]
            self._root_index = torch.tensor(rows)
        index = self._root_index
        if self._packing is not None:
            return self._packing.fitted(rest, self._num_root_rows, index)

        def fitted(leaf: torch.Tensor) -> torch.Tensor:
            has_rows = leaf.ndim > 1 and leaf.shape[0] == self._num_root_rows
            return leaf.index_select(0, index.to(leaf.device)) if has_rows else leaf

        return pytree.tree_map_only(torch.Tensor, fitted, rest)

    def _rows_of_root(self, lane: int) -> range:
        while (parent := self._tree.lanes[lane].parent) is not None:
            lane = parent
        first = self._root_rows[lane]
        return range(first, first + len(self._tree.lanes[lane].rows))

    def _reads_after_head(self) -> bool:
        """Whether a trace sees the logits elsewhere than where the head gives them."""
        return any(
            self._outline.is_after_head(at.module_path, is_input=at.is_input)
            for run in self._runs
            for at in run.plan.at_boundary
        )


def _split(arguments: Arguments) -> tuple[torch.Tensor, Any]:
    """Gives the hidden state, the first argument, and all others."""
    args, kwargs = arguments
    if args:
        return args[0], (args[1:], kwargs)
    name = next(iter(kwargs))
    return kwargs[name], ((), {key: value for key, value in kwargs.items() if key != name})


def _join(arguments: Arguments, hidden: torch.Tensor, rest: Any) -> Arguments:
    args, kwargs = rest
    if arguments[0]:
        return (hidden, *args), kwargs
    return (), {next(iter(arguments[1])): hidden, **kwargs}
