"""Traces that may run now, and passes that have run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from insitu_shard.compiler import Pass
    from insitu_shard.engine.graph import NodeId
    from insitu_shard.engine.trace_run import TraceRun


@dataclass(frozen=True, slots=True)
class Pending:
    """A trace that may run now."""

    trace: TraceRun
    is_there: Callable[[NodeId], bool]
    """Whether it may use a value of an earlier step now."""


@dataclass(frozen=True, slots=True)
class RanPass:
    """A pass that has run."""

    plan: Pass
    members: list[Pending]
    """Its traces, in the plan's order."""
