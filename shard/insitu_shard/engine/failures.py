"""Turns what goes wrong in a trace into errors that name the user's line and the cure."""

from __future__ import annotations

import re
import traceback
from typing import TYPE_CHECKING

import torch

from insitu_shard.engine.graph import Call, ModuleCall
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from insitu_shard.engine.graph import Node, NodeId
    from insitu_shard.engine.plan import Plan
    from insitu_wire.errors import Error

# How torch's messages speak of tensors that do not fit each other.
_MISFIT = re.compile(r"shape|size|dimension|broadcast|expand|must match", re.IGNORECASE)
_NO_MEMORY = re.compile(r"out of memory|can(?:'t|not) allocate memory", re.IGNORECASE)


def raised(exception: Exception, node: Node, arguments: tuple[object, ...]) -> Error:
    """Describes what an operation raised, with the shapes that it was given."""
    operation = node.operation
    name = type(operation).__name__.lower()
    if isinstance(operation, Call):
        name = operation.name
    elif isinstance(operation, ModuleCall):
        name = f"the module {operation.module_path}"
    text = str(exception).strip() or type(exception).__name__
    frames = traceback.format_exception_only(exception)
    return error(
        _reason(exception, text),
        f"{name} failed on ({_shapes_of(arguments)}): {text}",
        location=node.location,
        remote_traceback="".join(frames).strip(),
        operation=name,
        exceptionType=type(exception).__name__,
    )


def _reason(exception: Exception, text: str) -> Reason:
    if isinstance(exception, torch.OutOfMemoryError | MemoryError) or _NO_MEMORY.search(text):
        return Reason.OUT_OF_MEMORY
    if isinstance(exception, RuntimeError | IndexError | ValueError) and _MISFIT.search(text):
        return Reason.SHAPE_MISMATCH
    return Reason.INTERVENTION_RAISED


def model_raised(exception: Exception) -> Error:
    """Describes what the model itself raised on the values that a trace gave it."""
    text = str(exception).strip() or type(exception).__name__
    return error(
        _reason(exception, text),
        f"the model can not run on what this trace gives or writes: {text}",
        exceptionType=type(exception).__name__,
    )


def cyclic_write(node_id: NodeId, plan: Plan, done: AbstractSet[NodeId]) -> Error:
    """Describes a write whose value the pass makes only after the place to write to."""
    node = plan.nodes[node_id]
    source = _first_unreached(node_id, plan, done)
    where = f" ({source.location})" if source is not None and source.location else ""
    what = f" to wait for {_describe(source)}{where}" if source is not None else ""
    return error(
        Reason.CYCLIC_TRACE,
        f"this write would have{what}, which the same forward pass reaches only later; take the "
        "value from an earlier module, or write in a later trace",
        location=node.location,
        nodeId=node_id,
    )


def _first_unreached(node_id: NodeId, plan: Plan, done: AbstractSet[NodeId]) -> Node | None:
    """Finds the hook point that a node waits for, through any number of other nodes."""
    waiting = [node_id]
    seen: set[NodeId] = set()
    while waiting:
        for predecessor in sorted(plan.predecessors[waiting.pop()] - done - seen):
            if plan.nodes[predecessor].boundary is not None:
                return plan.nodes[predecessor]
            seen.add(predecessor)
            waiting.append(predecessor)
    return None


def not_reached(node_id: NodeId, plan: Plan) -> Error:
    """Describes a hook point that the forward pass never came to."""
    node = plan.nodes[node_id]
    return error(
        Reason.HOOK_POINT_NOT_REACHED,
        f"the forward pass never reached {_describe(node)}: the model does not call this module, "
        "or not that often; read or write a module that it calls",
        location=node.location,
        nodeId=node_id,
    )


def ends_misfit(node: Node, when: object, num_rows: int) -> Error:
    """Describes a condition for the end of a generation that does not fit its rows."""
    return error(
        Reason.SHAPE_MISMATCH,
        f"the end of a generation hangs on one truth value, or on one for each of its {num_rows} "
        f"rows, and not on {_describe_value(when)}; reduce it with .any() or .all()",
        location=node.location,
        nodeId=node.id,
    )


def _describe(node: Node) -> str:
    point = getattr(node.operation, "hook_point", None)
    return str(point) if point is not None else f"node {node.id}"


def _shapes_of(values: tuple[object, ...]) -> str:
    """Describes values for an error message, such as "float32[1, 10, 576], int"."""
    return ", ".join(map(_describe_value, values))


def _describe_value(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({', '.join(map(_describe_value, value))})"
    return repr(value) if isinstance(value, int | float | str | slice) else type(value).__name__
