"""Builds a session's graph while the user's code runs."""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

from insitu._brought import BroughtTensors
from insitu._source import assigned_name, user_location
from insitu_proto.v1 import intervention_pb2, session_pb2, trace_pb2, training_pb2
from insitu_wire import torch_codec
from insitu_wire.errors import Error, Reason, error
from insitu_wire.operations import RANDOM
from insitu_wire.steps import all_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence

    from insitu._generate import Streamer
    from insitu._gradients import Backward
    from insitu._origin import Container, Origin
    from insitu._structure import ModuleTree
    from insitu_proto.v1 import value_pb2
    from insitu_wire.errors import Location

    Reference = Callable[[object], int | None]

_CallT = TypeVar("_CallT", intervention_pb2.Call, intervention_pb2.ModuleCall)

Training = (
    training_pb2.Parameter
    | training_pb2.ReadGradient
    | training_pb2.WriteGradient
    | training_pb2.ZeroGradient
    | training_pb2.Optimizer
    | training_pb2.OptimizerStep
)
_TRAINING: dict[type, str] = {
    training_pb2.Parameter: "parameter",
    training_pb2.ReadGradient: "read_gradient",
    training_pb2.WriteGradient: "write_gradient",
    training_pb2.ZeroGradient: "zero_gradient",
    training_pb2.Optimizer: "optimizer",
    training_pb2.OptimizerStep: "optimizer_step",
}

Scope = tuple[int, ...]
"""The loops, branches and conditions that are open, outermost first."""


