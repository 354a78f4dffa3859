"""Names of saved values, by which other processes and files know them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from insitu_wire.steps import all_steps

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from insitu_proto.v1.intervention_pb2 import Node
    from insitu_proto.v1.session_pb2 import Step


def name_saves(steps: Iterable[Step]) -> None:
    """Gives every save of a session a name of its own; its user's variable where it has one."""
    nodes = list(saves(steps))
    for node, name in zip(nodes, unique_names([node.save.name for node in nodes]), strict=True):
        node.save.name = name


def saves(steps: Iterable[Step]) -> Iterator[Node]:
    """Yields the save nodes of steps, in order."""
    for step in all_steps(steps):
        nodes = (*step.trace.nodes, *step.compute.nodes)
        yield from (node for node in nodes if node.HasField("save"))


def by_name(saved: Iterable[tuple[str, object]]) -> dict[str, Any]:
    """Gives saved values by their names, also where another client left these as they were."""
    pairs = list(saved)
    names = unique_names(name for name, _ in pairs)
    return {name: value for name, (_, value) in zip(names, pairs, strict=True)}


def unique_names(names: Iterable[str]) -> list[str]:
    """Makes names unique: x, x_2, x_3; what has no name is value_1, value_2.

    A user's own x_2 keeps its name, and the second x is x_3 then.
    """
    names = list(names)
    taken = set(names)
    used: set[str] = set()
    numbers: dict[str, int] = {}
    unique: list[str] = []
    for name in names:
        if name and name not in used:
            used.add(name)
            unique.append(name)
            continue
        number = numbers.get(name, 2 if name else 1)
        while (numbered := f"{name or 'value'}_{number}") in taken:
            number += 1
        numbers[name] = number + 1
        taken.add(numbered)
        unique.append(numbered)
    return unique
