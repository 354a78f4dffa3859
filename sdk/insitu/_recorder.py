"""Builds a session's graph while the user's code runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from insitu._source import user_location
from insitu_proto.v1 import intervention_pb2, session_pb2, trace_pb2
from insitu_wire import torch_codec
from insitu_wire.errors import Error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from insitu_proto.v1 import value_pb2
    from insitu_wire.errors import Location

    Reference = Callable[[object], int | None]


class SessionRecorder:
    """Records one session.

    Attributes:
        session: what was recorded so far.
        saved: what the user marked to come back, by the id of its save node.
        state: "recording", then "running", then "done".
        num_traces: how many traces there are.
        last_trace: the trace defined last. Operations on values go there, also after its block.
    """

    def __init__(self, reference: Reference) -> None:
        """Starts an empty session.

        Args:
            reference: gives the node id of a recorded value, or None for anything else.
        """
        self.session = session_pb2.Session()
        self.saved: dict[int, object] = {}
        self.state = "recording"
        self.num_traces = 0
        self.last_trace: TraceRecorder | None = None
        self._reference = reference
        self._location_indices: dict[tuple[str, int], int] = {}
        self._last_id = 0

    def add_trace(self, model: str, rows: Sequence[Sequence[int]]) -> TraceRecorder:
        """Starts a trace over rows of token ids."""
        trace = self._add_step().trace
        trace.model = model
        trace.mode = trace_pb2.TRACE_MODE_FORWARD
        trace.invokes.add(rows=[trace_pb2.TokenRow(token_ids=row) for row in rows])
        self.num_traces += 1
        self.last_trace = TraceRecorder(self, trace, rows)
        return self.last_trace

    def add_log(self, values: Sequence[object]) -> None:
        """Adds a message."""
        step = self._add_step()
        step.log.SetInParent()
        step.log.values.extend(self.encode(value, user_location()) for value in values)

    def add_exit(self) -> None:
        """Adds the end of the session."""
        self._add_step().exit.SetInParent()

    def _add_step(self) -> session_pb2.Step:
        return self.session.steps.add(location=self.location_index(user_location()))

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
            return torch_codec.encode(value, self._reference)
        except Error as err:
            err.location = err.location or location
            raise


class TraceRecorder:
    """Records the nodes of one trace.

    Attributes:
        num_rows: rows of the batch.
        length: tokens in the longest row.
        number: number of the trace in the session, from 1.
    """

    def __init__(
        self, recorder: SessionRecorder, trace: trace_pb2.Trace, rows: Sequence[Sequence[int]]
    ) -> None:
        self.session_recorder = recorder
        self.num_rows = len(rows)
        self.length = max(map(len, rows))
        self.number = recorder.num_traces
        self._trace = trace

    def read(self, point: intervention_pb2.HookPoint, location: Location) -> int:
        """Adds a read and gives its node id."""
        node = self._add_node(location)
        node.read.hook_point.CopyFrom(point)
        return node.id

    def write(self, point: intervention_pb2.HookPoint, value: object, location: Location) -> None:
        """Adds a write."""
        encoded = self.session_recorder.encode(value, location)
        node = self._add_node(location)
        node.write.hook_point.CopyFrom(point)
        node.write.value.CopyFrom(encoded)

    def call(
        self,
        name: str,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        location: Location,
    ) -> int:
        """Adds an operation and gives its node id."""
        call = intervention_pb2.Call(name=name)
        self._add_arguments(call, args, kwargs, location)
        node = self._add_node(location)
        node.call.CopyFrom(call)
        return node.id

    def module_call(
        self,
        module_path: str,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        location: Location,
    ) -> int:
        """Adds the application of a module to values and gives its node id."""
        call = intervention_pb2.ModuleCall(module_path=module_path)
        self._add_arguments(call, args, kwargs, location)
        node = self._add_node(location)
        node.module_call.CopyFrom(call)
        return node.id

    def save(self, value: object, name: str, location: Location) -> None:
        """Marks a value to come back."""
        encoded = self.session_recorder.encode(value, location)
        node = self._add_node(location)
        node.save.value.CopyFrom(encoded)
        node.save.name = name
        self.session_recorder.saved[node.id] = value

    def log(self, values: Sequence[object]) -> None:
        """Adds a message that is sent when its values exist."""
        location = user_location()
        encoded = [self.session_recorder.encode(value, location) for value in values]
        node = self._add_node(location)
        node.log.values.extend(encoded)

    def _add_arguments(
        self,
        call: intervention_pb2.Call | intervention_pb2.ModuleCall,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        location: Location,
    ) -> None:
        encode = self.session_recorder.encode
        call.args.extend(encode(arg, location) for arg in args)
        for key, value in kwargs.items():
            call.kwargs[key].CopyFrom(encode(value, location))

    def _add_node(self, location: Location) -> intervention_pb2.Node:
        recorder = self.session_recorder
        return self._trace.nodes.add(
            id=recorder.next_id(), location=recorder.location_index(location)
        )
