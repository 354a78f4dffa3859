"""Checks a session before it is accepted, trusting nothing in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from insitu_proto.v1.trace_pb2 import TraceMode
from insitu_scheduler.generation_checks import check_generation, check_step
from insitu_scheduler.models import model_not_found
from insitu_scheduler.operation_checks import MAX_QUOTED, OperationChecker
from insitu_scheduler.refusals import check_limit, malformed, unsupported
from insitu_scheduler.segments import cut
from insitu_scheduler.transfers import plan_transfers
from insitu_scheduler.value_checks import ValueChecker, check_brought_tensor
from insitu_wire.errors import Error, Location, Reason, error
from insitu_wire.steps import all_steps
from insitu_wire.values import walk

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from insitu_proto.v1.intervention_pb2 import Node
    from insitu_proto.v1.session_pb2 import Compute, Loop, Session, Step
    from insitu_proto.v1.trace_pb2 import Trace
    from insitu_proto.v1.value_pb2 import Value
    from insitu_scheduler.models import KnownModel

MAX_STEPS = 10_000
MAX_NODES = 100_000
MAX_TENSORS = 100_000
_WITHOUT_VALUE = (
    "write", "save", "log", "assign", "stop", "skip", "keep", "backward", "write_gradient",
    "zero_gradient", "optimizer_step", "end_generation",
)  # fmt: skip
# What runs inside a forward pass only.
_IN_A_PASS = ("read", "write", "stop", "skip", "generated", "end_generation")
MAX_DEPTH = 16


def validate(session: Session, models: Mapping[str, KnownModel]) -> None:
    """Checks that a session can run on the models that are served.

    Raises:
        Error: the first thing that is wrong, at the user's line where it is known.
    """
    _Validation(session, models).run()


def check_size(session: Session, max_bytes: int) -> None:
    """Refuses a session that is too large.

    Raises:
        CapacityError: REQUEST_TOO_LARGE.
    """
    check_limit("bytes", session.ByteSize(), max_bytes)


class _Validation:
    """One pass over a session, in its order."""

    def __init__(self, session: Session, models: Mapping[str, KnownModel]) -> None:
        self._session = session
        self._models = models
        self._top_step_model: KnownModel | None = None
        self._nodes: dict[int, str] = {}
        self._last_id = 0
        self._steps = list(all_steps(session.steps))
        self._all_ids = frozenset(
            node.id for step in self._steps for node in (*step.trace.nodes, *step.compute.nodes)
        )
        self._num_conditions = 0
        self._num_invokes = 0
        self._loops: list[int] = []
        self._location: Location | None = None
        self._owner = ""
        self._values = ValueChecker(self._check_reference, num_tensors=len(session.tensors))
        self._operations = OperationChecker(self._values, self._check_reference, self._nodes)

    def run(self) -> None:
        steps = self._session.steps
        if not steps:
            raise malformed("the session has no steps; give it a trace, a log or an exit")
        check_limit("steps", len(self._steps), MAX_STEPS)
        check_limit("nodes", len(self._all_ids), MAX_NODES)
        check_limit("tensors", len(self._session.tensors), MAX_TENSORS)
        for tensor in self._session.tensors:
            check_brought_tensor(tensor, "the session")
        if not self._models:
            raise error(
                Reason.MODEL_NOT_FOUND,
                "no model is served yet, so no session can run; start a shard group",
            )
        self._check_steps(steps, "step ", depth=1)
        plan_transfers(self._session, cut(self._session))

    def _check_steps(self, steps: Iterable[Step], prefix: str, *, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise malformed(f"{prefix}1 is nested deeper than {MAX_DEPTH}; nest loops less")
        for number, step in enumerate(steps, start=1):
            if depth == 1:
                self._top_step_model = None
            try:
                self._check_step(f"{prefix}{number}", step, depth)
            except Error as err:
                err.location = err.location or self._location
                raise

    def _check_step(self, owner: str, step: Step, depth: int) -> None:
        self._owner = owner
        self._location = self._find_location(step.location)
        match step.WhichOneof("kind"):
            case "trace":
                self._check_trace(step.trace)
            case "log":
                self._check_values(step.log.values)
            case "exit":
                self._check_exit(step.exit.loop_item_node_id)
            case "compute":
                self._check_compute(step.compute)
            case "loop":
                self._check_loop(step.loop, owner, depth)
            case "branch":
                self._check_values([step.branch.condition])
                self._check_steps(step.branch.steps, f"{owner}.", depth=depth + 1)
                self._check_steps(step.branch.else_steps, f"{owner}.else.", depth=depth + 1)
            case None:
                raise unsupported(f"{self._owner} is of a kind that it does not know")

    def _check_exit(self, loop_item_node_id: int) -> None:
        if loop_item_node_id and loop_item_node_id not in self._loops:
            raise malformed(f"{self._owner} leaves a loop that it is not in")

    def _check_compute(self, compute: Compute) -> None:
        self._num_conditions = self._num_invokes = 0
        model = self._find_model(compute.model) if compute.model else None
        step_location = self._location
        for node in compute.nodes:
            if node.WhichOneof("operation") in _IN_A_PASS:
                raise malformed(
                    f"node {node.id} of {self._owner} names a hook point, outside any trace"
                )
            self._check_node(node, model)
        self._location = step_location

    def _check_loop(self, loop: Loop, owner: str, depth: int) -> None:
        self._check_values([loop.items])
        self._add_id(loop.item_node_id, "loop")
        self._loops.append(loop.item_node_id)
        self._check_steps(loop.steps, f"{owner}.", depth=depth + 1)
        self._loops.pop()

    def _check_trace(self, trace: Trace) -> None:
        if trace.mode == TraceMode.TRACE_MODE_UNSPECIFIED:
            raise malformed(f"the trace of {self._owner} has no mode; set it to forward")
        if trace.mode not in TraceMode.values():
            raise unsupported(f"{self._owner} is of mode {trace.mode}, which it does not know")
        check_generation(trace, self._owner)
        model = self._find_model(trace.model)
        self._check_rows(trace, model.vocabulary_size)
        self._num_invokes = len(trace.invokes)
        self._num_conditions = len(trace.conditions)
        step_location = self._location
        for node in trace.nodes:
            check_step(node, trace)
            self._check_node(node, model)
        self._check_conditions(trace)
        self._location = step_location

    def _check_conditions(self, trace: Trace) -> None:
        for number, condition in enumerate(trace.conditions, start=1):
            if condition.parent >= number:
                raise malformed(
                    f"condition {number} of {self._owner} needs condition {condition.parent}; "
                    "a condition needs one before it"
                )
            self._check_values([condition.value])
        for node in trace.nodes:
            for used in self._condition_references(trace, node.condition):
                if used >= node.id:
                    raise malformed(f"node {node.id} runs under a condition that comes later")

    def _condition_references(self, trace: Trace, number: int) -> Iterator[int]:
        while number:
            condition = trace.conditions[number - 1]
            for part in walk(condition.value):
                if part.HasField("reference"):
                    yield part.reference.node_id
            number = condition.parent

    def _find_model(self, name: str) -> KnownModel:
        if name not in self._models:
            raise model_not_found(name, self._models)
        model = self._models[name]
        if self._top_step_model is not None and self._top_step_model is not model:
            first = self._top_step_model.description.name
            raise unsupported(
                f"a loop or branch of the session has traces of two models, {first!r} and "
                f"{name!r}, and it moves values between models only at the end of either; unroll "
                "it, as with a plain `for` over known items"
            )
        self._top_step_model = model
        return model

    def _check_rows(self, trace: Trace, vocabulary_size: int | None) -> None:
        if not trace.invokes:
            raise malformed(f"the trace of {self._owner} has no input; give it an invoke")
        for number, invoke in enumerate(trace.invokes, start=1):
            if invoke.HasField("args") or invoke.HasField("kwargs"):
                raise malformed(
                    f"invoke {number} of {self._owner} has arguments of a module that is no "
                    "language model; such modules run in process alone"
                )
            if invoke.HasField("token_ids"):
                self._check_values([invoke.token_ids])
                continue
            if not invoke.rows or not all(row.token_ids for row in invoke.rows):
                raise malformed(
                    f"invoke {number} of {self._owner} is empty or has an empty row; "
                    "each row needs a token"
                )
            largest = max(max(row.token_ids) for row in invoke.rows)
            if vocabulary_size is not None and largest >= vocabulary_size:
                raise malformed(
                    f"token id {largest} of {self._owner} is not in the model's vocabulary; "
                    f"ids go from 0 to {vocabulary_size - 1}",
                    tokenId=largest,
                    vocabularySize=vocabulary_size,
                )

    def _check_node(self, node: Node, model: KnownModel | None) -> None:
        self._owner = f"node {node.id}"
        self._location = self._find_location(node.location)
        if node.condition > self._num_conditions:
            raise malformed(
                f"{self._owner} runs under condition {node.condition}, and the trace has "
                f"{self._num_conditions}"
            )
        self._check_order(node.id)
        self._operations.check(node, model, self._num_invokes)
        self._add_id(node.id, node.WhichOneof("operation") or "")

    def _check_order(self, node_id: int) -> None:
        if node_id <= self._last_id:
            raise malformed(
                f"node {node_id} comes after node {self._last_id}; ids start at 1 and increase",
                nodeId=node_id,
                previousNodeId=self._last_id,
            )

    def _add_id(self, node_id: int, kind: str) -> None:
        self._check_order(node_id)
        self._last_id = node_id
        self._nodes[node_id] = kind

    def _check_values(self, values: Iterable[Value]) -> None:
        for value in values:
            self._values.check(value, self._owner)

    def _check_reference(self, node_id: int) -> None:
        kind = self._nodes.get(node_id)
        if kind is not None and kind not in _WITHOUT_VALUE:
            return
        if kind is not None:
            problem = f"which is a {kind} and has no value"
        elif node_id in self._all_ids:
            problem = "which is defined later, or is itself"
        else:
            problem = "which the session does not have"
        raise error(
            Reason.UNKNOWN_REFERENCE,
            f"{self._owner} refers to node {node_id}, {problem}; refer to a value defined before",
            nodeId=node_id,
            referrer=self._owner,
        )

    def _find_location(self, index: int) -> Location | None:
        locations = self._session.locations
        if index > len(locations):
            raise malformed(
                f"{self._owner} has location {index}, and the session has {len(locations)}",
                locationIndex=index,
            )
        if index == 0:
            return None
        where = locations[index - 1]
        return Location(where.file[-MAX_QUOTED:], where.line, where.source[:MAX_QUOTED])
