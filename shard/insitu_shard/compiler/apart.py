"""Says why traces that may each share a pass do not share one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from insitu_shard.compiler.facts import GRADIENTS, go_together

if TYPE_CHECKING:
    from collections.abc import Sequence

    from insitu_shard.compiler.facts import TraceFacts
    from insitu_shard.compiler.passes import Pass


def reason_for_apart(trace: TraceFacts, shared: Pass, numbers: Sequence[int]) -> str:
    """Says why a trace is not in a pass that was planned when it could have run.

    Args:
        trace: a trace that may share passes.
        shared: a pass of such traces.
        numbers: the numbers of its traces, for people.
    """
    others = zip(shared.traces, numbers, strict=True)
    # Lengths that go together are counted from the shortest.
    other, number = min(others, key=lambda pair: pair[0].length)
    if trace.kind != other.kind:
        return f"it {_does(trace)}, and trace {number} {_does(other)}"
    fit = trace.fits_other_lengths and other.fits_other_lengths
    if trace.key == other.key or (fit and go_together(trace.length, other.length)):
        return f"with trace {number} the pass would be larger than it may be"
    if trace.length == other.length:
        return f"of it and trace {number} one has rows of several lengths"
    lengths = f"its prompt has {trace.length} tokens, and that of trace {number} {other.length}"
    may_pad = trace.kind != GRADIENTS
    return f"{lengths}; with padding=True they may share a pass" if may_pad else lengths


def _does(trace: TraceFacts) -> str:
    return trace.kind or "is one forward pass"
