"""Finds the first position that writes change, and what can not be put together from positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from insitu_shard.engine.graph import Call, ModuleCall, Read, Ref, Side, Write
from insitu_wire.operations import GETITEM

if TYPE_CHECKING:
    from collections.abc import Iterable

    from insitu_proto.v1 import model_pb2
    from insitu_shard.compiler import Outline
    from insitu_shard.engine.graph import Boundary, HookPoint, Node, NodeId
    from insitu_shard.engine.plan import Plan

_SETITEM = "torch.Tensor.__setitem__"
_BATCH, _LENGTH, _OTHER = (1, 0), (0, 1), (0, 0)

View = tuple[list[tuple[int, int]], int]
"""The dimensions of a part of a value, and the first position that is in it."""


def first_written(
    plan: Plan, boundary: Boundary, writers: Iterable[NodeId], outline: Outline, length: int
) -> int:
    """Gives the first position that writes at a boundary may change: 0 if that is not known.

    Args:
        plan: the trace's.
        boundary: the boundary.
        writers: the nodes that write there.
        outline: the model's.
        length: how many positions there are.
    """
    structures = outline.structures(boundary.module_path, is_input=boundary.is_input)
    if not structures:
        return 0
    positions = (_written(plan.nodes[at], plan, structures[0], length) for at in writers)
    return min(positions, default=0)


def _written(node: Node, plan: Plan, structure: model_pb2.StructureSpec, length: int) -> int:
    match node.operation:
        case Call(name=name, args=(Ref(node_id=target), key, *_)) if name == _SETITEM:
            view = _view(target, plan, structure, length)
            part = _indexed(view, key, length) if view else None
            return part[1] if part else 0
    return 0


def _view(
    node_id: NodeId, plan: Plan, structure: model_pb2.StructureSpec, length: int
) -> View | None:
    """Gives what a node's value shows of what was read; None if that is not known."""
    node = plan.nodes.get(node_id)
    match node.operation if node else None:
        case Read(hook_point=point) if point.side is not Side.INPUTS:
            return _whole(structure)
        case Call(name="operator.getitem", args=(Ref(node_id=target), int() as item)) if (
            structure.WhichOneof("kind") in ("tuple", "list") and _is_read(target, plan)
        ):
            items = getattr(structure, str(structure.WhichOneof("kind"))).items
            return _whole(items[item]) if -len(items) <= item < len(items) else None
        case Call(name=name, args=(Ref(node_id=target), key)) if name in GETITEM:
            view = _view(target, plan, structure, length)
            return _indexed(view, key, length) if view else None
    return None


def _is_read(node_id: NodeId, plan: Plan) -> bool:
    node = plan.nodes.get(node_id)
    return node is not None and isinstance(node.operation, Read)


def _whole(structure: model_pb2.StructureSpec) -> View | None:
    if structure.WhichOneof("kind") != "tensor" or not _is_of_tokens(structure):
        return None
    return _dimensions(structure), 0


def _indexed(view: View, key: object, length: int) -> View | None:
    """Gives the part of a view that an index takes; None for an index that is not plain."""
    dimensions, first = view
    keys = list(key) if isinstance(key, tuple) else [key]
    if any(part is Ellipsis for part in keys):
        place = next(place for place, part in enumerate(keys) if part is Ellipsis)
        keys[place : place + 1] = [slice(None)] * (len(dimensions) - len(keys) + 1)
    if len(keys) > len(dimensions):
        return None
    left = dimensions[len(keys) :]
    for part, dimension in reversed(list(zip(keys, dimensions, strict=False))):
        if dimension == _LENGTH:
            first = _first(part, length) or 0
        if not isinstance(part, int | slice | list) or isinstance(part, bool):
            return None
        if not isinstance(part, int):
            # In a part of the positions, places are counted anew.
            left = [dimension if part == slice(None) else _OTHER, *left]
    return left, first


def _first(key: object, length: int) -> int | None:
    match key:
        case bool():
            return None
        case int() if -length <= key < length:
            return key % length
        case list() if key and all(type(at) is int and -length <= at < length for at in key):
            return min(int(at) % length for at in key)
        case slice() if all(
            part is None or type(part) is int for part in (key.start, key.stop, key.step)
        ):
            part = range(length)[key]
            return min(part, default=0)
    return None


def needs_whole_rows(plan: Plan, outline: Outline) -> bool:
    """Whether a trace uses something inside a block that is not simply made of positions."""
    for node in plan.nodes.values():
        match node.operation:
            case Read(hook_point=point) | Write(hook_point=point) if outline.is_in_block(
                point.module_path
            ):
                if point.side is Side.INPUTS or not _is_of_positions(point, outline):
                    return True
            case ModuleCall(module_path=path) if not outline.is_after_blocks(path):
                return True
    return False


def _is_of_positions(point: HookPoint, outline: Outline) -> bool:
    # A point inside of a module has the model compute it in another way, with other attention.
    if outline.modules[point.module_path].class_name in ("Point", "Heads"):
        return False
    is_input = point.side is not Side.OUTPUT
    structures = outline.structures(point.module_path, is_input=is_input)
    return all(map(_is_of_tokens, structures[:1] if is_input else structures))


def _is_of_tokens(structure: model_pb2.StructureSpec) -> bool:
    """Whether all tensors in a value are [batch, length, ...]."""
    match structure.WhichOneof("kind"):
        case "tensor":
            sizes = _dimensions(structure)
            return sizes[:2] == [_BATCH, _LENGTH] and all(at == _OTHER for at in sizes[2:])
        case "tuple" | "list" | "dict" as kind:
            return all(map(_is_of_tokens, getattr(structure, kind).items))
    return True


def _dimensions(structure: model_pb2.StructureSpec) -> list[tuple[int, int]]:
    return [(size.batch_power, size.length_power) for size in structure.tensor.dimensions]
