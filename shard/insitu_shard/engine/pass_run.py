"""Runs a pass that the compiler has planned, and sees to it that one trace harms no other."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from insitu_shard.compiler import Limits, Pass, plan_passes
from insitu_shard.engine.decode_run import run_next_step
from insitu_shard.engine.interleaver import Interleaver
from insitu_shard.engine.joint_backward import take_together
from insitu_shard.engine.pass_memory import measured
from insitu_shard.engine.pending import Pending, RanPass
from insitu_shard.engine.row_map import RowMap

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet

    from insitu_shard.engine.block_run import BlockRun
    from insitu_shard.engine.memory import StorageKey

_log = logging.getLogger(__name__)


def run_next_pass(pending: Sequence[Pending], limits: Limits) -> RanPass | None:
    """Runs the pass of the first of the traces, with those that fit into it.

    Args:
        pending: traces that may run now, of one or more sessions, the most urgent first.
        limits: how large the pass may be.

    Returns:
        The pass; None if the first of the traces needs none.
    """
    model = pending[0].trace.model
    if pending[0].trace.facts is None:
        return None
    if pending[0].trace.generates:
        return run_next_step(pending, limits)
    candidates = [
        at
        for at in pending
        if at.trace.model is model and at.trace.facts is not None and not at.trace.generates
    ]
    facts = [at.trace.facts for at in candidates if at.trace.facts is not None]
    limits = model.pass_memory.within(limits)
    plan = next(plan_passes(facts, model.outline, limits))
    members = [candidates[place] for place in plan.members]
    _run(plan, members)
    return RanPass(plan, members)


def _run(plan: Pass, members: Sequence[Pending]) -> None:
    model = members[0].trace.model
    with measured(model.device, plan.num_bytes) as peak:
        has_run = _run_once(plan, members)
        if not has_run and plan.is_merged and plan.is_packed and not plan.has_own_lengths:
            has_run = _run_once(replace(plan, has_whole_rows=True), members)
        if not has_run:
            for member, facts in zip(members, plan.traces, strict=True):
                single = Pass((0,), (facts,), plan.outline)
                if len(members) == 1 or not _run_once(single, [member]):
                    _run_alone(member, plan)
    for member in members:
        member.trace.has_run = True
    highest = _agree(members, peak.num_bytes)
    if plan.is_merged:
        model.pass_memory.learn(estimated=plan.num_bytes, measured=highest)


def _run_alone(member: Pending, plan: Pass) -> None:
    """Runs a trace as if there were no compiler; what the model raises now is the trace's error."""
    member.trace.be_alone("its pass failed")
    facts = member.trace.facts
    assert facts is not None
    _run_once(Pass((0,), (facts,), plan.outline), [member])


def _run_once(plan: Pass, members: Sequence[Pending]) -> bool:
    """Runs a pass; False if it has to be run in another way, for it failed as a whole."""
    model = members[0].trace.model
    runs = [member.trace.begin(member.is_there) for member in members]
    for run in runs:
        run.start()
    if not plan.is_merged:
        trace = members[0].trace
        Interleaver(model, runs, checkpoints=trace.checkpoints).run(trace.forward_inputs())
        return True
    rows = RowMap(model, plan, runs)
    checkpoints = any(member.trace.checkpoints for member in members)
    interleaver = Interleaver(model, runs, rows, checkpoints=checkpoints)
    interleaver.run(model.inputs_of_rows(rows.rows))
    if interleaver.raised is not None:
        _log.warning("a pass over %d traces failed: %r", len(members), interleaver.raised)
    else:
        take_together(runs, model.ranks)
    _part(runs, interleaver.shown)
    return interleaver.raised is None


def _part(runs: Sequence[BlockRun], shown: AbstractSet[StorageKey]) -> None:
    """Gives traces that have seen the same rows memory of their own, for it may be written to."""
    taken: frozenset[StorageKey] = frozenset()
    for run in runs if len(runs) > 1 else ():
        run.part_from(taken)
        taken |= run.memory & shown


def _agree(members: Sequence[Pending], num_bytes: int) -> int:
    """Has all ranks know which traces failed on any of them, and the most memory that one took."""
    blocks = [block for member in members if (block := member.trace.block) is not None]
    failed = [int(block.error is not None) for block in blocks]
    *failed, highest = members[0].trace.model.ranks.highest([*failed, num_bytes])
    for block, has_failed in zip(blocks, failed, strict=True):
        block.has_failed = bool(has_failed)
    return highest
