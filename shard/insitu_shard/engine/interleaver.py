"""Runs blocks inside one forward pass of the model."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from insitu_shard.engine.boundary_value import InputValue, OutputValue
from insitu_shard.engine.checkpointing import checkpoint_modules
from insitu_shard.engine.failures import model_raised
from insitu_shard.engine.graph import Boundary, Skip
from insitu_shard.engine.memory import copied_if_in, storages
from insitu_shard.engine.parts import core, with_core
from insitu_shard.engine.regions import region_of
from insitu_wire.errors import Error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from insitu_shard.engine.block_run import BlockRun
    from insitu_shard.engine.decode_rows import DecodeRows
    from insitu_shard.engine.inputs import ForwardInputs
    from insitu_shard.engine.layout import BoundaryLayout
    from insitu_shard.engine.memory import StorageKey
    from insitu_shard.engine.module import LoadedModule
    from insitu_shard.engine.regions import Region
    from insitu_shard.engine.row_map import RowMap


# In a shorter pass of several ranks asking at every layer would take longer than the rest of it.
_LONG_PASS_TOKENS = 1024


class _NothingIsLeft(Exception):  # noqa: N818 - no error: it ends the pass when nobody needs the rest
    pass


class Interleaver:
    """Runs one pass: hooks only where a block reads or writes, or where rows come and go.

    Attributes:
        raised: what the model raised, if it did.
        shown: memory of what several blocks have seen parts of.
    """

    def __init__(
        self,
        model: LoadedModule,
        runs: Sequence[BlockRun],
        rows: RowMap | DecodeRows | None = None,
        *,
        step: int = 0,
        checkpoints: bool = False,
    ) -> None:
        """Prepares a pass.

        Args:
            model: what it runs on.
            runs: the blocks, in the order of definition.
            rows: which rows of the pass are whose; None for one block that has all.
            step: which pass of a generation it is.
            checkpoints: whether a graph keeps what decoder layers are given alone.
        """
        self._model = model
        self._runs = runs
        self._rows = rows
        self._step = step
        self._checkpoints = checkpoints
        self._at: dict[Boundary, list[int]] = defaultdict(list)
        self._due: set[Boundary] = set()
        for place, run in enumerate(runs):
            for boundary in run.plan.boundaries.get(step, ()):
                self._at[boundary].append(place)
                if run.plan.holds(boundary):
                    self._due.add(boundary)
        self._num_calls: dict[tuple[str, bool], int] = defaultdict(int)
        self._unfinished = {place for place, run in enumerate(runs) if not run.needs_no_more}
        self._active: BlockRun | None = None
        self.raised: Exception | None = None
        self.shown: set[StorageKey] = set()

    def run(self, inputs: ForwardInputs) -> Any:
        """Runs the forward pass, as far as the blocks need it.

        Args:
            inputs: the model's.

        Returns:
            What the model returned; None if it did not come to its end.
        """
        if not self._unfinished:
            return None
        hooks = list(self._install_hooks(_num_tokens(inputs)))
        skipping = {
            node.operation.module_path
            for run in self._runs
            for boundary in run.plan.boundaries.get(self._step, ())
            for node_id in run.plan.at_boundary[boundary]
            if isinstance((node := run.plan.nodes[node_id]).operation, Skip)
        }
        replaced = [self._install_skip(path) for path in skipping]
        if self._checkpoints and any(run.takes_gradients for run in self._runs):
            watched = {boundary.module_path for boundary in self._at} | skipping
            watched |= {path for path, _ in (self._rows.places if self._rows else ())}
            replaced += checkpoint_modules(self._model, watched)
        try:
            attention = self._rows.attention() if self._rows else nullcontext()
            takes_gradients = any(run.takes_gradients for run in self._runs)
            with torch.set_grad_enabled(takes_gradients), attention:
                return self._model.module(*inputs.args, **inputs.kwargs)
        except _NothingIsLeft:
            pass
        except Exception as exception:  # noqa: BLE001 - a write can make the model raise anything
            # Values are the same on all ranks, so all of them come here together, but for memory.
            self._model.ranks.check_left_together(exception)
            self.raised = exception
            if len(self._runs) == 1:
                self._runs[0].error = self._runs[0].error or model_raised(exception)
        finally:
            for hook in hooks:
                hook.remove()
            for undo in reversed(replaced):
                undo()
        return None

    def _install_hooks(self, num_tokens: int) -> Iterator[torch.utils.hooks.RemovableHandle]:
        if self._model.ranks.size == 1 or num_tokens >= _LONG_PASS_TOKENS:
            for path in self._model.block_paths:
                yield self._model.modules[path].register_forward_pre_hook(self._leave_cancelled)
        places = {(at.module_path, at.is_input) for at in self._at}
        if self._rows is not None:
            places |= self._rows.places
        for path, is_input in places:
            module = self._model.modules[path]
            if is_input:
                yield module.register_forward_pre_hook(self._input_hook(path), with_kwargs=True)
            else:
                yield module.register_forward_hook(self._output_hook(path))

    def _leave_cancelled(self, *_: object) -> None:
        """Ends the pass at a decoder layer, if all whom it runs for have been cancelled."""
        if self._active is not None:
            return
        is_asked = all(self._runs[place].cancellation.is_asked for place in self._unfinished)
        # A rank that left a pass alone would leave the others in their next collective.
        if self._model.ranks.any(is_asked):
            for place in self._unfinished:
                self._runs[place].cancellation.is_agreed = True
            raise _NothingIsLeft

    def _install_skip(self, path: str) -> Callable[[], None]:
        """Puts a function before a module's own that gives what the call is to return.

        Returns:
            What undoes it: tensor parallelism and accelerate have functions there, too.
        """
        module = self._model.modules[path]
        run = module.forward
        layout = self._model.layouts.at(path, is_input=False)
        (block,) = self._runs  # one that skips is alone

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = (path, self._num_calls[path, True] - 1, self._step)
            if block.is_calling_module or call not in block.skips:
                return run(*args, **kwargs)
            return layout.scatter(block.skips[call])

        is_own = "forward" in module.__dict__
        module.forward = forward

        def undo() -> None:
            if is_own:
                module.forward = run
            else:
                del module.forward

        return undo

    def _input_hook(self, path: str) -> Any:
        layout = self._model.layouts.at(path, is_input=True)

        def hook(_: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
            if (boundary := self._arrive(path, is_input=True)) is None:
                return None
            changed = None
            if self._rows is not None:
                changed = self._rows.enter(boundary, (args, kwargs))
                args, kwargs = changed or (args, kwargs)
            if boundary in self._at:
                value = self._gathered(boundary, layout, InputValue(args, kwargs))
                whole = InputValue(*self._writable(boundary, value))
                if (written := self._run_blocks(boundary, whole)) is not None:
                    changed = self._model.sent_back(layout.scatter(written), (args, kwargs))
            if self._rows is not None:
                changed = self._rows.trim(boundary, changed or (args, kwargs)) or changed
            return changed

        return hook

    def _output_hook(self, path: str) -> Any:
        layout = self._model.layouts.at(path, is_input=False)
        is_block = path in self._model.block_paths

        def hook(_: torch.nn.Module, __: object, result: object) -> Any:
            if (boundary := self._arrive(path, is_input=False)) is None:
                return None
            changed = None
            if self._rows is not None:
                changed = self._rows.fork(boundary, result)
                result = result if changed is None else changed
            if boundary in self._at:
                value = self._gathered(boundary, layout, OutputValue(result, is_block))
                value = self._writable(boundary, value)
                written = self._run_blocks(boundary, OutputValue(value, is_block))
                if written is not None:
                    written = layout.scatter(written)
                    changed = result = self._model.sent_back(written, result)
            if self._rows is not None:
                dropped = self._rows.drop(boundary, result)
                changed = changed if dropped is None else dropped
            return changed

        return hook

    def _arrive(self, path: str, *, is_input: bool) -> Boundary | None:
        """Counts a call of a module; gives its boundary if something is to be done there."""
        if self._active is not None and self._active.is_calling_module:
            return None
        boundary = Boundary(path, is_input, self._num_calls[path, is_input], self._step)
        self._num_calls[path, is_input] += 1
        is_place = self._rows is not None and (path, is_input) in self._rows.places
        return boundary if is_place or boundary in self._at else None

    def _gathered(
        self, boundary: Boundary, layout: BoundaryLayout, local: InputValue | OutputValue
    ) -> Any:
        """Gives the whole of what the ranks hold; zeros where no block looks."""
        region = self._looked_at(boundary, layout, local) if layout.is_sharded else None
        return self._model.brought(layout.gather(local.raw, region))

    def _looked_at(
        self, boundary: Boundary, layout: BoundaryLayout, local: InputValue | OutputValue
    ) -> Region | None:
        """Gives what the blocks use at a boundary; None if that is all, or is not known."""
        shape = layout.full_shape(local.raw, core(local))
        is_whole = boundary in self._due or any(run.takes_gradients for run in self._runs)
        if is_whole or shape is None or (self._rows is not None and self._rows.is_packed):
            return None
        outline = torch.empty(shape, device="meta")
        whole = with_core(local, outline)
        places = self._places(boundary)
        parts: Iterable[tuple[int, InputValue | OutputValue]]
        if self._rows is None or self._rows.are_all_of_one(boundary):
            parts = [(place, whole) for place in places]
        else:
            parts = self._rows.parts(boundary, whole, places, self._due)
        try:
            seen = [each for at, part in parts for each in self._runs[at].looks_at(boundary, part)]
        except Error:
            return None  # the node that reads will say it
        return region_of(seen, outline)

    def _places(self, boundary: Boundary) -> list[int]:
        """Gives the blocks that are to come to a boundary: the same ones on all ranks."""
        return [
            place
            for place in self._at[boundary]
            if place in self._unfinished and self._runs[place].takes_part
        ]

    def _writable(self, boundary: Boundary, value: Any) -> Any:
        """Gives what the nodes of a boundary may write to: never the weights themselves."""
        return copied_if_in(self._model.storages, value) if boundary in self._due else value

    def _run_blocks(self, boundary: Boundary, whole: InputValue | OutputValue) -> Any:
        """Runs all blocks at a boundary; gives what the model goes on with if they change it."""
        places = self._places(boundary)
        if self._rows is None or self._rows.are_all_of_one(boundary):
            written = self._at_boundary(places[0], boundary, whole) if places else None
        else:
            written = self._run_parts(self._rows, boundary, whole, places)
        if not self._unfinished:
            raise _NothingIsLeft
        return written

    def _run_parts(
        self,
        rows: RowMap | DecodeRows,
        boundary: Boundary,
        whole: InputValue | OutputValue,
        places: Sequence[int],
    ) -> Any:
        whole = rows.spread(whole)
        memory = storages(whole.raw)
        self.shown |= memory
        parts = rows.parts(boundary, whole, places, self._due)
        for place, part in parts:
            if parts.is_owner(place):
                for other in rows.beside(boundary, place):
                    self._runs[other].part_from(memory)
            written = self._at_boundary(place, boundary, part)
            if parts.is_owner(place) and not self._runs[place].has_written(boundary):
                self._runs[place].part_from(memory)
                parts.disown(place)
            else:
                parts.written(place, written)
        if parts.are_parts:
            for place in places:
                self._runs[place].let_go(memory)
        return rows.packed(parts.joined(), whole)

    def _at_boundary(self, place: int, boundary: Boundary, value: InputValue | OutputValue) -> Any:
        run = self._active = self._runs[place]
        try:
            written = run.at(boundary, value)
        finally:
            self._active = None
        if run.needs_no_more:
            self._unfinished.discard(place)
        return written


def _num_tokens(inputs: ForwardInputs) -> int:
    """Gives how many positions a pass has, over all rows."""
    first = InputValue(inputs.args, dict(inputs.kwargs)).first
    return int(prod(first.shape[:2])) if isinstance(first, torch.Tensor) else 0
