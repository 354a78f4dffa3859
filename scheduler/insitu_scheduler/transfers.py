"""Tells which values move between the groups of a session that uses several models. Pure."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from insitu_scheduler.refusals import unsupported
from insitu_wire.operations import is_in_place, writes_into_container
from insitu_wire.steps import all_steps, references_of, trained_by

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from insitu_proto.v1.intervention_pb2 import Node
    from insitu_proto.v1.session_pb2 import Session, Step
    from insitu_scheduler.segments import SegmentRange


@dataclass(frozen=True, slots=True)
class Transfers:
    """What a segment needs of other groups, and what is needed after it."""

    imports: Mapping[str, tuple[int, ...]]
    """Ids of the values that it uses, by the model whose group has them."""
    kept: tuple[int, ...]
    """Ids of the values that later segments use."""


def plan_transfers(session: Session, segments: Sequence[SegmentRange]) -> list[Transfers]:
    """Says for each segment which values move before it runs.

    A value is where it was last written to: its maker's group, or that of a later writer.

    Raises:
        VersionError: UNSUPPORTED_FEATURE, if a tensor of one model's group is written to in place
            on another's.
    """
    owners: dict[int, str] = {}
    planned: list[Transfers] = []
    used_by_segment = [set(_used(session, segment)) for segment in segments]
    for number, segment in enumerate(segments):
        model = segment.model or ""
        imports: defaultdict[str, list[int]] = defaultdict(list)
        for node_id in sorted(used_by_segment[number]):
            if owners.get(node_id, model) != model:
                imports[owners[node_id]].append(node_id)
        for node_id in _written(session, segment, owners, model):
            owners[node_id] = model
        later = set[int]().union(*used_by_segment[number + 1 :])
        kept = tuple(sorted(later & owners.keys()))
        planned.append(Transfers({key: tuple(ids) for key, ids in imports.items()}, kept))
    return planned


def _used(session: Session, segment: SegmentRange) -> Iterator[int]:
    for step in _steps(session, segment):
        yield from references_of(step)


def _written(
    session: Session, segment: SegmentRange, owners: Mapping[int, str], model: str
) -> Iterator[int]:
    """Yields the values that a segment makes or writes to."""
    for step in _steps(session, segment):
        if step.HasField("loop"):
            yield step.loop.item_node_id
        for node in (*step.trace.nodes, *step.compute.nodes):
            yield node.id
            for trained in trained_by(node):
                if owners.get(trained, model) != model:
                    raise unsupported(
                        f"node {node.id} trains node {trained} on {model!r}, and it is where "
                        f"{owners[trained]!r} runs, which made it; make parameters and optimizers "
                        "after the first trace of the model that trains them"
                    )
            if node.HasField("assign"):
                yield node.assign.node_id
            elif (target := _target(node)) is not None:
                is_elsewhere = owners.get(target, model) != model
                if is_elsewhere and not writes_into_container(node.call.name):
                    raise unsupported(
                        f"node {node.id} writes in place into a tensor of another model's trace, "
                        "which is a copy here; write into its .clone()"
                    )
                yield target


def _target(node: Node) -> int | None:
    """Gives what a node writes to in place, if it does."""
    if node.HasField("call") and is_in_place(node.call.name) and node.call.args:
        first = node.call.args[0]
        return first.reference.node_id if first.HasField("reference") else None
    return None


def _steps(session: Session, segment: SegmentRange) -> Iterator[Step]:
    return all_steps(session.steps[segment.start : segment.stop])
