"""Runs traces that generate: each step is a pass, and traces of one length share it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from insitu_shard.compiler import Limits, Pass, plan_passes
from insitu_shard.engine.catching_up import group_to_step, meet
from insitu_shard.engine.decode_rows import DecodeRows
from insitu_shard.engine.failures import ends_misfit, model_raised
from insitu_shard.engine.graph import EndGeneration
from insitu_shard.engine.inputs import ForwardInputs, InvokeRows
from insitu_shard.engine.interleaver import Interleaver
from insitu_shard.engine.made import Made
from insitu_shard.engine.pass_memory import measured
from insitu_shard.engine.pending import Pending, RanPass
from insitu_wire.errors import Error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from insitu_shard.compiler import TraceFacts
    from insitu_shard.engine.block_run import BlockRun
    from insitu_shard.engine.choosing import Chooser
    from insitu_shard.engine.model import LoadedModel
    from insitu_shard.engine.trace_run import TraceRun

_log = logging.getLogger(__name__)


def run_next_step(pending: Sequence[Pending], limits: Limits) -> RanPass | None:
    """Runs the next step of the first of some traces, which generates.

    Args:
        pending: traces that may run now; those that have not begun may begin with the first.
        limits: how large the pass may be.

    Returns:
        The step, of the trace or of others that catch up with it; None if the trace has failed
        before its first.
    """
    first = pending[0].trace
    if first.decoding is None:
        try:
            first.decoding = _begin(pending, limits)
        except Error as err:
            first.fail(err)
            return None
    running = {id(at.trace.decoding): at.trace.decoding for at in pending}
    groups = [group for group in running.values() if group is not None]
    stepped = group_to_step(first.decoding, groups, limits)
    ran = stepped.step()
    meet(stepped, groups, limits)
    return ran


def _begin(pending: Sequence[Pending], limits: Limits) -> DecodeGroup:
    model = pending[0].trace.model
    candidates = [
        at
        for at in pending
        if at.trace.model is model and at.trace.generates and at.trace.decoding is None
    ]
    facts = [at.trace.facts for at in candidates if at.trace.facts is not None]
    candidates = [at for at in candidates if at.trace.facts is not None]
    plan = next(plan_passes(facts, model.outline, model.pass_memory.within(limits)))
    return DecodeGroup([candidates[place] for place in plan.members], plan)


@dataclass(slots=True)
class _Member:
    """A trace that generates."""

    pending: Pending
    run: BlockRun
    chooser: Chooser
    is_over: bool = False

    @property
    def trace(self) -> TraceRun:
        return self.pending.trace

    @property
    def num_rows(self) -> int:
        return len(self.chooser.token_ids)


class DecodeGroup:
    """Traces that generate together: they share passes, and each has an end of its own."""

    def __init__(self, pending: Sequence[Pending], plan: Pass) -> None:
        """Makes the inputs of the first step.

        Args:
            pending: the traces.
            plan: the first step's pass.

        Raises:
            Error: the trace, if it is one alone, can not generate so.
        """
        first = pending[0].trace
        self._model: LoadedModel = first.model  # type: ignore[assignment]
        self._plan = plan
        self._num_steps = 0
        self._facts = {id(at.trace): facts for at, facts in zip(pending, plan.traces, strict=True)}
        choosers = [at.trace.chooser() for at in pending]
        self._state = self._model.decode_state([at.trace.batch for at in pending])
        lengths = {len(row) for facts in plan.traces for row in facts.rows}
        self._prompt_length = lengths.pop() if plan.is_merged and len(lengths) == 1 else None
        self._num_bytes = sum(facts.state_bytes for facts in plan.traces)
        self._model.pass_memory.hold(self._num_bytes)
        self._members = [
            _Member(at, at.trace.begin(at.is_there), chooser)
            for at, chooser in zip(pending, choosers, strict=True)
        ]
        for member in self._members:
            member.trace.decoding = self
            member.run.start()

    @property
    def num_steps(self) -> int:
        """How many steps it has taken."""
        return self._num_steps

    @property
    def max_steps(self) -> int:
        """How many steps it takes at most."""
        return max((member.trace.max_new_tokens for member in self._members), default=0)

    def may_take_in(self, other: DecodeGroup, limits: Limits) -> bool:
        """Whether another's traces may share its passes, once they have come as far.

        All prompts must have one length: then no row has positions that another lacks.
        """
        if not (self._members and other._members) or self._model is not other._model:
            return False
        return (
            self._prompt_length == other._prompt_length is not None
            and self._state.can_grow
            and other._state.can_grow
            and self._pass_of([*self._step_facts(), *other._step_facts()]).fits(limits)
        )

    def take_in(self, other: DecodeGroup) -> None:
        """Goes on with the traces of a group that is where it is; of that nothing is left."""
        self._state.grow(other._state)
        self._facts |= other._facts
        self._num_bytes += other._num_bytes
        for member in other._members:
            member.trace.decoding = self
        self._members += other._members
        other._members, other._num_bytes = [], 0

    def leave(self, trace: TraceRun) -> None:
        """Goes on without a trace that nobody waits for any more."""
        for member in self._members:
            member.is_over = member.is_over or member.trace is trace
        self._part_with_those_who_are_over()

    def step(self) -> RanPass:
        """Runs one step of all its traces."""
        ran = RanPass(self._step_plan(), [member.pending for member in self._members])
        with measured(self._model.device, ran.plan.num_bytes) as peak:
            outputs, raised = self._run()
        if raised is not None and len(self._members) > 1:
            _log.warning("a step of %d traces failed: %r", len(self._members), raised)
            self._start_over_alone()
            return ran
        tokens = None if outputs is None else self._choose(outputs)
        tokens = self._agree(tokens, peak.num_bytes)
        self._num_steps += 1
        if tokens is not None:
            self._take(outputs, tokens)
        self._end_some(has_tokens=tokens is not None)
        return ran

    def _run(self) -> tuple[Any, Exception | None]:
        """Runs the pass; gives what the model returned, or None, and what it raised."""
        step, runs = self._num_steps, [member.run for member in self._members]
        for member in self._members:
            member.run.begin_step(step, member.trace.batch.at_step(step))
        rows, length = self._rows()
        shown = None if len(runs) == 1 else DecodeRows(self._model, runs, rows, length)
        inputs = self._state.inputs(is_first=not step, has_all_logits=self._sees_head(runs))
        interleaver = Interleaver(self._model, runs, shown, step=step)
        outputs = interleaver.run(ForwardInputs((), inputs))
        return outputs, interleaver.raised

    def _rows(self) -> tuple[list[InvokeRows], int]:
        """Gives where each trace's rows are in the pass, and how long all are."""
        lengths = [member.trace.batch.at_step(self._num_steps).length for member in self._members]
        rows, first = [], 0
        for member, length in zip(self._members, lengths, strict=True):
            rows.append(InvokeRows(first, member.num_rows, max(lengths) - length, length))
            first += member.num_rows
        return rows, max(lengths)

    def _sees_head(self, runs: Sequence[BlockRun]) -> bool:
        head = self._model.outline.head_path
        return not self._num_steps and any(
            not head or at.module_path in ("", head)
            for run in runs
            for at in run.plan.boundaries.get(0, ())
        )

    def _choose(self, outputs: Any) -> torch.Tensor:
        """Gives the next token of each row of all traces."""
        logits = self._model.brought(outputs.logits)[:, -1]
        tokens = []
        for member, own in zip(
            self._members, logits.split([m.num_rows for m in self._members]), strict=True
        ):
            try:
                tokens.append(member.chooser.choose(own))
            except RuntimeError as exception:  # no number among the logits
                member.run.error = member.run.error or model_raised(exception)
                tokens.append(torch.zeros_like(member.chooser.token_ids[:, 0]))
        return torch.cat(tokens)

    def _agree(self, tokens: torch.Tensor | None, num_bytes: int) -> torch.Tensor | None:
        """Has all ranks know which traces failed on any of them, and go on with the same tokens."""
        failed = [int(member.run.error is not None) for member in self._members]
        mine = [] if tokens is None else tokens.tolist()
        if self._model.ranks.size > 1:
            agreed = self._model.ranks.highest([*failed, num_bytes, *mine])
            failed, mine = agreed[: len(failed)], agreed[len(failed) + 1 :]
            tokens = None if tokens is None else torch.tensor(mine, device=tokens.device)
        for member, has_failed in zip(self._members, failed, strict=True):
            member.run.has_failed = bool(has_failed)
        return tokens

    def _take(self, outputs: Any, tokens: torch.Tensor) -> None:
        self._state.took(outputs, tokens)
        for member, own in zip(
            self._members, tokens.split([m.num_rows for m in self._members]), strict=True
        ):
            member.chooser.take(own)
            member.trace.take_tokens(self._num_steps - 1, own)
            try:
                _end_rows(member)
            except Error as err:
                member.run.error = member.run.error or err

    def _end_some(self, *, has_tokens: bool) -> None:
        """Ends the traces that get no further token, or need none."""
        ended = []
        for member in self._members:
            run = member.run
            has_failed = run.has_failed or run.error is not None
            if not (has_failed or run.needs_no_more or member.chooser.is_over or not has_tokens):
                continue
            member.is_over = True
            ended.append(member)
            if not has_failed and not run.needs_no_more:
                batch = member.trace.batch
                run.end_steps(Made(member.chooser.token_ids, self._num_steps, batch))
        if ended:
            failed = self._model.ranks.highest([int(at.run.error is not None) for at in ended])
            for member, flag in zip(ended, failed, strict=True):
                member.run.has_failed |= bool(flag)
                member.trace.end_generation(self._num_steps)
        self._part_with_those_who_are_over()

    def _part_with_those_who_are_over(self) -> None:
        if not any(member.is_over for member in self._members):
            return
        kept = [row for member in self._members for row in [not member.is_over] * member.num_rows]
        self._members = [member for member in self._members if not member.is_over]
        if self._members:
            device = self._members[0].chooser.token_ids.device
            self._state.select(torch.tensor(kept, device=device).nonzero().squeeze(1))
        else:
            self._model.pass_memory.hold(-self._num_bytes)
            self._num_bytes = 0

    def _start_over_alone(self) -> None:
        """Has each trace generate by itself, from the start: one of them is not like the others."""
        members, self._members = self._members, []
        self._model.pass_memory.hold(-self._num_bytes)
        self._num_bytes = 0
        for member in members:
            member.trace.decoding = None
            member.trace.be_alone("its pass failed")

    def _step_plan(self) -> Pass:
        """Gives the pass of the step that comes, as plans are reported."""
        return self._pass_of(self._step_facts())

    def _pass_of(self, facts: Sequence[TraceFacts]) -> Pass:
        return Pass(tuple(range(len(facts))), tuple(facts), self._plan.outline)

    def _step_facts(self) -> list[TraceFacts]:
        """Gives what its traces are in the step that comes: after the first, of one token a row."""
        facts = [self._facts[id(member.trace)] for member in self._members]
        if not self._num_steps:
            return facts
        return [
            replace(at, rows=((0,),) * at.num_rows, head=(0, 1) if at.head else None)
            for at in facts
        ]


def _end_rows(member: _Member) -> None:
    """Lets the rows of a trace end that its own conditions name."""
    for node, when in member.run.take_ends():
        assert isinstance(node.operation, EndGeneration)
        meant = member.trace.batch.slice_of(node.operation.invoke)
        ends = torch.as_tensor(when).bool().reshape(-1)
        num_meant = meant.stop - meant.start
        if len(ends) not in (1, num_meant):
            raise ends_misfit(node, when, num_meant)
        rows = ends.new_zeros(member.num_rows)
        rows[meant] = ends
        member.chooser.end(rows)