class SessionRecorder:
    """Records one session.

    Attributes:
        session: what was recorded so far.
        brought: the user's own tensors among its values.
        saved: what the user marked to come back, by the id of its save node.
        state: "recording", then "running", then "done".
        num_traces: how many traces there are.
        containers: lists and dicts that it builds.
        loaded: where values that earlier sessions kept come from, by handle.
        trace: the trace whose block is open, if one is.
        scope: where what is recorded now is defined, and so surely set.
        streamers: who takes the tokens of traces as they are chosen, by their numbers.
    """

    def __init__(self, reference: Reference) -> None:
        """Starts an empty session.

        Args:
            reference: gives the node id of a recorded value, or None for anything else.
        """
        self.session = session_pb2.Session()
        self.brought = BroughtTensors(self.session.tensors)
        self.saved: dict[int, object] = {}
        self._saved_objects: set[int] = set()
        self.state = "recording"
        self.num_traces = 0
        self.trace: BlockRecorder | None = None
        self.containers: list[Container] = []
        self.loaded: dict[str, Origin] = {}
        self.scope: Scope = ()
        self.streamers: dict[int, Streamer] = {}
        self._reference = reference
        self._steps: MutableSequence[session_pb2.Step] = self.session.steps
        self._compute: BlockRecorder | None = None
        self._compute_step = session_pb2.Compute()
        self._location_indices: dict[tuple[str, int], int] = {}
        self._last_id = 0
        self._scope_numbers = itertools.count(1)
        self._block_numbers = itertools.count(1)

    @property
    def block(self) -> BlockRecorder:
        """Where operations go: the open trace, or else a computation between traces."""
        if self.trace is not None:
            return self.trace
        if self._compute is None:
            self._compute_step = self.add_step().compute
            number = next(self._block_numbers)
            self._compute = BlockRecorder(self, self._compute_step.nodes, number)
        return self._compute

    @property
    def open_block(self) -> BlockRecorder | None:
        """Where operations go, if a trace or a computation is open."""
        return self.trace or self._compute

    def compute_on(self, model: str) -> BlockRecorder:
        """Gives a computation between traces that may call a model's modules."""
        block = self.block
        if self._compute_step.model not in ("", model):
            self._close_compute()
            block = self.block
        self._compute_step.model = model
        return block

    def open_trace(
        self, model: str, seed: int, generation: trace_pb2.Generation | None = None
    ) -> BlockRecorder:
        """Starts a trace; one that generates if it is said how."""
        step = self.add_step().trace
        step.model = model
        step.seed = seed
        step.mode = trace_pb2.TRACE_MODE_FORWARD
        if generation is not None:
            step.mode = trace_pb2.TRACE_MODE_GENERATE
            step.generation.CopyFrom(generation)
        self.num_traces += 1
        self.trace = BlockRecorder(self, step.nodes, next(self._block_numbers), step)
        return self.trace

    def close_trace(self) -> None:
        """Ends the open trace."""
        if self.trace is not None:
            self.trace.end_backward()
        self.trace = None

    def close(self) -> None:
        """Ends what is open, at the end of the session's block."""
        self._close_compute()

    def _close_compute(self) -> None:
        """Ends the open computation between traces."""
        if self._compute is not None:
            self._compute.end_backward()
        self._compute = None

    def exit(self, loop_item_node_id: int = 0) -> None:
        """Ends the session here, or leaves a loop."""
        if not loop_item_node_id:
            self.save_containers()
        self.add_step().exit.loop_item_node_id = loop_item_node_id

    def save_containers(self) -> None:
        """Has lists and dicts come back as they are here."""
        for container in self.containers:
            if container._is_saved:
                origin = container._origin
                name = assigned_name(origin.location)
                self.block.save(container, name, origin.location)

    def seed(self) -> None:
        """Draws the session's seed from torch's generator, if random numbers need it."""
        if any(_needs_seed(step) for step in all_steps(self.session.steps)):
            self.session.seed = int(torch.randint(1, 2**63 - 1, ()))

    def add_step(self) -> session_pb2.Step:
        """Adds a step after those defined so far."""
        self._close_compute()
        step = self._steps.add()  # type: ignore[attr-defined]
        step.location = self.location_index(user_location())
        return step  # type: ignore[no-any-return]

    def add_log(self, values: Sequence[object]) -> None:
        """Adds a message between traces."""
        location = user_location()
        if self._compute is not None:
            self._compute.log(values, location)
            return
        encoded = [self.encode(value, location) for value in values]
        step = self.add_step()
        step.log.SetInParent()
        step.log.values.extend(encoded)

    @contextmanager
    def inside(self, steps: MutableSequence[session_pb2.Step]) -> Iterator[None]:
        """Records into the steps of a loop or branch for a while."""
        self._close_compute()
        outer, self._steps = self._steps, steps
        try:
            with self.scoped():
                yield
        finally:
            self._close_compute()
            self._steps = outer

    @contextmanager
    def scoped(self) -> Iterator[None]:
        """Records what may not run, or run more than once, for a while."""
        outer = self.scope
        self.scope = (*outer, next(self._scope_numbers))
        try:
            yield
        finally:
            self.scope = outer

    def next_id(self) -> int:
        """Gives the next node's id."""
        self._last_id += 1
        return self._last_id

    def location_index(self, location: Location) -> int:
        """Gives the place of a line in the session's list, from 1."""
        key = (location.file, location.line)
        if key not in self._location_indices:
            self.session.locations.add(
                file=location.file, line=location.line, source=location.source
            )
            self._location_indices[key] = len(self.session.locations)
        return self._location_indices[key]

    def encode(self, value: object, location: Location) -> value_pb2.Value:
        """Encodes an argument; what can not be part of a session is an error at the user's line."""
        try:
            return torch_codec.encode(value, self._refer, self.brought.add)
        except Error as err:
            err.location = err.location or location
            raise

    def _refer(self, value: object) -> int | None:
        """Gives the id of a value of this session, and refuses those of others."""
        origin = getattr(value, "_origin", None)
        if origin is not None and origin.recorder is not self:
            raise error(
                Reason.UNKNOWN_REFERENCE,
                f"{origin} belongs to another session; keep both in one session, or save the value "
                "there and use the saved tensor here",
            )
        node_id = self._reference(value)
        if getattr(value, "_is_parameter", False) and (block := self.open_block) is not None:
            block.parameters[node_id or 0] = value
        return node_id

    def mark_saved(self, node_id: int, value: object) -> None:
        """Takes note of what is to come back, by the id of its save node."""
        self.saved[node_id] = value
        self._saved_objects.add(id(value))

    def is_saved(self, value: object) -> bool:
        """Whether the user has marked exactly this object to come back."""
        return id(value) in self._saved_objects


