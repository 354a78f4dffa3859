"""Hands tokens to the streamers of a session's traces, as they are chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from insitu_wire.steps import all_steps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from insitu._recorder import SessionRecorder
    from insitu_proto.v1.trace_pb2 import Trace


class TokenShow:
    """Shows the tokens of one run of a session."""

    def __init__(self, recorder: SessionRecorder) -> None:
        self._streamers = recorder.streamers
        self._session = recorder.session
        self._begun: set[int] = set()

    def tokens(self, trace_number: int, step: int, token_ids: Sequence[int]) -> None:
        """Shows what a step has chosen.

        Args:
            trace_number: number of the trace in the session, from 1.
            step: the step, from 0.
            token_ids: one id of each row.
        """
        streamer = self._streamers.get(trace_number)
        if streamer is None:
            return
        if not step and (prompt := self._prompt(trace_number)) is not None:
            streamer.put(prompt)
        self._begun.add(trace_number)
        streamer.put(torch.tensor(token_ids))

    def end(self) -> None:
        """Tells streamers that no more come."""
        for trace_number in self._begun:
            self._streamers[trace_number].end()

    def _prompt(self, trace_number: int) -> torch.Tensor | None:
        """Gives the prompts of a trace, if they are known here and all of one length."""
        trace = self._trace(trace_number)
        rows = [list(row.token_ids) for invoke in trace.invokes for row in invoke.rows]
        are_all = all(not invoke.HasField("token_ids") for invoke in trace.invokes)
        return torch.tensor(rows) if are_all and len({len(row) for row in rows}) == 1 else None

    def _trace(self, trace_number: int) -> Trace:
        traces = [step.trace for step in all_steps(self._session.steps) if step.HasField("trace")]
        return traces[trace_number - 1]
