"""Decides which traces share a forward pass."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from math import ceil
from typing import TYPE_CHECKING

from insitu_shard.compiler.facts import go_together
from insitu_shard.compiler.lanes import LaneTree
from insitu_shard.compiler.prefixes import share_prefixes

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Sequence

    from insitu_shard.compiler.facts import TraceFacts
    from insitu_shard.compiler.lanes import Lane
    from insitu_shard.compiler.outline import Outline

# Queries, keys, values and what comes of them.
_WHOLE_STATES = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a pass may be. A trace that is larger alone runs alone."""

    max_tokens: int = 8192
    """Tokens that go through a layer at once, over all rows."""
    max_bytes: int = 2 * 1024**3
    """Estimate of the memory that the pass takes beside the weights."""
    max_graph_bytes: int = 8 * 1024**3
    """Estimate of the memory that a trace which takes gradients keeps for them."""


@dataclass(frozen=True)
class Pass:
    """One forward pass: a plan, and what people want to know of it."""

    members: tuple[int, ...]
    """Places of its traces among those that were planned, in order."""
    traces: tuple[TraceFacts, ...]
    """Its traces."""
    outline: Outline

    has_whole_rows: bool = False
    """Whether every lane is to compute all of its positions."""

    @cached_property
    def tree(self) -> LaneTree:
        """Which rows the traces share."""
        tree = LaneTree(self.traces)
        if self._may_share_prefixes:
            share_prefixes(tree.lanes, num_blocks=len(self.outline.blocks))
        return tree

    @property
    def _may_share_prefixes(self) -> bool:
        return (
            self.outline.shares_prefixes
            and self.is_merged
            and not self.has_whole_rows
            and any(fork.position for trace in self.traces for fork in trace.forks)
            and not any(trace.needs_whole_rows for trace in self.traces)
            # Padded, the same position is not the same token.
            and (self.has_own_lengths or len(self._lengths) == 1)
        )

    @cached_property
    def _lengths(self) -> frozenset[int]:
        return frozenset(len(row) for trace in self.traces for row in trace.rows)

    @cached_property
    def has_own_lengths(self) -> bool:
        """Whether rows differ in length, and each has its own positions only."""
        return len(self._lengths) > 1 and all(trace.fits_other_lengths for trace in self.traces)

    @cached_property
    def is_packed(self) -> bool:
        """Whether its rows do not have all positions, and go through the blocks as tokens."""
        return self.has_own_lengths or any(lane.start for lane in self.tree.lanes)

    def padding(self, trace: TraceFacts) -> int:
        """Gives the positions before the longest row of a trace begins."""
        return 0 if self.has_own_lengths else self.length - trace.length

    @property
    def is_merged(self) -> bool:
        """Whether its rows are planned: a trace that runs alone may do anything."""
        return self.traces[0].key is not None

    @cached_property
    def length(self) -> int:
        """Positions of each row."""
        return max(trace.length for trace in self.traces)

    @cached_property
    def rows_of_blocks(self) -> tuple[int, ...]:
        """How many rows go through each block."""
        num_blocks = len(self.outline.blocks)
        if not self.is_merged:
            return (self.traces[0].num_rows,) * num_blocks
        return _sums(
            ((lane.blocks(num_blocks), len(lane.rows)) for lane in self.tree.lanes), num_blocks
        )

    @cached_property
    def tokens_of_blocks(self) -> tuple[int, ...]:
        """How many tokens go through each block."""
        num_blocks = len(self.outline.blocks)
        if not self.is_merged:
            return (self.traces[0].num_rows * self.length,) * num_blocks
        tokens = (
            (lane.blocks(num_blocks), len(lane.rows) * (self._positions(lane) - lane.start))
            for lane in self.tree.lanes
        )
        return _sums(tokens, num_blocks)

    def _positions(self, lane: Lane) -> int:
        return lane.length if self.has_own_lengths else self.length

    @property
    def num_rows(self) -> int:
        """Rows at the widest place."""
        return max(self.rows_of_blocks, default=self.traces[0].num_rows)

    @property
    def num_tokens(self) -> int:
        """Tokens at the widest place."""
        return max(self.tokens_of_blocks, default=self.traces[0].num_rows * self.length)

    @property
    def layers_run(self) -> int:
        """Decoder layers that run, counted once for as many tokens as a row has."""
        num_blocks = len(self.outline.blocks)
        if not self.is_merged:
            return self.traces[0].num_rows * num_blocks
        shares = Counter[int]()
        for lane in self.tree.lanes:
            length = self._positions(lane)
            shares[length] += len(lane.rows) * (length - lane.start) * len(lane.blocks(num_blocks))
        return ceil(sum(Fraction(tokens, length) for length, tokens in shares.items()))

    @property
    def layers_saved(self) -> int:
        """Decoder layers that one pass a trace would run beside."""
        return sum(trace.num_rows for trace in self.traces) * len(self.outline.blocks) - (
            self.layers_run
        )

    @cached_property
    def num_bytes(self) -> int:
        """Estimate of the memory that it takes beside the weights."""
        head_bytes = self.outline.output_bytes(self.outline.head_path, is_input=False) if (
            self.outline.head_path
        ) else 0  # fmt: skip
        head = sum(
            (trace.head[1] - trace.head[0]) * trace.num_rows for trace in self.traces if trace.head
        )
        kept = sum(trace.kept_bytes for trace in self.traces)
        return (
            self.num_tokens * self.outline.block_bytes + self._row_bytes + head * head_bytes + kept
        )

    @property
    def _row_bytes(self) -> int:
        """Estimates what the attention puts together for whole rows out of several lanes."""
        if not self.is_merged or not self.is_packed:
            return 0
        hidden = self.outline.output_bytes(self.outline.blocks[0], is_input=False)
        return _WHOLE_STATES * hidden * self.num_rows * self.length

    @cached_property
    def costs(self) -> tuple[int, ...]:
        """What each trace asks for: its tokens, times the moments that they go through."""
        last = 2 * len(self.outline.blocks) + 1
        return tuple(
            sum(map(len, trace.rows)) * (1 + (last if trace.key is None else trace.last_moment))
            for trace in self.traces
        )

    def fits(self, limits: Limits) -> bool:
        """Whether it is within the limits."""
        return self.num_tokens <= limits.max_tokens and self.num_bytes <= limits.max_bytes


