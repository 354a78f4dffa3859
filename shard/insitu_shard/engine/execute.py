"""Runs single nodes."""

from __future__ import annotations

from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from insitu_shard.engine.block_values import BlockValues
from insitu_shard.engine.control import holds
from insitu_shard.engine.failures import raised
from insitu_shard.engine.gradients import detached
from insitu_shard.engine.graph import (
    UNSET,
    Assign,
    Call,
    EndGeneration,
    Generated,
    GeneratedPart,
    Gradient,
    Keep,
    Load,
    Log,
    ModuleCall,
    Read,
    Save,
    Skip,
    Stop,
    Write,
    operands,
    resolve,
)
from insitu_shard.engine.joint_calls import call_jointly, is_row_wise
from insitu_shard.engine.logs import format_values
from insitu_shard.engine.memory import (
    copied,
    copied_if_in,
    storages,
)
from insitu_shard.engine.operations import function
from insitu_shard.engine.randomness import seeded
from insitu_shard.engine.ranks import RankLostError
from insitu_shard.engine.sizes import check_size
from insitu_shard.engine.training import applied
from insitu_shard.engine.training_graph import Backward, OptimizerStep, Training
from insitu_wire.errors import Error, Reason, error
from insitu_wire.operations import (
    FACTORIES,
    LAST,
    RANDOM,
    SELECT,
    is_in_place,
)
from insitu_wire.torch_codec import check_saved

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from insitu_shard.engine.boundary_value import BoundaryValue
    from insitu_shard.engine.gradients import Asked, Gradients
    from insitu_shard.engine.graph import Node, NodeId
    from insitu_shard.engine.made import Made
    from insitu_shard.engine.memory import StorageKey
    from insitu_shard.engine.module import LoadedModule
    from insitu_shard.engine.plan import Plan


