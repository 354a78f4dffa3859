"""Decodes the contract's steps into the engine's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from insitu_proto.v1 import intervention_pb2
from insitu_shard.engine import graph, training_graph
from insitu_wire import torch_codec
from insitu_wire.errors import Location, Reason, error

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from insitu_proto.v1 import session_pb2, trace_pb2, training_pb2, value_pb2

_SIDES = {
    intervention_pb2.HOOK_SIDE_INPUT: graph.Side.INPUT,
    intervention_pb2.HOOK_SIDE_INPUTS: graph.Side.INPUTS,
    intervention_pb2.HOOK_SIDE_OUTPUT: graph.Side.OUTPUT,
}
_PARTS = {
    intervention_pb2.GENERATED_PART_TOKEN_IDS: graph.GeneratedPart.TOKEN_IDS,
    intervention_pb2.GENERATED_PART_NUM_STEPS: graph.GeneratedPart.NUM_STEPS,
    intervention_pb2.GENERATED_PART_STEP: graph.GeneratedPart.STEP,
}
_OPTIONS = (
    "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "no_repeat_ngram_size", "pad_token_id",
)  # fmt: skip


class StepDecoder:
    """Decodes the steps of one session."""

    def __init__(
        self,
        locations: Sequence[intervention_pb2.SourceLocation],
        *,
        tensors: Sequence[torch.Tensor],
        device: torch.device,
        first_trace_number: int = 1,
    ) -> None:
        """Makes the decoder.

        Args:
            locations: the session's.
            tensors: the session's, which values refer to by index.
            device: where other tensors are put.
            first_trace_number: number of the first trace that is decoded.
        """
        self._tensors = tensors
        self._locations = [Location(at.file, at.line, at.source) for at in locations]
        self._device = device
        self._trace_number = first_trace_number - 1

    def steps(self, steps: Iterable[session_pb2.Step]) -> tuple[graph.Step, ...]:
        """Decodes steps, in order."""
        return tuple(self.step(step) for step in steps)

    def step(self, step: session_pb2.Step) -> graph.Step:
        """Decodes a step.

        Raises:
            VersionError: UNSUPPORTED_FEATURE for a step that the engine does not run.
        """
        location = self._location(step.location)
        match step.WhichOneof("kind"):
            case "trace":
                self._trace_number += 1
                return graph.Step(self._trace(step.trace), location, self._trace_number)
            case "compute":
                compute = graph.Compute(self._nodes(step.compute.nodes), step.compute.model)
                return graph.Step(compute, location)
            case "loop":
                return graph.Step(self._loop(step.loop), location)
            case "branch":
                return graph.Step(self._branch(step.branch), location)
            case "log":
                return graph.Step(graph.Log(self._values(step.log.values)), location)
            case "exit":
                return graph.Step(graph.Exit(step.exit.loop_item_node_id), location)
            case kind:
                raise _unsupported(f"a step of kind {kind}", location)

    def _trace(self, trace: trace_pb2.Trace) -> graph.Trace:
        return graph.Trace(
            trace.model,
            tuple(self._invoke(invoke) for invoke in trace.invokes),
            self._nodes(trace.nodes),
            tuple(
                graph.Condition(self._value(at.value), at.is_negated, at.parent)
                for at in trace.conditions
            ),
            trace.seed,
            _generation(trace.generation) if trace.HasField("generation") else None,
        )

    def _invoke(self, invoke: trace_pb2.Invoke) -> graph.Invoke:
        return graph.Invoke(
            tuple(tuple(row.token_ids) for row in invoke.rows),
            self._value(invoke.token_ids) if invoke.HasField("token_ids") else None,
            self._value(invoke.args) if invoke.HasField("args") else (),
            self._value(invoke.kwargs) if invoke.HasField("kwargs") else {},
        )

    def _loop(self, loop: session_pb2.Loop) -> graph.Loop:
        return graph.Loop(self._value(loop.items), loop.item_node_id, self.steps(loop.steps))

    def _branch(self, branch: session_pb2.Branch) -> graph.Branch:
        condition = self._value(branch.condition)
        return graph.Branch(condition, self.steps(branch.steps), self.steps(branch.else_steps))

    def _nodes(self, nodes: Iterable[intervention_pb2.Node]) -> tuple[graph.Node, ...]:
        return tuple(self._node(node) for node in nodes)

    def _node(self, node: intervention_pb2.Node) -> graph.Node:
        location = self._location(node.location)
        operation = self._operation(node, location)
        return graph.Node(node.id, operation, location, node.condition, node.step)

    def _operation(  # noqa: C901 - one case a kind
        self, node: intervention_pb2.Node, location: Location | None
    ) -> graph.Operation:
        match node.WhichOneof("operation"):
            case "read":
                return graph.Read(_hook_point(node.read.hook_point))
            case "write":
                return graph.Write(
                    _hook_point(node.write.hook_point), self._value(node.write.value)
                )
            case "call":
                call = node.call
                return graph.Call(call.name, self._values(call.args), self._kwargs(call))
            case "module_call":
                apply = node.module_call
                return graph.ModuleCall(
                    apply.module_path, self._values(apply.args), self._kwargs(apply)
                )
            case "save":
                return graph.Save(self._value(node.save.value), node.save.name)
            case "log":
                return graph.Log(self._values(node.log.values))
            case "assign":
                return graph.Assign(node.assign.node_id, self._value(node.assign.value))
            case "stop":
                return graph.Stop()
            case "skip":
                skip = node.skip
                value = self._value(skip.value)
                return graph.Skip(skip.module_path, skip.call_index, value, skip.step)
            case "keep":
                return graph.Keep(self._value(node.keep.value), node.keep.handle_id)
            case "load":
                return graph.Load(node.load.handle_id)
            case "gradient":
                taken = node.gradient
                return graph.Gradient(
                    self._value(taken.loss),
                    self._value(taken.value),
                    self._value(taken.gradient) if taken.HasField("gradient") else None,
                    self._written(taken.written),
                )
            case "generated" if node.generated.part in _PARTS:
                return graph.Generated(_PARTS[node.generated.part], node.generated.invoke)
            case "end_generation":
                end = node.end_generation
                return graph.EndGeneration(self._value(end.when), end.invoke)
        return self._training(node, location)

    def _training(self, node: intervention_pb2.Node, location: Location | None) -> graph.Operation:
        match node.WhichOneof("operation"):
            case "parameter":
                return training_graph.Parameter(self._value(node.parameter.value))
            case "backward":
                taken = node.backward
                return training_graph.Backward(
                    self._value(taken.loss),
                    self._value(taken.gradient) if taken.HasField("gradient") else None,
                    self._list(taken.parameters),
                    self._written(taken.written),
                )
            case "read_gradient":
                return training_graph.ReadGradient((self._value(node.read_gradient.parameter),))
            case "write_gradient":
                write = node.write_gradient
                parameters = (self._value(write.parameter),)
                return training_graph.WriteGradient(parameters, self._value(write.gradient))
            case "zero_gradient":
                zero = node.zero_gradient
                return training_graph.ZeroGradient(self._list(zero.parameters), zero.keeps_tensors)
            case "optimizer":
                return training_graph.Optimizer(node.optimizer.name)
            case "optimizer_step":
                step = node.optimizer_step
                groups = [
                    (
                        self._list(group.parameters),
                        {key: self._value(option) for key, option in group.options.items()},
                    )
                    for group in step.groups
                ]
                return training_graph.OptimizerStep(self._value(step.optimizer), tuple(groups))
            case kind:
                raise _unsupported(f"an operation of kind {kind}", location)

    def _written(self, written: Sequence[training_pb2.GradientWrite]) -> training_graph.Written:
        return tuple((self._value(at.value), self._value(at.gradient)) for at in written)

    def _list(self, value: value_pb2.Value) -> tuple[object, ...]:
        return tuple(self._value(item) for item in value.list.items)

    def _kwargs(
        self, call: intervention_pb2.Call | intervention_pb2.ModuleCall
    ) -> dict[str, object]:
        return {key: self._value(value) for key, value in call.kwargs.items()}

    def _values(self, values: Sequence[value_pb2.Value]) -> tuple[object, ...]:
        return tuple(self._value(value) for value in values)

    def _value(self, value: value_pb2.Value) -> object:
        return torch_codec.decode(
            value, resolve=graph.Ref, tensors=self._tensors, device=self._device
        )

    def _location(self, index: int) -> Location | None:
        return self._locations[index - 1] if index else None


def _hook_point(point: intervention_pb2.HookPoint) -> graph.HookPoint:
    return graph.HookPoint(
        point.module_path, _SIDES[point.side], point.call_index, point.invoke, point.step
    )


def _generation(message: trace_pb2.Generation) -> graph.Generation:
    """Gives the options by the names that transformers has for them."""
    options: dict[str, object] = {
        name: getattr(message, name)
        for name in _OPTIONS
        if message.HasField(name)  # type: ignore[arg-type]
    }
    if message.HasField("eos_token_ids"):
        options["eos_token_id"] = list(message.eos_token_ids.token_ids) or None
    if message.stop_strings:
        options["stop_strings"] = list(message.stop_strings)
    return graph.Generation(message.max_new_tokens, options, message.streams)


def _unsupported(what: str, location: Location | None) -> Exception:
    return error(
        Reason.UNSUPPORTED_FEATURE,
        f"this version of insitu does not run {what}; upgrade where the model runs",
        location=location,
    )
