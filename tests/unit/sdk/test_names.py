"""Names of saved values: the users' own, each once."""

from __future__ import annotations

import pytest

from insitu._names import name_saves, saves, unique_names
from insitu_proto.v1.session_pb2 import Branch, Loop, Session, Step
from support.fake_shard import read, save, trace


@pytest.mark.parametrize(
    ("names", "unique"),
    [
        (["x", "y"], ["x", "y"]),
        (["x", "x", "x"], ["x", "x_2", "x_3"]),
        (["", "x", ""], ["value_1", "x", "value_2"]),
        (["x", "x", "x_2"], ["x", "x_3", "x_2"]),
        (["", "value_1"], ["value_2", "value_1"]),
    ],
)
def test_the_users_names_stay_and_the_others_are_numbered(
    names: list[str], unique: list[str]
) -> None:
    assert unique_names(names) == unique
    assert unique_names(unique) == unique


def test_saves_inside_loops_and_branches_are_named_too() -> None:
    def saving(node_id: int) -> Step:
        return trace(read(node_id), save(node_id + 1, of=node_id))

    session = Session(
        steps=[
            saving(1),
            Step(loop=Loop(steps=[saving(3)])),
            Step(branch=Branch(steps=[saving(5)], else_steps=[saving(7)])),
        ]
    )
    name_saves(session.steps)
    assert [(node.id, node.save.name) for node in saves(session.steps)] == [
        (2, "value_1"),
        (4, "value_2"),
        (6, "value_3"),
        (8, "value_4"),
    ]
