"""Tells the compiler what it must know of a block: what its pass needs, writes and reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from insitu_shard.compiler import GENERATES, GRADIENTS, Fork, TraceFacts
from insitu_shard.compiler.outline import has_rows
from insitu_shard.engine.graph import (
    Call,
    Keep,
    Load,
    ModuleCall,
    Read,
    Ref,
    Save,
    Side,
    Skip,
    Stop,
    Write,
    operands,
)
from insitu_shard.engine.needs import closure
from insitu_shard.engine.positions import first_written, needs_whole_rows
from insitu_wire.operations import RANDOM, last_word

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

    from insitu_shard.compiler import Outline
    from insitu_shard.engine.graph import Boundary, HookPoint, Node, NodeId
    from insitu_shard.engine.inputs import Batch, InvokeRows
    from insitu_shard.engine.plan import Plan

# What these give is small beside what they take.
_REDUCING = {
    "argmax", "argmin", "max", "min", "amax", "amin", "mean", "sum", "norm", "topk", "item", "any",
    "all", "std", "var", "logsumexp", "median", "prod", "count_nonzero", "vector_norm",
}  # fmt: skip


def place(
    plan: Plan,
    outline: Outline,
    batch: Batch,
    *,
    key: Hashable,
    head: tuple[int, int] | None,
    session: Hashable,
    may_mix: bool,
    graph_bytes: int = 0,
) -> TraceFacts:
    """Gives the facts of a trace.

    Args:
        plan: its plan.
        outline: the model's.
        batch: its rows of token ids.
        key: what traces must have alike to share a pass with it.
        head: the positions of the head's output that it reads, if not all.
        session: what tells values of its session from those of others.
        may_mix: whether its rows are of one length, and not to be padded.
        graph_bytes: estimate of what the graph of its gradients keeps.
    """
    rows = batch.rows
    kept = _kept_bytes(plan, outline, batch) + graph_bytes
    scope = _Scope(session, outline.head_path, head, batch.invokes)
    if reason := _reason_for_alone(plan, outline):
        return TraceFacts(rows=rows, alone_because=reason, kept_bytes=kept)
    points = [(at.module_path, at.is_input) for at in plan.at_boundary]
    moments = [outline.moment(path, is_input=is_input) or 0 for path, is_input in points]
    needs_whole = needs_whole_rows(plan, outline)
    # A graph is of rows that no other trace has.
    has_own_rows = plan.differentiated is not None
    own = (Fork(0, object()),)
    reads_head = (outline.head_path, False) in points
    after_head = outline.moment("", is_input=False) or 0
    is_whole = any(path == "" and not is_input for path, is_input in points)
    return TraceFacts(
        rows=rows,
        key=key,
        kind=GRADIENTS if has_own_rows else "",
        forks=own if has_own_rows else _forks(plan, outline, scope, batch.length),
        needs_whole_rows=needs_whole,
        fits_other_lengths=may_mix and outline.shares_prefixes and not needs_whole,
        last_moment=max(moments, default=0) if not is_whole else after_head,
        head=(head or (0, batch.length)) if reads_head or is_whole else None,
        kept_bytes=kept,
    )


def place_generating(
    plan: Plan,
    outline: Outline,
    batch: Batch,
    *,
    max_new_tokens: int,
    state_bytes: int,
    alone_because: str,
    may_pad: bool,
) -> TraceFacts:
    """Gives the facts of a trace that generates, as its first step has them.

    Args:
        plan: its plan.
        outline: the model's.
        batch: its rows of token ids.
        max_new_tokens: how many steps it has at most.
        state_bytes: what stays in memory of each token until it ends.
        alone_because: why it can not generate with others; empty if it can.
        may_pad: whether prompts of other lengths may be padded to its own.
    """
    lengths = {len(row) for row in batch.rows}
    num_tokens = (batch.length + max_new_tokens) * len(batch.rows)
    reason = (
        alone_because or _reason_for_alone(plan, outline) or _reason_while_generating(plan, outline)
    )
    key = "padded" if may_pad else (batch.length, len(lengths) > 1)
    return TraceFacts(
        rows=batch.rows,
        key=None if reason else (GENERATES, key),
        kind=GENERATES,
        alone_because=reason,
        # No two traces choose the same tokens: each has rows of its own from the start.
        forks=(Fork(0, object()),),
        last_moment=outline.moment("", is_input=False) or 0,
        head=(batch.length - 1, batch.length),
        kept_bytes=_kept_bytes(plan, outline, batch) + num_tokens * state_bytes,
        state_bytes=num_tokens * state_bytes,
    )


def _reason_while_generating(plan: Plan, outline: Outline) -> str:
    for boundary in plan.at_boundary:
        path = boundary.module_path
        if not path:
            return "it reads or writes what the model as a whole takes or gives"
        if boundary.step and outline.modules[path].is_point:
            return f"it looks into attention at {path} after the first step"
    if plan.inputs_seen:
        return "it reads all arguments of a module"
    return ""


class _Scope(NamedTuple):
    """What a trace's nodes mean beside what is written in them."""

    session: Hashable
    head_path: str
    head: tuple[int, int] | None
    invokes: tuple[InvokeRows, ...]

    def of(self, point: HookPoint) -> tuple[Hashable, ...]:
        """Gives what decides which part of the rows a hook point shows."""
        is_head = point.module_path == self.head_path and point.side is Side.OUTPUT
        return self.head if is_head else None, self.invokes if point.invoke else None