def plan_passes(traces: Sequence[TraceFacts], outline: Outline, limits: Limits) -> Iterator[Pass]:
    """Yields passes that run all traces, in the order of their first traces.

    Args:
        traces: traces of one model that may all run now.
        outline: the model's.
        limits: how large a pass may be.
    """
    groups: dict[Hashable, list[int]] = {}
    for place, trace in enumerate(traces):
        groups.setdefault(("alone", place) if trace.key is None else trace.key, []).append(place)
    for places in _joined(list(groups.values()), traces):
        yield from _split(places, traces, outline, limits)


def _joined(groups: list[list[int]], traces: Sequence[TraceFacts]) -> Iterable[list[int]]:
    """Joins groups whose rows go together, each with its own positions: lengths close enough."""
    joined: dict[Hashable, list[int]] = {}
    fitting = [all(traces[place].fits_other_lengths for place in places) for places in groups]
    lengths = {
        traces[places[0]].length for places, fits in zip(groups, fitting, strict=True) if fits
    }
    shortest = _shortest(sorted(lengths))
    for number, (places, fits) in enumerate(zip(groups, fitting, strict=True)):
        key = ("lengths from", shortest[traces[places[0]].length]) if fits else number
        joined.setdefault(key, []).extend(places)
    return map(sorted, joined.values())


def _shortest(lengths: Sequence[int]) -> dict[int, int]:
    """Gives for each length the shortest that goes with it."""
    found: dict[int, int] = {}
    first = 0
    for length in lengths:
        first = first if first and go_together(first, length) else length
        found[length] = first
    return found


def _split(
    places: list[int], traces: Sequence[TraceFacts], outline: Outline, limits: Limits
) -> Iterator[Pass]:
    candidate = Pass(tuple(places), tuple(traces[place] for place in places), outline)
    if len(places) == 1 or candidate.fits(limits):
        yield candidate
        return
    half = len(places) // 2
    yield from _split(places[:half], traces, outline, limits)
    yield from _split(places[half:], traces, outline, limits)


def _sums(runs: Iterable[tuple[range, int]], num_blocks: int) -> tuple[int, ...]:
    """Adds up, for each block, what runs through it."""
    steps = [0] * (num_blocks + 2)
    for blocks, number in runs:
        if blocks:
            steps[blocks.start] += number
            steps[blocks.stop] -= number
    return tuple(accumulate(steps[1 : num_blocks + 1]))
