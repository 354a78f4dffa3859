"""Which lanes need not compute their first positions: those are as in a lane that they fork from.

In a causal decoder a write at position p changes nothing before p, in no later layer. So a lane
that forks for it begins at p, if the lane that it forks from stays for as long as its keys and
values are read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from insitu_shard.compiler.lanes import Lane

# What is gathered for the attention costs about as much as a tenth of a layer.
_MIN_SHARE = 1 / 8

FAMILIES = frozenset(
    {"gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "opt", "phi", "qwen3"}
)
"""Types of models that are tested so: but for its attention, a block works on each token alone."""


def share_prefixes(lanes: Sequence[Lane], *, num_blocks: int) -> None:
    """Has lanes begin where they differ from their source, where that saves enough.

    Args:
        lanes: the lanes of a pass, parents before children; those that others need live longer.
        num_blocks: decoder layers of the model.
    """
    before = [lane.last for lane in lanes]
    whole = _cost(lanes, num_blocks)
    # After the last block nobody reads keys.
    ends = [min(lane.last, 2 * num_blocks) for lane in lanes]
    until = list(ends)
    children: dict[int, list[int]] = {}
    for number in reversed(range(len(lanes))):
        parent = lanes[number].parent
        if parent is not None:
            until[parent] = max(until[parent], until[number])
            children.setdefault(parent, []).append(number)
    for number, lane in enumerate(lanes):
        forks = children.get(number, [])
        saved = sum(
            max(lanes[fork].differs_from - lane.start, 0) * max(ends[fork] - lanes[fork].first, 0)
            for fork in forks
        )
        source, start, length = lane.source, lane.start, lane.length
        if saved > (length - start) * max(until[number] - lane.last, 0):
            lane.last = max(lane.last, until[number])
            source, start = number, length
        for fork in forks:
            lanes[fork].start = min(start, lanes[fork].differs_from)
            lanes[fork].source = source if lanes[fork].start else None
    if whole - _cost(lanes, num_blocks) < _MIN_SHARE * whole:
        for lane, last in zip(lanes, before, strict=True):
            lane.start, lane.source, lane.last = 0, None, last


def _cost(lanes: Sequence[Lane], num_blocks: int) -> int:
    """Counts tokens, once for each block."""
    return sum(
        len(lane.rows) * (lane.length - lane.start) * len(lane.blocks(num_blocks)) for lane in lanes
    )
