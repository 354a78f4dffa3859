"""What nodes look at of a tensor is found from how they index it."""

from __future__ import annotations

import pytest
import torch

from insitu_shard.engine.graph import Call, Condition, HookPoint, Node, Read, Ref, Save, Side
from insitu_shard.engine.plan import plan_nodes
from insitu_shard.engine.regions import Region, looked_at, region_of

SHAPE = (2, 7, 12)
READ = Node(1, Read(HookPoint("up_proj", Side.OUTPUT)))


def _index(node_id: int, index: object, *, of: int = 1, condition: int = 0) -> Node:
    call = Call("torch.Tensor.__getitem__", (Ref(of), index), {})
    return Node(node_id, call, condition=condition)


def _save(node_id: int, *, of: int) -> Node:
    return Node(node_id, Save(Ref(of), "saved"))


def _region(*nodes: Node, used_later: tuple[int, ...] = ()) -> Region | None:
    outline = torch.empty(SHAPE, device="meta")
    conditions = [Condition(True, is_negated=False, parent=0)]
    plan = plan_nodes([READ, *nodes], conditions, used_later=used_later)
    return region_of(looked_at(plan, 1, outline), outline)


@pytest.mark.parametrize(
    ("index", "starts", "stops"),
    [
        ((slice(None), -1), (0, 6, 0), (2, 7, 12)),
        (1, (1, 0, 0), (2, 7, 12)),
        ((..., slice(3, 5)), (0, 0, 3), (2, 7, 5)),
        ((slice(None), slice(1, 6, 2), 4), (0, 1, 4), (2, 6, 5)),
        ((None, 0, slice(-2, None)), (0, 5, 0), (1, 7, 12)),
    ],
)
def test_an_index_is_a_region(index: object, starts: object, stops: object) -> None:
    assert _region(_index(2, index), _save(3, of=2)) == Region(starts, stops)  # type: ignore[arg-type]


def test_an_index_of_an_index_is_a_smaller_region() -> None:
    nodes = [_index(2, 1), _index(3, slice(2, 4), of=2), _save(4, of=3)]
    assert _region(*nodes) == Region((1, 2, 0), (2, 4, 12))


def test_of_several_indices_it_is_the_smallest_region_that_has_all() -> None:
    nodes = [_index(2, (0, 1)), _save(3, of=2), _index(4, (0, 3, slice(0, 2))), _save(5, of=4)]
    assert _region(*nodes) == Region((0, 1, 0), (1, 4, 12))


@pytest.mark.parametrize(
    "node",
    [
        _save(3, of=1),
        _index(3, [0, 1]),
        _index(3, Ref(2)),
        _index(3, (slice(None), 99)),
        Node(3, Call("torch.Tensor.sum", (Ref(1),), {})),
        _index(3, 0, condition=1),
    ],
)
def test_what_is_not_known_to_be_a_part_is_the_whole(node: Node) -> None:
    region = _region(_index(2, 0), node)
    assert region is None or region.is_all_of(SHAPE)


def test_what_later_steps_use_is_the_whole() -> None:
    region = _region(_index(2, 0), _save(3, of=2), used_later=(1,))
    assert region is not None
    assert region.is_all_of(SHAPE)


@pytest.mark.parametrize("nodes", [[], [_index(2, (slice(None), slice(5, 5))), _save(3, of=2)]])
def test_what_nobody_looks_at_is_empty(nodes: list[Node]) -> None:
    region = _region(*nodes)
    assert region is not None
    assert region.is_empty
