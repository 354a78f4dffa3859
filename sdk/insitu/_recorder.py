"""Builds a session's graph while the user's code runs."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from insitu._block_recorder import BlockRecorder
from insitu._brought import BroughtTensors
from insitu._source import assigned_name, user_location
from insitu_proto.v1 import session_pb2, trace_pb2
from insitu_wire import torch_codec
from insitu_wire.errors import Error, Reason, error
from insitu_wire.operations import RANDOM
from insitu_wire.steps import all_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, MutableSequence, Sequence

    from insitu._generate import Streamer
    from insitu._origin import Container, Origin
    from insitu_proto.v1 import value_pb2
    from insitu_wire.errors import Location

    Reference = Callable[[object], int | None]

Scope = tuple[int, ...]
"""The loops, branches and conditions that are open, outermost first."""


class SessionRecorder:
    """Records one session.

    Attributes:
        session: what was recorded so far.
        brought: the user's own tensors among its values.
        saved: what the user marked to come back, by the id of its save node.
        state: "recording", then "running", then "done".
        num_traces: how many traces there are.
        containers: lists and dicts that it builds.
        loaded: where values that earlier sessions kept come from, by handle.
        trace: the trace whose block is open, if one is.
        scope: where what is recorded now is defined, and so surely set.
        streamers: who takes the tokens of traces as they are chosen, by their numbers.
    """

    def __init__(self, reference: Reference) -> None:
        """Starts an empty session.

        Args:
            reference: gives the node id of a recorded value, or None for anything else.
        """
        self.session = session_pb2.Session()
        self.brought = BroughtTensors(self.session.tensors)
        self.saved: dict[int, object] = {}
        self._saved_objects: set[int] = set()
        self.state = "recording"
        self.num_traces = 0
        self.trace: BlockRecorder | None = None
        self.containers: list[Container] = []
        self.loaded: dict[str, Origin] = {}
        self.scope: Scope = ()
        self.streamers: dict[int, Streamer] = {}
        self._reference = reference
        self._steps: MutableSequence[session_pb2.Step] = self.session.steps
        self._compute: BlockRecorder | None = None
        self._compute_step = session_pb2.Compute()
        self._location_indices: dict[tuple[str, int], int] = {}
        self._last_id = 0
        self._scope_numbers = itertools.count(1)
        self._block_numbers = itertools.count(1)

    @property
    def block(self) -> BlockRecorder:
        """Where operations go: the open trace, or else a computation between traces."""
        if self.trace is not None:
            return self.trace
        if self._compute is None:
            self._compute_step = self.add_step().compute
            number = next(self._block_numbers)
            self._compute = BlockRecorder(self, self._compute_step.nodes, number)
        return self._compute

    @property
    def open_block(self) -> BlockRecorder | None:
        """Where operations go, if a trace or a computation is open."""
        return self.trace or self._compute

    def compute_on(self, model: str) -> BlockRecorder:
        """Gives a computation between traces that may call a model's modules."""
        block = self.block
        if self._compute_step.model not in ("", model):
            self._close_compute()
            block = self.block
        self._compute_step.model = model
        return block

    def open_trace(
        self, model: str, seed: int, generation: trace_pb2.Generation | None = None
    ) -> BlockRecorder:
        """Starts a trace; one that generates if it is said how."""
        step = self.add_step().trace
        step.model = model
        step.seed = seed
        step.mode = trace_pb2.TRACE_MODE_FORWARD
        if generation is not None:
            step.mode = trace_pb2.TRACE_MODE_GENERATE
            step.generation.CopyFrom(generation)
        self.num_traces += 1
        self.trace = BlockRecorder(self, step.nodes, next(self._block_numbers), step)
        return self.trace

    def close_trace(self) -> None:
        """Ends the open trace."""
        if self.trace is not None:
            self.trace.end_backward()
        self.trace = None

    def close(self) -> None:
        """Ends what is open, at the end of the session's block."""
        self._close_compute()

    def _close_compute(self) -> None:
        """Ends the open computation between traces."""
        if self._compute is not None:
            self._compute.end_backward()
        self._compute = None

    def exit(self, loop_item_node_id: int = 0) -> None:
        """Ends the session here, or leaves a loop."""
        if not loop_item_node_id:
            self.save_containers()
        self.add_step().exit.loop_item_node_id = loop_item_node_id

    def save_containers(self) -> None:
        """Has lists and dicts come back as they are here."""
        for container in self.containers:
            if container._is_saved:
                origin = container._origin
                name = assigned_name(origin.location)
                self.block.save(container, name, origin.location)

    def seed(self) -> None:
        """Draws the session's seed from torch's generator, if random numbers need it."""
        if any(_needs_seed(step) for step in all_steps(self.session.steps)):
            self.session.seed = int(torch.randint(1, 2**63 - 1, ()))

    def add_step(self) -> session_pb2.Step:
        """Adds a step after those defined so far."""
        self._close_compute()
        step = self._steps.add()  # type: ignore[attr-defined]
        step.location = self.location_index(user_location())
        return step  # type: ignore[no-any-return]

    def add_log(self, values: Sequence[object]) -> None:
        """Adds a message between traces."""
        location = user_location()
        if self._compute is not None:
            self._compute.log(values, location)
            return
        encoded = [self.encode(value, location) for value in values]
        step = self.add_step()
        step.log.SetInParent()
        step.log.values.extend(encoded)

    @contextmanager
    def inside(self, steps: MutableSequence[session_pb2.Step]) -> Iterator[None]:
        """Records into the steps of a loop or branch for a while."""
        self._close_compute()
        outer, self._steps = self._steps, steps
        try:
            with self.scoped():
                yield
        finally:
            self._close_compute()
            self._steps = outer

    @contextmanager
    def scoped(self) -> Iterator[None]:
        """Records what may not run, or run more than once, for a while."""
        outer = self.scope
        self.scope = (*outer, next(self._scope_numbers))
        try:
            yield
        finally:
            self.scope = outer

    def next_id(self) -> int:
        """Gives the next node's id."""
        self._last_id += 1
        return self._last_id

    def location_index(self, location: Location) -> int:
        """Gives the place of a line in the session's list, from 1."""
        key = (location.file, location.line)
        if key not in self._location_indices:
            self.session.locations.add(
                file=location.file, line=location.line, source=location.source
            )
            self._location_indices[key] = len(self.session.locations)
        return self._location_indices[key]

    def encode(self, value: object, location: Location) -> value_pb2.Value:
        """Encodes an argument; what can not be part of a session is an error at the user's line."""
        try:
            return torch_codec.encode(value, self._refer, self.brought.add)
        except Error as err:
            err.location = err.location or location
            raise

    def _refer(self, value: object) -> int | None:
        """Gives the id of a value of this session, and refuses those of others."""
        origin = getattr(value, "_origin", None)
        if origin is not None and origin.recorder is not self:
            raise error(
                Reason.UNKNOWN_REFERENCE,
                f"{origin} belongs to another session; keep both in one session, or save the value "
                "there and use the saved tensor here",
            )
        node_id = self._reference(value)
        if getattr(value, "_is_parameter", False) and (block := self.open_block) is not None:
            block.parameters[node_id or 0] = value
        return node_id

    def mark_saved(self, node_id: int, value: object) -> None:
        """Takes note of what is to come back, by the id of its save node."""
        self.saved[node_id] = value
        self._saved_objects.add(id(value))

    def is_saved(self, value: object) -> bool:
        """Whether the user has marked exactly this object to come back."""
        return id(value) in self._saved_objects


def _needs_seed(step: session_pb2.Step) -> bool:
    if step.trace.seed:
        return False
    # The model's own configuration may say that tokens are drawn.
    draws_tokens = step.trace.HasField("generation")
    nodes = (*step.trace.nodes, *step.compute.nodes)
    return draws_tokens or any(node.call.name in RANDOM for node in nodes)
