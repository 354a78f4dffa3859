"""A trace of a session on its way: planned, run in a pass of the model, and ended in its turn."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from insitu_shard.compiler import GRADIENTS, TraceFacts, WindowStep
from insitu_shard.engine.block_run import BlockRun
from insitu_shard.engine.events import TokensChosen
from insitu_shard.engine.graph import references
from insitu_shard.engine.graph_size import check_graph, graph_bytes
from insitu_shard.engine.head import trimmed
from insitu_shard.engine.joint_backward import reason_for_own_backward
from insitu_shard.engine.model import LoadedModel
from insitu_shard.engine.needs import Needs
from insitu_shard.engine.placement import place, place_generating
from insitu_shard.engine.plan import plan_nodes
from insitu_shard.engine.randomness import seed_of
from insitu_wire.errors import Error

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    import torch

    from insitu_shard.engine.choosing import Chooser
    from insitu_shard.engine.decode_run import DecodeGroup
    from insitu_shard.engine.graph import Generation, Invoke, NodeId, Step, Trace
    from insitu_shard.engine.inputs import Batch, ForwardInputs
    from insitu_shard.engine.plan import Plan
    from insitu_shard.engine.session_state import SessionState


class TraceRun:
    """One run of one trace.

    Attributes:
        model: what it runs on.
        block: its nodes' run, once its pass has begun.
        has_run: whether it has been in a pass, or needs none.
        error: what is wrong with it, if that is known already.
        decoding: the traces that it generates with, once it has begun to.
    """

    def __init__(self, step: Step, trace: Trace, state: SessionState) -> None:
        """Plans a trace.

        Args:
            step: the step that holds it.
            trace: the trace.
            state: its session's.
        """
        self.model = state.models[trace.model]
        self.trace_number = step.trace_number
        self.block: BlockRun | None = None
        self.plan: Plan | None = None
        self.has_run = False
        self.error: Error | None = None
        self.decoding: DecodeGroup | None = None
        self._num_steps: int | None = None
        self._chosen: list[TokensChosen] = []
        self._num_told = 0
        self._trace = trace
        self._state = state
        self._seed = state.block_seed(trace.nodes, trace.seed)
        self._used_later = state.liveness.used_after(step)
        self._is_exact = state.options.is_exact
        self._alone_because = "the session is exact" if self._is_exact else ""
        self._inputs_used = {
            node_id
            for invoke in trace.invokes
            for node_id in references((invoke.token_ids, invoke.args, invoke.kwargs))
        }
        self._head: tuple[int, int] | None = None
        self._needs: Needs | None = None
        try:
            self._make_plan()
        except Error as err:
            self.fail(err)

    @property
    def checkpoints(self) -> bool:
        """Whether its graph keeps what decoder layers are given alone."""
        return self._state.options.checkpoints

    @property
    def has_failed(self) -> bool:
        """Whether it is known that it fails."""
        return self.error is not None or (self.block is not None and self.block.has_failed)

    @property
    def window_step(self) -> WindowStep:
        """The trace as the compiler's window sees it."""
        return self._needs.step(is_trace=True) if self._needs else WindowStep(is_trace=True)

    @cached_property
    def facts(self) -> TraceFacts | None:
        """The trace as the planner of passes sees it; None if it needs no pass."""
        size = 0
        try:
            batch = self._batch
            if self.plan is not None and batch is not None:
                size = self._graph_bytes(self.plan, batch)
                check_graph(
                    self.plan,
                    size,
                    checkpoints=self.checkpoints,
                    max_bytes=self._state.options.limits.max_graph_bytes,
                )
        except Error as err:
            self.fail(err)
            return None
        if self._invokes is None or self.plan is None:
            self.has_run = True
            return None
        if batch is None:
            return TraceFacts(rows=((0,),), alone_because="it is a module's")
        if self._trace.generation is not None:
            return self._generating(self._trace.generation, batch)
        if self._alone_because:
            return TraceFacts(rows=batch.rows, alone_because=self._alone_because)
        lengths = {len(row) for row in batch.rows}
        may_pad = self._state.options.may_pad
        if reason := self._reason_for_alone(is_padded=may_pad or len(lengths) > 1):
            return TraceFacts(rows=batch.rows, alone_because=reason)
        takes_gradients = self.plan.differentiated is not None
        key: tuple[Hashable, ...] = (batch.length, len(lengths) > 1)
        if takes_gradients:
            key = (GRADIENTS, *key, self.checkpoints)
        elif may_pad:
            key = ("padded",)
        return place(
            self.plan,
            self.model.outline,
            batch,
            key=key,
            head=self._head,
            session=id(self._state),
            may_mix=not may_pad and len(lengths) == 1 and not takes_gradients,
            graph_bytes=size,
        )

    def _graph_bytes(self, plan: Plan, batch: Batch) -> int:
        num_tokens = len(batch.rows) * batch.length
        outline, checkpoints = self.model.outline, self.checkpoints
        return graph_bytes(plan, outline, num_tokens=num_tokens, checkpoints=checkpoints)

    def _generating(self, generation: Generation, batch: Batch) -> TraceFacts:
        assert self.plan is not None
        assert self._needs is not None
        reason = self._alone_because
        if not reason and self._needs.writes_in_pass:
            reason = "it writes into values of earlier steps on its way"
        return place_generating(
            self.plan,
            self.model.outline,
            batch,
            max_new_tokens=generation.max_new_tokens,
            state_bytes=self.model.state_bytes,
            alone_because=reason,
            may_pad=self._state.options.may_pad,
        )

    def _reason_for_alone(self, *, is_padded: bool) -> str:
        assert self.plan is not None
        assert self._needs is not None
        if self._needs.writes_in_pass:
            return "it writes into values of earlier steps on its way"
        if is_padded and self.plan.inputs_seen:
            return "it reads all arguments of a module, and rows are padded"
        return reason_for_own_backward(self.plan, self._needs, self.model.outline)

    def early_values(self, is_there: Callable[[NodeId], bool]) -> frozenset[NodeId]:
        """Gives the ids of what later steps may use before the trace has ended.

        Args:
            is_there: whether a value of an earlier step may be used now.
        """
        if self.plan is None or self._needs is None:
            return frozenset()
        return self.plan.outliving - self._needs.deferred(is_there, is_exact=self._is_exact)

    def begin(self, is_there: Callable[[NodeId], bool]) -> BlockRun:
        """Makes a new run of its nodes.

        Args:
            is_there: whether a value of an earlier step may be used now.
        """
        assert self.plan is not None
        assert self._needs is not None
        self.block = BlockRun(
            self.plan,
            self.model,
            self._state.earlier,
            self._seed,
            self._state.brought,
            self._state.handles,
            batch=self._batch,
            deferred=self._needs.deferred(is_there, is_exact=self._is_exact),
            runs_to_end=self._trace.generation is not None and self._trace.generation.streams,
            shares_backward=self._shares_backward,
            cancellation=self._state.cancellation,
        )
        return self.block

    @property
    def _shares_backward(self) -> bool:
        """Whether others may share the pass in which its gradients are taken."""
        takes_gradients = self.plan is not None and self.plan.differentiated is not None
        return takes_gradients and self.facts is not None and self.facts.key is not None

    @property
    def generates(self) -> bool:
        """Whether it is a generation, of many passes."""
        return self._trace.generation is not None

    @property
    def max_new_tokens(self) -> int:
        """How many steps it has at most; 0 if it does not generate."""
        return self._trace.generation.max_new_tokens if self._trace.generation else 0

    @property
    def num_tokens(self) -> int:
        """How many tokens it takes through the model at most; 0 where that is not for it to tell.

        So it is without a pass, with inputs that are not tokens, and with wrong ones, which are an
        error when it runs.
        """
        with suppress(Error):
            if batch := self._batch:
                return sum(map(len, batch.rows)) + len(batch.rows) * max(self.max_new_tokens - 1, 0)
        return 0

    @property
    def batch(self) -> Batch:
        """The rows that it runs over."""
        assert self._batch is not None
        return self._batch

    def chooser(self) -> Chooser:
        """Makes what chooses its tokens."""
        assert self._trace.generation is not None
        assert isinstance(self.model, LoadedModel)
        return self.model.chooser(self.batch, self._trace.generation, self._draws_seed)

    def take_tokens(self, step: int, tokens: torch.Tensor) -> None:
        """Takes note of what a step has chosen, if somebody is to be told."""
        if self._trace.generation is not None and self._trace.generation.streams:
            chosen = TokensChosen(self.trace_number, step, tuple(tokens.tolist()))
            self._chosen[step:] = [chosen]

    def new_tokens(self) -> list[TokensChosen]:
        """Gives the tokens that have not been told, each once."""
        new, self._num_told = self._chosen[self._num_told :], max(len(self._chosen), self._num_told)
        return new

    def end_generation(self, num_steps: int) -> None:
        """Takes note that it has generated its last token."""
        self._num_steps = num_steps
        self.has_run = True
        self.decoding = None

    def leave(self) -> None:
        """Lets those go on without it that it generates with."""
        if self.decoding is not None:
            self.decoding.leave(self)

    @property
    def remark(self) -> str:
        """What people should know of how it ran; empty if nothing."""
        assert self.plan is not None
        if self._num_steps is None:
            return ""
        missed = {at.step for at in self.plan.due_at_boundary if at.step >= self._num_steps}
        if not missed or self.has_failed:
            return ""
        return (
            f"trace {self.trace_number} generated {self._num_steps} of at most "
            f"{self.max_new_tokens} tokens and ended; what it writes at step {min(missed)} and "
            "after did not happen"
        )

    @property
    def _draws_seed(self) -> int:
        """Seed of the tokens that it draws: its own as it is, in the first run of the trace."""
        seed, _, run = self._seed.rpartition(":")
        if self._trace.seed and run == "1":
            return int(seed)
        return seed_of(f"{self._seed}:{self.trace_number}")

    def forward_inputs(self) -> ForwardInputs:
        """Gives what its own forward pass is called with."""
        assert self._invokes is not None
        return self.model.forward_inputs(self._invokes)

    def be_alone(self, reason: str) -> None:
        """Plans it for a pass of its own."""
        self._alone_because = reason
        self._make_plan()
        self.__dict__.pop("facts", None)

    def fail(self, err: Error) -> None:
        """Takes note of what is wrong with it; it does not run."""
        err.trace_number = self.trace_number
        self.error = err
        self.has_run = True

    def _make_plan(self) -> None:
        nodes, conditions = self._trace.nodes, self._trace.conditions
        self._head = None
        may_trim = not self._alone_because and not self._inputs_used and not self.generates
        if may_trim and self.model.outline.blocks:
            assert self._batch is not None
            head_path = self.model.outline.head_path
            nodes, self._head = trimmed(
                nodes, conditions, head_path, self._batch.length, used_later=self._used_later
            )
        plan = plan_nodes(nodes, conditions, used_later=self._used_later)
        self.plan = plan
        self._needs = Needs(plan, self._inputs_used)
        if self._head is not None and (self.facts is None or self.facts.key is None):
            # Alone, the model gives all positions.
            self.be_alone(self.facts.alone_because if self.facts else "it has no input")

    @cached_property
    def _batch(self) -> Batch | None:
        return self.model.batch(self._invokes) if self._invokes is not None else None

    @cached_property
    def _invokes(self) -> list[Invoke] | None:
        """What it runs over; None if what that is made of was not set."""
        invokes = []
        for invoke in self._trace.invokes:
            values = self._state.resolve((invoke.token_ids, invoke.args, invoke.kwargs))
            if not isinstance(values, tuple):
                return None
            token_ids, args, kwargs = values
            invokes.append(replace(invoke, token_ids=token_ids, args=args, kwargs=kwargs))
        return invokes