def _reason_for_alone(plan: Plan, outline: Outline) -> str:
    if not outline.blocks:
        return "the order of the model's layers is not known"
    for node in plan.nodes.values():
        match node.operation:
            case Skip(module_path=path):
                return f"it skips {path}"
            case Read(hook_point=point) | Write(hook_point=point):
                is_input = point.side is not Side.OUTPUT
                moment = outline.moment(point.module_path, is_input=is_input)
                if moment is None or point.call_index:
                    return f"it is not known when {point} is reached"
                if not outline.shows_rows(point.module_path, is_input=is_input):
                    return f"not all that is in {point} is known"
    for boundary, writers in plan.due_at_boundary.items():
        structures = outline.structures(boundary.module_path, is_input=boundary.is_input)
        points = (getattr(plan.nodes[at].operation, "hook_point", None) for at in writers)
        touched = structures[:1] if boundary.is_input else structures
        if any(point is not None and point.side is Side.INPUTS for point in points) or any(
            not has_rows(structure) for structure in touched
        ):
            return f"it writes to what rows share at {boundary.module_path or 'the model'}"
        if boundary.is_input and _reads_inputs(plan, boundary):
            return f"it writes to the arguments of {boundary.module_path or 'the model'}"
    return ""


def _reads_inputs(plan: Plan, boundary: Boundary) -> bool:
    """Whether a node has all arguments in hand where some are written to."""
    points = (
        getattr(plan.nodes[node_id].operation, "hook_point", None)
        for node_id in plan.at_boundary[boundary]
    )
    return any(point is not None and point.side is Side.INPUTS for point in points)


def _forks(plan: Plan, outline: Outline, scope: _Scope, length: int) -> tuple[Fork, ...]:
    writers: dict[int, list[NodeId]] = {}
    positions: dict[int, int] = {}
    last: dict[int, int] = {}
    for boundary, node_ids in plan.due_at_boundary.items():
        moment = outline.fork_moment(boundary.module_path, is_input=boundary.is_input)
        assert moment is not None  # or else it runs alone
        writers.setdefault(moment, []).extend(node_ids)
        written = outline.moment(boundary.module_path, is_input=boundary.is_input)
        last[moment] = max(last.get(moment, 0), written or 0)
        position = first_written(plan, boundary, node_ids, outline, length)
        positions[moment] = min(positions.get(moment, position), position)
    return tuple(
        Fork(moment, _signature(plan, writers[moment], scope), positions[moment], last[moment])
        for moment in sorted(writers)
    )


def _signature(plan: Plan, writers: Iterable[NodeId], scope: _Scope) -> Hashable:
    """Gives what is equal for traces that make the same writes out of the same values."""
    involved = sorted(closure(writers, plan.predecessors))
    ordinals = {node_id: ordinal for ordinal, node_id in enumerate(involved)}
    return tuple(_canonical_node(plan.nodes[at], plan, ordinals, scope) for at in involved)


def _canonical_node(
    node: Node, plan: Plan, ordinals: Mapping[NodeId, int], scope: _Scope
) -> Hashable:
    operation = node.operation
    described: list[object] = [type(operation).__name__]
    match operation:
        case Read(hook_point=point) | Write(hook_point=point):
            described += [point, *scope.of(point)]
        case Call(name=name, kwargs=kwargs):
            described += [name, tuple(kwargs)]
            if name in RANDOM:
                described += [scope.session, node.id]
        case ModuleCall(module_path=path, kwargs=kwargs):
            described += [path, tuple(kwargs)]
        case Save() | Load() | Keep() | Stop():
            described += [scope.session, node.id]
    number = node.condition
    while number:
        condition = plan.conditions[number - 1]
        described += [condition.is_negated, _canonical(condition.value, ordinals, scope.session)]
        number = condition.parent
    described.append(_canonical(operands(operation), ordinals, scope.session))
    return tuple(described)


def _canonical(value: object, ordinals: Mapping[NodeId, int], session: Hashable) -> Hashable:
    match value:
        case Ref(node_id=node_id) if node_id in ordinals:
            return ("node", ordinals[node_id])
        case Ref(node_id=node_id):
            return ("earlier", session, node_id)
        case list() | tuple():
            items = (_canonical(item, ordinals, session) for item in value)
            return (type(value).__name__, *items)
        case dict():
            pairs = ((key, _canonical(item, ordinals, session)) for key, item in value.items())
            return ("dict", *pairs)
        case slice():
            parts = (value.start, value.stop, value.step)
            return ("slice", *(_canonical(part, ordinals, session) for part in parts))
        case torch.Tensor():
            return ("tensor", id(value))
    return (type(value).__name__, repr(value))


def _kept_bytes(plan: Plan, outline: Outline, batch: Batch) -> int:
    """Estimates the bytes that stay until the trace ends."""
    sizes: dict[NodeId, int] = {}
    saved: set[NodeId] = set()
    for node in plan.nodes.values():
        used = max((sizes.get(at, 0) for at in node.used), default=0)
        sizes[node.id] = _bytes_of(node, used, outline, batch)
        if isinstance(node.operation, Save):
            saved.update(node.used)
    return sum(sizes.get(node_id, 0) for node_id in plan.outliving | saved)


def _bytes_of(node: Node, used: int, outline: Outline, batch: Batch) -> int:
    match node.operation:
        case Read(hook_point=point) if point.module_path in outline.modules:
            is_input = point.side is not Side.OUTPUT
            num_tokens = len(batch.rows) if point.step else sum(map(len, batch.rows))
            return num_tokens * outline.output_bytes(
                point.module_path, is_input=is_input, length=batch.length
            )
        case Call(name=name) if last_word(name) in _REDUCING:
            return 0
        case Call(args=(_, tuple() as key)) if any(isinstance(part, int) for part in key):
            return 0
    return used