class Executor:
    """Runs the nodes of one block, in whatever order it is told.

    Attributes:
        values: what nodes gave, and what they see of each other.
        logs: messages of log nodes.
        kept: handles and values of keep nodes that ran.
        skips: what skipped calls return, by module path, call index and step.
        made: what the generation has made; None before it has ended.
        ends: values that ask for an end of the generation.
        stopped_at: the stop node that ran, if one did.
        is_calling_module: whether a module runs on a node's behalf, so that hooks stay silent.
    """

    def __init__(
        self,
        plan: Plan,
        model: LoadedModule,
        earlier: Mapping[NodeId, object],
        seed: str,
        brought: AbstractSet[StorageKey] = frozenset(),
        handles: Mapping[str, object] = MappingProxyType({}),
        gradients: Gradients | None = None,
    ) -> None:
        """Makes an executor.

        Args:
            plan: the block.
            model: what it runs on.
            earlier: values of earlier steps.
            seed: what makes its random numbers its own.
            brought: memory of the user's own tensors, which other sessions may be using too: nodes
                read it, and get a copy where they could write to it.
            handles: the user's values that earlier sessions kept.
            gradients: takes the block's gradients, if it has any.
        """
        self._gradients = gradients
        self._handles = handles
        self._seed = seed
        self._plan = plan
        self._model = model
        self.values = BlockValues(plan, earlier, brought, gradients)
        self.logs: dict[NodeId, str] = {}
        self.kept: dict[NodeId, tuple[str, object]] = {}
        self.skips: dict[tuple[str, int, int], object] = {}
        self.made: Made | None = None
        self.ends: list[tuple[Node, object]] = []
        self.stopped_at: NodeId | None = None
        self.is_calling_module = False
        self._called: dict[NodeId, object] = {}

    def call_ahead(self, nodes: Sequence[Node]) -> None:
        """Makes one call of a module for several nodes that call it, if it can.

        Args:
            nodes: nodes that can run now.
        """
        calls = [
            (node.id, call) for node in nodes if isinstance(call := node.operation, ModuleCall)
        ]
        path = calls[0][1].module_path
        module = self._model.modules[path]
        is_plain = all(len(call.args) == 1 and not call.kwargs for _, call in calls)
        if not is_plain or not is_row_wise(module) or not all(map(self._is_to_run, nodes)):
            return
        inputs: list[Any] = [
            self.values.own(self.values.resolve(call.args[0], at)) for at, call in calls
        ]
        results = call_jointly(module, lambda rows: self._call_module(path, (rows,), {}), inputs)
        if results is not None:
            self._called.update(zip((at for at, _ in calls), results, strict=True))

    def asked_gradients(self) -> Asked | None:
        """Gives what the backward pass of the block is to give; None if nothing, or not now."""
        assert self._gradients is not None
        assert self._plan.differentiated is not None
        nodes = [self._plan.nodes[node_id] for node_id in self._plan.differentiated.gradients]
        are_due = (self._plan.predecessors[node.id] <= self.values.done for node in nodes)
        if not all(are_due) or not all(map(self._is_to_run, nodes)):
            return None
        try:
            asked = self._gradients.asked(partial(self.values.value_of, reader=nodes[0].id))
        except Error:
            return None  # it is raised where the gradient is taken
        is_known = isinstance(asked.loss, torch.Tensor) and asked.loss.requires_grad
        is_whole = asked.gradient is not None or asked.loss.numel() == 1
        return asked if is_known and is_whole and asked.inputs else None

    def run(self, node: Node, boundary_value: BoundaryValue | None) -> None:
        """Runs a node, unless its condition does not hold or a value that it uses is not set.

        Args:
            node: the node.
            boundary_value: what the model holds at the node's boundary, if it has one.

        Raises:
            Error: what went wrong, with the node's location.
        """
        try:
            value = self._apply(node, boundary_value) if self._is_to_run(node) else UNSET
        except Error as err:
            err.location = err.location or node.location
            raise
        except RankLostError:
            raise
        except Exception as exception:
            if isinstance(node.operation, Gradient | Backward):
                self._model.ranks.check_left_together(exception)
            raise raised(exception, node, self._describable_operands(node)) from exception
        if self._gradients is not None:
            value = self._gradients.begun(node, value)
        self.values.add(node, value)

    def is_over(self, node: Node) -> bool:
        """Whether a generation has ended before the step that a node belongs to."""
        if self.made is None:
            return False
        step = node.step - 1 if node.boundary is None else node.boundary.step
        return step >= self.made.num_steps

    def _is_to_run(self, node: Node) -> bool:
        if self.is_over(node) or not self._is_set(node):
            return False
        number = node.condition
        while number:
            condition = self._plan.conditions[number - 1]
            if holds(self.values.resolve(condition.value, node.id)) == condition.is_negated:
                return False
            number = condition.parent
        return True

    def _is_set(self, node: Node) -> bool:
        """Whether all values are set that a node uses; a selection uses one of two."""
        match node.operation:
            case Call(name=name, args=(condition, one, other)) if name == SELECT:
                condition = self.values.resolve(condition, node.id)
                if condition is UNSET:
                    return False
                return self.values.resolve(one if holds(condition) else other, node.id) is not UNSET
            case Call(name=name, args=args) if name == LAST:
                return any(self.values.resolve(one, node.id) is not UNSET for one in args)
        used = self._plan.uses[node.id]
        return all(self.values.value_of(node_id, node.id) is not UNSET for node_id in used)

    def _apply(self, node: Node, boundary_value: BoundaryValue | None) -> object:  # noqa: C901
        match node.operation:
            case Read(hook_point=point):
                assert boundary_value is not None
                return boundary_value.read(point)
            case Write(hook_point=point, value=value):
                assert boundary_value is not None
                boundary_value.write(point, self.values.own(self.values.resolve(value, node.id)))
            case Call(name=name, args=args, kwargs=kwargs):
                if is_in_place(name):
                    self.values.before_write(node)
                arguments, keywords = self.values.resolve((args, dict(kwargs)), node.id)
                if name == LAST:
                    arguments = tuple(one for one in arguments if one is not UNSET)
                if is_in_place(name):
                    arguments = (self.values.own(arguments[0]), *arguments[1:])
                return self.values.own(self._call(node, name, arguments, keywords))
            case ModuleCall() if node.id in self._called:
                return self._called.pop(node.id)
            case ModuleCall(module_path=path, args=args, kwargs=kwargs):
                arguments, keywords = self.values.own(
                    self.values.resolve((args, dict(kwargs)), node.id)
                )
                return self._call_module(path, arguments, keywords)
            case Save(value=value):
                saved = self.values.own(self.values.resolve(value, node.id))
                saved = saved if self._gradients is None else detached(saved)
                # Refuses here, at the user's line, what could not be sent.
                check_saved(saved)
                self.values.save(node, saved)
            case Log(values=logged):
                self.logs[node.id] = format_values(detached(self.values.resolve(logged, node.id)))
            case Assign(target=target, value=value):
                self.values.assign(node, target, value)
            case Skip(module_path=path, call_index=index, value=value, step=step):
                self.skips[path, index, step] = self.values.own(self.values.resolve(value, node.id))
            case Stop():
                self.stopped_at = node.id
            case Keep(value=value, handle_id=handle_id):
                kept = detached(self.values.resolve(value, node.id))
                self.kept[node.id] = (handle_id, copied(kept))
            case Load(handle_id=handle_id):
                return copied(self._load(handle_id))
            case Generated(part=GeneratedPart.STEP):
                return torch.tensor(node.step - 1)
            case Generated(part=part, invoke=invoke):
                assert self.made is not None
                is_ids = part is GeneratedPart.TOKEN_IDS
                return self.made.ids(invoke) if is_ids else torch.tensor(self.made.num_steps)
            case EndGeneration(when=when):
                self.ends.append((node, self.values.resolve(when, node.id)))
            case operation if isinstance(operation, Gradient | Training):
                return self._train(node, operation)
        return None

    def _train(self, node: Node, operation: Gradient | Training) -> object:
        if isinstance(operation, Gradient | Backward):
            assert self._gradients is not None
            value_of = partial(self.values.value_of, reader=node.id)
            if isinstance(operation, Backward):
                self._gradients.add_to_parameters(node, value_of)
                return None
            gradient = self._gradients.take(node, value_of)
            # Autograd gives one tensor for several values, and this one may be written to.
            return gradient.clone() if self.values.are_written_to else gradient
        if isinstance(operation, OptimizerStep):
            self.values.copy_for_earlier_readers(node)
        return applied(
            operation,
            lambda value: self.values.resolve(value, node.id),
            lambda value: resolve(value, lambda used: self.values.value_of(used, node.id)),
        )

    def _call(
        self, node: Node, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Any:
        if name in FACTORIES:
            keywords.setdefault("device", self._model.device)
        check_size(name, arguments, keywords)
        if self._gradients is not None and is_in_place(name):
            _renew(arguments[0])
        if name in RANDOM:
            with seeded(f"{self._seed}:{node.id}", self._model.device):
                return function(name)(*arguments, **keywords)
        return function(name)(*arguments, **keywords)

    def _load(self, handle_id: str) -> object:
        try:
            return self._handles[handle_id]
        except KeyError:
            raise error(
                Reason.HANDLE_NOT_FOUND,
                f"there is no kept value under the handle {handle_id}; it was released, or has not "
                "been used for long, or the shard group that had it was lost: keep it again",
                handleId=handle_id,
            ) from None

    def _call_module(self, path: str, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
        layouts = self._model.layouts
        args, kwargs = layouts.at(path, is_input=True).scatter((args, kwargs))
        self.is_calling_module = True
        try:
            result = self._model.modules[path](*args, **kwargs)
            whole = layouts.at(path, is_input=False).gather(result)
        except Exception as exception:
            self._model.ranks.check_left_together(exception)
            raise
        finally:
            self.is_calling_module = False
        # Some modules return their argument, or a part of their weights.
        owned = storages((args, kwargs)) | self._model.storages
        return copied_if_in(owned, self._model.brought(whole))

    def _describable_operands(self, node: Node) -> tuple[object, ...]:
        resolved: tuple[object, ...] = self.values.resolve(operands(node.operation), node.id)
        return resolved


def _renew(target: object) -> None:
    """Brings a view's place in the graph up to date.

    torch does so when it is asked for, and until then takes a view of what was written to through
    another view for a leaf, which can not be written to.
    """
    if isinstance(target, torch.Tensor):
        _ = target.grad_fn
