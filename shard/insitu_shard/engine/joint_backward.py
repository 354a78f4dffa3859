"""Takes the gradients of traces that share a pass in one backward pass.

No row depends on another, so the gradients of the sum of the traces' losses are those of each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from insitu_shard.compiler.outline import has_rows
from insitu_shard.engine.gradients import gradients_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from insitu_shard.compiler import Outline
    from insitu_shard.engine.block_run import BlockRun
    from insitu_shard.engine.gradients import Asked
    from insitu_shard.engine.needs import Needs
    from insitu_shard.engine.plan import Plan
    from insitu_shard.engine.ranks import Ranks


def reason_for_own_backward(plan: Plan, needs: Needs, outline: Outline) -> str:
    """Says why a trace's gradients can not be taken with those of others; empty if they can.

    Args:
        plan: the trace's.
        needs: what it needs.
        outline: the model's.
    """
    wanted = plan.differentiated
    if wanted is None:
        return ""
    if wanted.backwards:
        return "it trains parameters"
    if len(wanted.passes) > 1:
        return "it takes gradients in several backward passes"
    if needs.come_before_pass(wanted.gradients):
        return "it uses gradients while its pass runs"
    if plan.inputs_seen:
        return "it takes gradients, and reads all arguments of a module"
    for at in wanted.boundaries:
        structures = outline.structures(at.module_path, is_input=at.is_input)
        touched = structures[:1] if at.is_input else structures
        if not at.module_path or not all(map(has_rows, touched)):
            return f"it takes gradients by what rows share at {at.module_path or 'the model'}"
    return ""


def take_together(runs: Sequence[BlockRun], ranks: Ranks) -> None:
    """Takes the gradients of traces whose pass is over, and runs what waits for them.

    A trace for which the common pass says nothing certain takes its own later: one that fails,
    whose gradients are not finite, or all zero, as where its loss does not depend on the value.

    Args:
        runs: the traces.
        ranks: those that have to do the same.
    """
    waiting = [run for run in runs if run.waits_for_backward]
    if not waiting:
        return
    asked = {place: at for place, run in enumerate(waiting) if (at := run.asked_gradients())}
    missing = ranks.highest([int(place not in asked) for place in range(len(waiting))])
    joint = [place for place, is_missing in enumerate(missing) if not is_missing]
    found = _found([asked[place] for place in joint], ranks) if len(joint) > 1 else []
    if found:
        answers = {place: [found.pop(0) for _ in asked[place].inputs] for place in joint}
        doubtful = ranks.highest([int(not _is_certain(answers[place])) for place in joint])
        for place, is_doubtful in zip(joint, doubtful, strict=True):
            if not is_doubtful:
                waiting[place].answer_gradients(asked[place], answers[place])
    for run in waiting:
        run.end_pass()


def _found(several: Sequence[Asked], ranks: Ranks) -> list[torch.Tensor | None]:
    """Runs the common backward pass; gives nothing if it raises, as one of the traces' own may."""
    try:
        return list(gradients_of(several))
    except Exception as exception:  # noqa: BLE001 - what is wrong with one is to be that one's error
        ranks.check_left_together(exception)
        return []


def _is_certain(gradients: Sequence[torch.Tensor | None]) -> bool:
    return all(at is not None and bool(at.isfinite().all() and at.any()) for at in gradients)
