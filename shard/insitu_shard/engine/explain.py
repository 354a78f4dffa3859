"""Plans a session without running it, by the rules by which it runs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig

from insitu_shard.compiler import (
    ExplainedPass,
    Explanation,
    Limits,
    Outline,
    Window,
    plan_passes,
    reason_for_apart,
)
from insitu_shard.engine.codec import StepDecoder
from insitu_shard.engine.graph import Branch, Loop
from insitu_shard.engine.handles import KeptValues
from insitu_shard.engine.inputs import Batch, rows_of, state_bytes
from insitu_shard.engine.liveness import Liveness
from insitu_shard.engine.module import LoadedModule
from insitu_shard.engine.session_state import Options, SessionState
from insitu_shard.engine.trace_run import TraceRun
from insitu_shard.engine.window_run import Between, prepared, windows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from insitu_proto.v1 import model_pb2, session_pb2
    from insitu_shard.compiler import Pass
    from insitu_shard.engine.graph import Invoke, Step

# Of an element, as elsewhere in estimates.
_ITEM_BYTES = 4
_PER_ITEM = "for each item of a loop by itself: what it sets, the next may use"


@dataclass(frozen=True, kw_only=True)
class _DescribedModel(LoadedModule):
    """A model of which the structure is known alone."""

    description: model_pb2.ModelDescription

    @cached_property
    def outline(self) -> Outline:
        return Outline.of(self.description)

    @cached_property
    def state_bytes(self) -> int:
        values = json.loads(self.description.config_json or "null")
        if not values:
            return 0  # a module that is no language model
        return state_bytes(AutoConfig.for_model(**values), _ITEM_BYTES)

    def batch(self, invokes: Sequence[Invoke]) -> Batch | None:
        if not self.description.config_json:
            return None  # a module that is no language model
        return Batch.of([rows_of(at, at.token_ids, vocab_size=2**32) for at in invokes])


def explain(
    session: session_pb2.Session,
    descriptions: Mapping[str, model_pb2.ModelDescription],
    tensors: Sequence[torch.Tensor],
    limits: Limits | None = None,
) -> Explanation:
    """Plans a session.

    Args:
        session: the session.
        descriptions: its models, by name.
        tensors: its list of tensors.
        limits: how large a pass may be.
    """
    cpu = torch.device("cpu")
    models = {
        name: _DescribedModel(
            name=name, module=torch.nn.Module(), device=cpu, description=description
        )
        for name, description in descriptions.items()
    }
    steps = StepDecoder(session.locations, tensors=tensors, device=cpu).steps(session.steps)
    state = SessionState(
        models=models,
        values={},
        brought=frozenset(),
        handles=KeptValues(0),
        liveness=Liveness(steps),
        seed=session.seed,
        options=Options(
            is_exact=session.exact,
            may_pad=session.padding,
            checkpoints=session.checkpoint,
            limits=limits or Limits(),
        ),
        writes_in_place=False,
    )
    return Explanation(tuple(_passes(steps, state, "")))


def _passes(steps: Sequence[Step], state: SessionState, note: str) -> Iterator[ExplainedPass]:
    for window in windows(steps):
        match window[0].kind:
            case Loop(steps=inner):
                yield from _passes(inner, state, _PER_ITEM)
            case Branch(steps=inner, else_steps=others):
                yield from _passes(inner, state, "if a condition holds")
                yield from _passes(others, state, "if a condition does not hold")
            case _:
                yield from _window_passes(window, state, note)


def _window_passes(
    steps: Sequence[Step], state: SessionState, note: str
) -> Iterator[ExplainedPass]:
    """Plays a window through, as `WindowRun` runs it."""
    blocks = [prepared(step, state) for step in steps]
    window = Window([block.window_step for block in blocks])
    shared: list[_Shared] = []
    while (head := window.head) is not None:
        trace = blocks[head]
        if isinstance(trace, Between) or window.has_run(head):
            window.ended()
            continue
        ready = [head] if state.options.is_exact else window.ready()
        traces = {at: other for at in ready if isinstance(other := blocks[at], TraceRun)}
        plan, members = _next_pass(head, traces, state)
        numbers = [traces[place].trace_number for place in members]
        if plan is None:
            reason = str(trace.error) if trace.error else "what it runs over is known when it runs"
            yield ExplainedPass(trace.model.name, tuple(numbers), note=reason)
        else:
            apart = _reason_for_apart(head, plan, shared, window) if plan.is_merged else ""
            notes = [apart, note, _steps_note([traces[place] for place in members])]
            told = "; ".join(filter(None, notes))
            yield ExplainedPass.of(plan, trace.model.name, numbers, told)
        if plan is not None and plan.is_merged:
            of_others = [at for at in shared if not at.is_like(plan)]
            shared = [*of_others, _Shared(plan, numbers, frozenset(ready))]
        for each in shared:
            each.ran.update(zip(members, numbers, strict=True))
        for place in members:
            window.ran(place, _early_values(blocks[place], window, place))


def _next_pass(
    head: int, ready: Mapping[int, TraceRun], state: SessionState
) -> tuple[Pass | None, list[int]]:
    """Plans the pass that the first trace needs; gives the places of those that share it."""
    trace = ready[head]
    if trace.facts is None:
        return None, [head]
    candidates = {
        place: facts
        for place, other in ready.items()
        if other.model is trace.model and (facts := other.facts) is not None
    }
    plan = next(plan_passes([*candidates.values()], trace.model.outline, state.options.limits))
    places = [*candidates]
    return plan, [places[member] for member in plan.members]


def _steps_note(traces: Sequence[TraceRun]) -> str:
    if not traces[0].generates:
        return ""
    return f"a pass for each of up to {max(at.max_new_tokens for at in traces)} tokens"


@dataclass(frozen=True, slots=True)
class _Shared:
    """The last pass of a model and a kind that others could have shared."""

    plan: Pass
    numbers: Sequence[int]
    """Of its traces."""
    ready: frozenset[int]
    """Places of the traces that could have run then."""
    ran: dict[int, int] = field(default_factory=dict)
    """Numbers of the traces that have run from then on, by their places."""

    def is_like(self, plan: Pass) -> bool:
        """Whether another pass is of the same model and kind."""
        return self.is_of_model(plan) and self.plan.traces[0].kind == plan.traces[0].kind

    def is_of_model(self, plan: Pass) -> bool:
        """Whether another pass is of the same model."""
        return self.plan.outline is plan.outline


def _reason_for_apart(place: int, plan: Pass, shared: Sequence[_Shared], window: Window) -> str:
    """Says why a trace has a pass after those that it could have shared; empty if none is before.

    Args:
        place: the trace's.
        plan: its pass.
        shared: passes before it, the last one last.
        window: the window.
    """
    of_model = [at for at in shared if at.is_of_model(plan)]
    of_kind = [at for at in of_model if at.is_like(plan)]
    if not of_model:
        return ""
    before = (of_kind or of_model)[-1]
    if place in before.ready:
        return reason_for_apart(plan.traces[0], before.plan, before.numbers)
    awaited = window.definers(place) & before.ran.keys()
    if awaited:
        return f"it waits for what trace {before.ran[max(awaited)]} gives"
    return "it waits for the steps before it"


def _early_values(block: TraceRun | Between, window: Window, place: int) -> frozenset[int]:
    assert not isinstance(block, Between)
    return block.early_values(lambda node_id: window.is_there(node_id, place))
