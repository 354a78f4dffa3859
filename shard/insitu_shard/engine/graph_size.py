"""Estimates, before a pass runs, what its graph keeps in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from insitu_shard.compiler import Outline
    from insitu_shard.engine.plan import Plan


def check_graph(plan: Plan, size: int, *, checkpoints: bool, max_bytes: int) -> None:
    """Refuses a trace whose graph would take too much memory.

    Args:
        plan: the trace's.
        size: what its graph keeps, as `graph_bytes` estimates it.
        checkpoints: whether decoder layers keep their inputs alone.
        max_bytes: what the graph may take.

    Raises:
        CapacityError: OUT_OF_MEMORY, at the line of the first gradient.
    """
    if size <= max_bytes:
        return
    assert plan.differentiated is not None
    first = min({*plan.differentiated.gradients, *plan.differentiated.backwards})
    fewer = "" if checkpoints else "open the session with checkpoint=True, or "
    raise error(
        Reason.OUT_OF_MEMORY,
        f"the graph of this trace would keep about {size:,} bytes, and may keep at most "
        f"{max_bytes:,}; {fewer}run fewer or shorter prompts in one trace, or take gradients by "
        "values of later layers",
        location=plan.nodes[first].location,
        bytes=size,
        maxBytes=max_bytes,
    )


def graph_bytes(plan: Plan, outline: Outline, *, num_tokens: int, checkpoints: bool) -> int:
    """Estimates what the graph of a trace keeps; 0 if it has none, or nothing is known."""
    if plan.differentiated is None or not outline.blocks:
        return 0
    begins = plan.differentiated.boundaries | plan.due_at_boundary.keys()
    moments = [outline.moment(at.module_path, is_input=at.is_input) for at in begins]
    first = min((moment // 2 for moment in moments if moment is not None), default=0)
    num_blocks = max(len(outline.blocks) - max(first - 1, 0), 0)
    if checkpoints:
        hidden = outline.output_bytes(outline.blocks[0], is_input=False)
        per_token = num_blocks * hidden + outline.block_bytes
    else:
        per_token = num_blocks * outline.block_bytes
    return num_tokens * per_token
