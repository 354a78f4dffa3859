"""Records the nodes of one trace, or of a computation between traces."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from insitu_proto.v1 import intervention_pb2, trace_pb2, training_pb2
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, MutableSequence, Sequence

    from insitu._gradients import Backward
    from insitu._recorder import SessionRecorder
    from insitu._structure import ModuleTree
    from insitu_wire.errors import Location

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
    def stepping_apart(self) -> Iterator[None]:
        """Has steps that are gone on to meanwhile be of what is recorded meanwhile."""
        before = self.step, self._steps_of_modules
        self._steps_of_modules = Counter(self._steps_of_modules)
        try:
            yield
        finally:
            self.step, self._steps_of_modules = before

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
        has_known_before = self._has_known_length
        self._own_step, self._has_known_length = step + 1, has_known_length
        try:
            with self.stepping_apart(), self.session_recorder.scoped():
                # Steps are named, however far modules have gone on before.
                self.step, self._steps_of_modules = step, Counter()
                yield
        finally:
            self._own_step, self._has_known_length = 0, has_known_before

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
        """Ends generation after this step where a value is true, of the open invoke's rows."""
        encoded = self.session_recorder.encode(when, location)
        node = self._add_node(location)
        node.end_generation.when.CopyFrom(encoded)
        node.end_generation.invoke = self.invoke

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
