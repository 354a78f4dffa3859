"""Shows each trace its own rows in the passes of traces that generate together."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from insitu_shard.engine.parts import Parts, RowView

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet
    from contextlib import AbstractContextManager

    from insitu_shard.engine.block_run import BlockRun
    from insitu_shard.engine.boundary_value import InputValue, OutputValue
    from insitu_shard.engine.graph import Boundary
    from insitu_shard.engine.inputs import InvokeRows
    from insitu_shard.engine.module import LoadedModule


class DecodeRows:
    """The rows of one step: each trace has its own from the first layer to the last.

    It is to the interleaver what `RowMap` is, where rows neither fork nor end within a pass.
    """

    places: AbstractSet[tuple[str, bool]] = frozenset()
    is_packed = False

    def __init__(
        self, model: LoadedModule, runs: Sequence[BlockRun], at: Sequence[InvokeRows], length: int
    ) -> None:
        """Begins a step.

        Args:
            model: what it runs on.
            runs: the traces.
            at: the rows of each.
            length: positions of each row.
        """
        self._model = model
        self._runs = runs
        self._at = at
        self._length = length
        self._num_rows = sum(rows.num_rows for rows in at)

    def are_all_of_one(self, boundary: Boundary) -> bool:
        """Whether one trace has all rows."""
        del boundary
        return len(self._runs) == 1

    def beside(self, boundary: Boundary, place: int) -> list[int]:
        """Gives the other traces that have the rows of a trace: none."""
        del boundary, place
        return []

    def enter(self, boundary: Boundary, arguments: Any) -> None:
        """Leaves the arguments of a block as they are."""

    def fork(self, boundary: Boundary, result: Any) -> None:
        """Leaves the result of a block as it is."""

    def drop(self, boundary: Boundary, result: Any) -> None:
        """Leaves the result of a block as it is."""

    def trim(self, boundary: Boundary, arguments: Any) -> None:
        """Leaves the arguments of the head as they are."""

    def attention(self) -> AbstractContextManager[None]:
        """Gives the context in which the pass is to run."""
        return nullcontext()

    def spread(self, whole: InputValue | OutputValue) -> InputValue | OutputValue:
        """Gives what the model holds in rows of all positions: as it is."""
        return whole

    def packed(self, written: Any, whole: InputValue | OutputValue) -> Any:
        """Gives what traces have written, as the model goes on with it."""
        del whole
        return written

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
        structure = self._model.structure(boundary.module_path, is_input=boundary.is_input)
        writers = {
            place
            for place in places
            if boundary in due and boundary in self._runs[place].plan.due_at_boundary
        }
        return Parts(
            whole,
            RowView(structure, num_rows=self._num_rows, length=self._length),
            at={place: self._at[place] for place in places},
            lanes={place: place for place in places},
            writers=writers,
            head=None,
            all_inputs=frozenset(),
        )