class BlockRecorder:
    """Records the nodes of one trace, or of a computation between traces.

    Attributes:
        number: number of the block in the session, from 1.
        trace: the trace; None for a computation.
        invoke: number of the invoke that is open, from 1; 0 for none.
        num_rows: rows of the batch, or of the open invoke; 0 where that is not known.
        length: tokens in the longest of these rows; 0 where that is not known.
        conditions: values under which nodes that are added now run.
        backward: the backward pass that gradients are of; None before the first.
        parameters: those that it has used, by their node ids.
        condition: number of the condition that is open, from 1; 0 for none.
        tree: the modules as the trace's own input goes through them; None where what the model's
            description tells holds for any input.
        step: the step of a generation that reads and writes are of, from 0.
        end_of_steps: place in the pass, as `Moment` counts it, at which a generation has ended.
    """

    def __init__(
        self,
        recorder: SessionRecorder,
        nodes: MutableSequence[intervention_pb2.Node],
        number: int,
        trace: trace_pb2.Trace | None = None,
    ) -> None:
        self.session_recorder = recorder
        self.number = number
        self.trace = trace
        self.invoke = 0
        self.num_rows = 0
        self.length = 0
        self.tree: ModuleTree | None = None
        self.conditions: list[object] = []
        self.backward: Backward | None = None
        self.step = 0
        self.end_of_steps = 0
        self.parameters: dict[int, object] = {}
        self._nodes = nodes
        self.condition = 0
        self._own_step = 0
        self._has_known_length = True
        self._steps_of_modules: Counter[str] = Counter()

    @property
    def max_new_tokens(self) -> int:
        """How many steps it has at most; 0 if it does not generate."""
        return self.trace.generation.max_new_tokens if self.trace is not None else 0

    def step_of(self, path: str) -> int:
        """Gives the step that reads and writes of a module are of, from 0."""
        return self.step + self._steps_of_modules[path]

    def length_at(self, step: int) -> int:
        """Gives how many tokens a row has at a step; 0 where that is not known."""
        if not self._has_known_length or not self.length:
            return 0
        return 1 if step else self.length

    def next_step(self, location: Location, path: str | None = None) -> None:
        """Goes on to the next step, for one module or for all."""
        step = self.step if path is None else self.step_of(path)
        if step + 1 >= self.max_new_tokens:
            what = (
                "it is no generation"
                if not self.max_new_tokens
                else (f"it has max_new_tokens={self.max_new_tokens}, so {step} is its last step")
            )
            raise error(
                Reason.MALFORMED_SESSION,
                f"this trace has no next step: {what}; open it with "
                "`model.generate(prompt, max_new_tokens=...)` and enough of them",
                location=location,
            )
        if path is None:
            self.step += 1
        else:
            self._steps_of_modules[path] += 1

    @contextmanager
    def at_step(
        self, step: int, location: Location, *, has_known_length: bool = True
    ) -> Iterator[None]:
        """Records what belongs to a step, for a while.

        Args:
            step: the step, from 0.
            location: the user's line.
            has_known_length: whether all steps that it stands for have as many tokens a row.
        """
        if self._own_step:
            raise error(
                Reason.MALFORMED_SESSION,
                "tracer.iter stands inside another tracer.iter; a step has no steps: put one loop "
                "after the other",
                location=location,
            )
        before = self.step, self._has_known_length
        self.step, self._own_step, self._has_known_length = step, step + 1, has_known_length
        try:
            with self.session_recorder.scoped():
                yield
        finally:
            (self.step, self._has_known_length), self._own_step = before, 0

    @contextmanager
    def outside_steps(self) -> Iterator[None]:
        """Records what belongs to no step, for a while."""
        own, self._own_step = self._own_step, 0
        try:
            yield
        finally:
            self._own_step = own

    def generated(self, part: intervention_pb2.GeneratedPart.ValueType, location: Location) -> int:
        """Adds what the generation has made, and gives its node id."""
        node = self._add_node(location)
        node.generated.part = part
        node.generated.invoke = self.invoke
        return node.id

    def end_generation(self, when: object, location: Location) -> None:
        """Ends the generation after the step that runs, where a value is true."""
        encoded = self.session_recorder.encode(when, location)
        node = self._add_node(location)
        node.end_generation.when.CopyFrom(encoded)

    def add_invoke(self, rows: Sequence[Sequence[int]]) -> int:
        """Adds rows of token ids to a trace's batch and gives the invoke's number."""
        assert self.trace is not None
        self.trace.invokes.add(rows=[trace_pb2.TokenRow(token_ids=row) for row in rows])
        return len(self.trace.invokes)

    def add_computed_invoke(self, token_ids: object, location: Location) -> int:
        """Adds token ids that an earlier step computes and gives the invoke's number."""
        assert self.trace is not None
        encoded = self.session_recorder.encode(token_ids, location)
        self.trace.invokes.add(token_ids=encoded)
        return len(self.trace.invokes)

    def add_module_invoke(
        self, args: tuple[object, ...], kwargs: dict[str, object], location: Location
    ) -> int:
        """Adds the arguments of a module that is no language model."""
        assert self.trace is not None
        encode = self.session_recorder.encode
        self.trace.invokes.add(args=encode(args, location), kwargs=encode(kwargs, location))
        return len(self.trace.invokes)

    @contextmanager
    def under(self, condition: object, location: Location, *, negated: bool) -> Iterator[None]:
        """Records nodes that run only if a condition holds, for a while."""
        assert self.trace is not None
        encoded = self.session_recorder.encode(condition, location)
        outer = self.condition
        self.trace.conditions.add(value=encoded, is_negated=negated, parent=outer)
        self.condition = len(self.trace.conditions)
        self.conditions.append(condition)
        try:
            with self.session_recorder.scoped():
                yield
        finally:
            self.condition = outer
            self.conditions.pop()

    def read(self, point: intervention_pb2.HookPoint, location: Location) -> int:
        """Adds a read and gives its node id."""
        node = self._add_node(location)
        # Reading changes nothing: so it need not wait for a condition.
        node.condition = 0
        node.read.hook_point.CopyFrom(point)
        return node.id

    def write(self, point: intervention_pb2.HookPoint, value: object, location: Location) -> None:
        """Adds a write."""
        encoded = self.session_recorder.encode(value, location)
        node = self._add_node(location)
        node.write.hook_point.CopyFrom(point)
        node.write.value.CopyFrom(encoded)

    def call(
        self, name: str, args: Sequence[object], kwargs: Mapping[str, object], location: Location
    ) -> int:
        """Adds an operation and gives its node id."""
        call = self._arguments(intervention_pb2.Call(name=name), args, kwargs, location)
        node = self._add_node(location)
        node.call.CopyFrom(call)
        return node.id

    def module_call(
        self, path: str, args: Sequence[object], kwargs: Mapping[str, object], location: Location
    ) -> int:
        """Adds the application of a module to values and gives its node id."""
        empty = intervention_pb2.ModuleCall(module_path=path)
        call = self._arguments(empty, args, kwargs, location)
        node = self._add_node(location)
        node.module_call.CopyFrom(call)
        return node.id

    def save(self, value: object, name: str, location: Location) -> None:
        """Marks a value to come back."""
        encoded = self.session_recorder.encode(value, location)
        node = self._add_node(location)
        node.save.value.CopyFrom(encoded)
        node.save.name = name
        self.session_recorder.mark_saved(node.id, value)

    def log(self, values: Sequence[object], location: Location) -> None:
        """Adds a message that is sent when its values exist."""
        encoded = [self.session_recorder.encode(value, location) for value in values]
        node = self._add_node(location)
        node.log.values.extend(encoded)

    def assign(self, variable: int, value: object, location: Location) -> None:
        """Gives a variable another value."""
        encoded = self.session_recorder.encode(value, location)
        node = self._add_node(location)
        node.assign.node_id = variable
        node.assign.value.CopyFrom(encoded)

    def skip(self, path: str, call_index: int, value: object, location: Location) -> None:
        """Has a call of a module not happen, and gives what it is to return."""
        encoded = self.session_recorder.encode(value, location)
        node = self._add_node(location)
        node.skip.module_path = path
        node.skip.call_index = call_index
        node.skip.step = self.step_of(path)
        node.skip.value.CopyFrom(encoded)

    def keep(self, value: object, handle_id: str, location: Location) -> None:
        """Keeps a value beyond the session."""
        encoded = self.session_recorder.encode(value, location)
        node = self._add_node(location)
        node.keep.value.CopyFrom(encoded)
        node.keep.handle_id = handle_id

    def gradient(self, backward: Backward, value: object, location: Location) -> int:
        """Adds the gradient of a loss with respect to a value, and gives its node id."""
        encode = self.session_recorder.encode
        loss, by = encode(backward.loss, location), encode(value, location)
        taken = intervention_pb2.Gradient(loss=loss, value=by)
        self._add_pass(taken, backward, location)
        node = self._add_node(location)
        node.gradient.CopyFrom(taken)
        return node.id

    def end_backward(self) -> None:
        """Has the last backward pass add to the gradients of parameters, if it has not."""
        if self.backward is not None:
            self.backward.end()

    def add_to_parameters(self, backward: Backward) -> None:
        """Adds a backward pass over the parameters that were used, if any were."""
        if not self.parameters:
            return
        location = backward.location
        encode = self.session_recorder.encode
        taken = training_pb2.Backward(loss=encode(backward.loss, location))
        taken.parameters.CopyFrom(encode(list(self.parameters.values()), location))
        self._add_pass(taken, backward, location)
        node = self._add_node(location)
        node.condition = backward.condition
        node.backward.CopyFrom(taken)

    def _add_pass(
        self,
        taken: intervention_pb2.Gradient | training_pb2.Backward,
        backward: Backward,
        location: Location,
    ) -> None:
        encode = self.session_recorder.encode
        if backward.gradient is not None:
            taken.gradient.CopyFrom(encode(backward.gradient, location))
        for value, gradient in backward.written.values():
            taken.written.add(value=encode(value, location), gradient=encode(gradient, location))

    def train(self, message: Training, location: Location) -> int:
        """Adds what makes or changes parameters and optimizers, and gives its node id."""
        node = self._add_node(location)
        getattr(node, _TRAINING[type(message)]).CopyFrom(message)
        return node.id

    def load(self, handle_id: str, location: Location) -> int:
        """Adds the value that an earlier session kept, and gives its node id."""
        node = self._add_node(location)
        node.load.handle_id = handle_id
        return node.id

    def stop(self, location: Location) -> None:
        """Ends the forward pass when all that was recorded before has run."""
        self._add_node(location).stop.SetInParent()

    def _arguments(
        self, call: _CallT, args: Sequence[object], kwargs: Mapping[str, object], location: Location
    ) -> _CallT:
        encode = self.session_recorder.encode
        call.args.extend(encode(arg, location) for arg in args)
        for key, value in kwargs.items():
            call.kwargs[key].CopyFrom(encode(value, location))
        return call

    def _add_node(self, location: Location) -> intervention_pb2.Node:
        recorder = self.session_recorder
        return self._nodes.add(  # type: ignore[attr-defined,no-any-return]
            id=recorder.next_id(),
            location=recorder.location_index(location),
            condition=self.condition,
            step=self._own_step,
        )


def _needs_seed(step: session_pb2.Step) -> bool:
    if step.trace.seed:
        return False
    # The model's own configuration may say that tokens are drawn.
    draws_tokens = step.trace.HasField("generation")
    nodes = (*step.trace.nodes, *step.compute.nodes)
    return draws_tokens or any(node.call.name in RANDOM for node in nodes)
