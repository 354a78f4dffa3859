"""Plans a session without running it, by the rules by which it runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig

from insitu_shard.compiler import ExplainedPass, Explanation, Limits, Outline, Window, plan_passes
from insitu_shard.engine.codec import StepDecoder
from insitu_shard.engine.graph import Branch, Loop
from insitu_shard.engine.handles import KeptValues
from insitu_shard.engine.inputs import Batch, rows_of, state_bytes
from insitu_shard.engine.liveness import Liveness
from insitu_shard.engine.module import LoadedModule
from insitu_shard.engine.session_state import Options, SessionState
from insitu_shard.engine.window_run import Between, prepared, windows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from insitu_proto.v1 import model_pb2, session_pb2
    from insitu_shard.engine.graph import Invoke, Step
    from insitu_shard.engine.trace_run import TraceRun

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
    while (head := window.head) is not None:
        trace = blocks[head]
        if isinstance(trace, Between) or window.has_run(head):
            window.ended()
            continue
        ready = [head] if state.options.is_exact else window.ready()
        planned, members = _next_pass([(at, blocks[at]) for at in ready], state, note)
        yield planned
        for place in members:
            window.ran(place, _early_values(blocks[place], window, place))


def _next_pass(
    ready: Sequence[tuple[int, TraceRun | Between]], state: SessionState, note: str
) -> tuple[ExplainedPass, list[int]]:
    (first, trace), *_ = ready
    assert not isinstance(trace, Between)
    if trace.facts is None:
        reason = str(trace.error) if trace.error else "what it runs over is known when it runs"
        return ExplainedPass(trace.model.name, (trace.trace_number,), note=reason), [first]
    candidates = [
        (place, other)
        for place, other in ready
        if not isinstance(other, Between) and other.model is trace.model and other.facts
    ]
    facts = [other.facts for _, other in candidates if other.facts is not None]
    plan = next(plan_passes(facts, trace.model.outline, state.options.limits))
    members = [candidates[member] for member in plan.members]
    numbers = [other.trace_number for _, other in members]
    if trace.generates:
        most = max(other.max_new_tokens for _, other in members)
        note = "; ".join(filter(None, [note, f"a pass for each of up to {most} tokens"]))
    explained = ExplainedPass.of(plan, trace.model.name, numbers, note)
    return explained, [place for place, _ in members]


def _early_values(block: TraceRun | Between, window: Window, place: int) -> frozenset[int]:
    assert not isinstance(block, Between)
    return block.early_values(lambda node_id: window.is_there(node_id, place))
