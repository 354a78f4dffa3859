"""Generations that begin one after another come to share their steps: who is behind catches up."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from insitu_shard.compiler import Limits
    from insitu_shard.engine.decode_run import DecodeGroup


def group_to_step(turn: DecodeGroup, groups: Sequence[DecodeGroup], limits: Limits) -> DecodeGroup:
    """Gives the group that takes a step in the turn of one: that, or one that catches up with it.

    Two that never meet take turns to the end. So one that waits until another is where it is ends
    no later for it, as long as they then have more steps in common than it has waited for.

    Args:
        turn: the group whose turn it is.
        groups: all that generate.
        limits: how large a pass may be.
    """
    behind = [
        group
        for group in groups
        if 0 < turn.num_steps - group.num_steps < _steps_in_common(turn, group)
        and turn.may_take_in(group, limits)
    ]
    return max(behind, key=lambda group: group.num_steps, default=turn)


def meet(stepped: DecodeGroup, groups: Sequence[DecodeGroup], limits: Limits) -> None:
    """Has a group go on with another that is where it is now, if there is one."""
    for group in groups:
        is_there = group is not stepped and group.num_steps == stepped.num_steps
        if is_there and group.may_take_in(stepped, limits):
            group.take_in(stepped)
            return


def _steps_in_common(ahead: DecodeGroup, behind: DecodeGroup) -> int:
    """Gives how many steps two can share at most once they have met."""
    return min(ahead.max_steps, behind.max_steps) - ahead.num_steps
