"""Runs the nodes of one block inside the model's forward pass, each as soon as its values exist."""

from __future__ import annotations

import heapq
from collections import defaultdict
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from insitu_shard.engine.boundary_value import InputValue, OutputValue
from insitu_shard.engine.execute import Executor
from insitu_shard.engine.failures import cyclic_write, model_raised, not_reached
from insitu_shard.engine.graph import UNSET, Boundary, Skip
from insitu_shard.engine.invokes import InvokesValue
from insitu_shard.engine.memory import copied_if_in
from insitu_wire.errors import Error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from collections.abc import Set as AbstractSet

    from insitu_shard.engine.boundary_value import BoundaryValue
    from insitu_shard.engine.graph import Node, NodeId
    from insitu_shard.engine.inputs import Batch, ForwardInputs
    from insitu_shard.engine.memory import StorageKey
    from insitu_shard.engine.module import LoadedModule
    from insitu_shard.engine.plan import Plan


class _NothingIsLeft(Exception):  # noqa: N818 - no error: it ends the pass when nobody needs the rest
    pass


class Interleaver:
    """Runs one block once.

    An operation that raises does not end the pass: a rank that stopped alone would leave the others
    waiting in their next collective. Its error is kept, and no node runs after it.

    Attributes:
        error: what the first failing operation raised, if one did.
    """

    def __init__(
        self,
        plan: Plan,
        model: LoadedModule,
        earlier: Mapping[NodeId, object],
        seed: str,
        brought: AbstractSet[StorageKey] = frozenset(),
        handles: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        self._plan = plan
        self._model = model
        self._executor = Executor(plan, model, earlier, seed, brought, handles)
        self._num_missing = {node_id: len(waits) for node_id, waits in plan.predecessors.items()}
        self._ready: list[NodeId] = []
        self._num_calls: dict[tuple[str, bool], int] = defaultdict(int)
        self._batch: Batch | None = None
        self.error: Error | None = None

    def run(self, inputs: ForwardInputs | None) -> None:
        """Runs the nodes, and the forward pass as far as they need it.

        Args:
            inputs: the model's; None for nodes that need no pass.
        """
        self._batch = inputs.batch if inputs is not None else None
        self._ready = [
            node.id
            for node in self._plan.nodes.values()
            if node.boundary is None and not self._num_missing[node.id]
        ]
        with torch.no_grad():
            self._run_ready(None, None)
            if inputs is not None and not self._is_over:
                self._run_pass(inputs)
        unfinished = self._plan.nodes.keys() - self._executor.done
        if unfinished and self.error is None and self._executor.stopped_at is None:
            self.error = not_reached(min(unfinished), self._plan)

    @property
    def saved(self) -> dict[NodeId, object]:
        """Values of the save nodes that ran."""
        return {key: self._executor.saved[key] for key in self._counting(self._executor.saved)}

    @property
    def kept(self) -> dict[str, object]:
        """Values to be kept beyond the session, by handle."""
        return dict(self._executor.kept[key] for key in self._counting(self._executor.kept))

    @property
    def logs(self) -> list[str]:
        """Messages of the log nodes that ran, in the order of definition."""
        return [self._executor.logs[key] for key in self._counting(self._executor.logs)]

    @property
    def outliving(self) -> dict[NodeId, object]:
        """Values that are needed after the block."""
        values = {**self._executor.values, **self._executor.assigned}
        wanted = self._plan.outliving | (values.keys() - self._plan.nodes.keys())
        return {
            key: values[key]
            for key in self._counting(wanted & values.keys())
            if values[key] is not UNSET
        }

    def _counting(self, node_ids: Any) -> list[NodeId]:
        """Gives what counts, in order: a stop is as if nothing had been defined after it."""
        stopped_at = self._executor.stopped_at
        return [key for key in sorted(node_ids) if stopped_at is None or key < stopped_at]

    @property
    def _is_over(self) -> bool:
        executor = self._executor
        return executor.stopped_at is not None or executor.done == self._plan.nodes.keys()

    def _run_pass(self, inputs: ForwardInputs) -> None:
        hooks = list(self._install_hooks())
        skipping = {
            node.operation.module_path
            for node in self._plan.nodes.values()
            if isinstance(node.operation, Skip)
        }
        for path in skipping:
            self._install_skip(path)
        try:
            self._model.module(*inputs.args, **inputs.kwargs)
        except _NothingIsLeft:
            pass
        except Exception as exception:  # noqa: BLE001 - a write can make the model raise anything
            # Values are the same on all ranks, so all of them come here together.
            self.error = self.error or model_raised(exception)
        finally:
            for hook in hooks:
                hook.remove()
            for path in skipping:
                del self._model.modules[path].forward

    def _install_hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        for path, is_input in {(at.module_path, at.is_input) for at in self._plan.at_boundary}:
            module = self._model.modules[path]
            if is_input:
                yield module.register_forward_pre_hook(self._input_hook(path), with_kwargs=True)
            else:
                yield module.register_forward_hook(self._output_hook(path))

    def _install_skip(self, path: str) -> None:
        """Puts a function before a module's own that gives what the call is to return."""
        module = self._model.modules[path]
        run = module.forward
        layout = self._model.layouts.at(path, is_input=False)

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = (path, self._num_calls[path, True] - 1)
            if self._executor.is_calling_module or call not in self._executor.skips:
                return run(*args, **kwargs)
            return layout.scatter(self._executor.skips[call])

        module.forward = forward

    def _input_hook(self, path: str) -> Any:
        layout = self._model.layouts.at(path, is_input=True)

        def hook(_: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
            if (boundary := self._arrive(path, is_input=True)) is None:
                return None
            whole = InputValue(*self._writable(boundary, layout.gather((args, kwargs))))
            value = self._by_invoke(boundary, whole)
            self._run_boundary(boundary, value)
            if boundary not in self._plan.due_at_boundary:
                return None
            self._check_arguments(boundary, value)
            return None if self.error else layout.scatter(value.raw)

        return hook

    def _output_hook(self, path: str) -> Any:
        layout = self._model.layouts.at(path, is_input=False)
        is_block = path in self._model.block_paths

        def hook(_: torch.nn.Module, __: object, result: object) -> Any:
            if (boundary := self._arrive(path, is_input=False)) is None:
                return None
            whole = OutputValue(self._writable(boundary, layout.gather(result)), is_block)
            value = self._by_invoke(boundary, whole)
            self._run_boundary(boundary, value)
            if boundary not in self._plan.due_at_boundary or self.error:
                return None
            return layout.scatter(value.raw)

        return hook

    def _arrive(self, path: str, *, is_input: bool) -> Boundary | None:
        """Counts a call of a module; gives its boundary if nodes wait for it."""
        if self._executor.is_calling_module:
            return None
        boundary = Boundary(path, is_input, self._num_calls[path, is_input])
        self._num_calls[path, is_input] += 1
        return boundary if boundary in self._plan.at_boundary and not self.error else None

    def _writable(self, boundary: Boundary, value: Any) -> Any:
        """Gives what the nodes of a boundary may write to: never the weights themselves."""
        if boundary not in self._plan.due_at_boundary:
            return value
        return copied_if_in(self._model.storages, value)

    def _by_invoke(self, boundary: Boundary, whole: InputValue | OutputValue) -> BoundaryValue:
        """Gives a value that shows each invoke its rows, if any node asks for those."""
        operations = (self._plan.nodes[key].operation for key in self._plan.at_boundary[boundary])
        points = [getattr(operation, "hook_point", None) for operation in operations]
        if self._batch is None or not any(point and point.invoke for point in points):
            return whole
        structure = self._model.structure(boundary.module_path, is_input=boundary.is_input)
        is_written = boundary in self._plan.due_at_boundary
        return InvokesValue(whole, structure, self._batch, is_written)

    def _check_arguments(self, boundary: Boundary, value: BoundaryValue) -> None:
        last_write = self._plan.nodes[self._plan.due_at_boundary[boundary][-1]]
        try:
            self._model.check_arguments(boundary.module_path, value.raw)
        except Error as err:
            err.location = last_write.location
            self.error = self.error or err

    def _run_boundary(self, boundary: Boundary, value: BoundaryValue) -> None:
        for node_id in self._plan.at_boundary[boundary]:
            if not self._num_missing[node_id]:
                heapq.heappush(self._ready, node_id)
        self._run_ready(boundary, value)
        if self._is_over:
            raise _NothingIsLeft
        writes = self._plan.due_at_boundary.get(boundary, ())
        late = [node_id for node_id in writes if node_id not in self._executor.done]
        if late and self.error is None:
            self.error = cyclic_write(late[0], self._plan, self._executor.done)
        if self._model.writes_in_place:
            self._executor.part_from(value.raw)

    def _run_ready(self, boundary: Boundary | None, value: BoundaryValue | None) -> None:
        """Runs every node that can run now, in the order of definition."""
        while self._ready and self.error is None and self._executor.stopped_at is None:
            node = self._plan.nodes[heapq.heappop(self._ready)]
            try:
                self._executor.run(node, value)
            except Error as err:
                self.error = err
                return
            for successor_id in self._plan.successors.get(node.id, ()):
                self._num_missing[successor_id] -= 1
                if self._can_run(self._plan.nodes[successor_id], boundary):
                    heapq.heappush(self._ready, successor_id)

    def _can_run(self, node: Node, boundary: Boundary | None) -> bool:
        return not self._num_missing[node.id] and node.boundary in (None, boundary)
