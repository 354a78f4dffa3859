"""What variables are after a loop over steps, of which the last ones may not have run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from insitu._joining import is_recordable
from insitu._origin import Origin, latest
from insitu._proxy import Proxy, as_meta, proxies_in, wrap
from insitu._python_flow import bind_soon
from insitu._shapes import Unknown
from insitu_wire.operations import LAST

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from insitu._block_recorder import BlockRecorder
    from insitu_wire.errors import Location


@dataclass(slots=True)
class LastOrigin(Origin):
    """Where the last of some values comes from that is set; a node only once it is used."""

    values: tuple[Any, ...] = ()

    def id(self) -> int:
        """Gives the id of the node that makes the value."""
        if not self.node_id:
            self.node_id = self.recorder.block.call(LAST, self.values, {}, self.location)
        return self.node_id


def bind_last(
    frame: FrameType,
    block: BlockRecorder,
    history: Sequence[dict[str, Any]],
    location: Location,
) -> None:
    """Has variables that the body of a loop has set mean what the last step that ran has left.

    Args:
        frame: the loop's.
        block: the trace.
        history: what the variables were before the loop, and after each step.
        location: the loop's line.
    """
    last = {name: _last(name, history, block, location) for name in history[-1]}
    changed = {name: value for name, value in last.items() if value is not history[-1][name]}
    if changed:
        bind_soon(frame, changed)


def _last(
    name: str, history: Sequence[dict[str, Any]], block: BlockRecorder, location: Location
) -> Any:
    current = history[-1][name]
    values: list[Any] = []
    for bound in history:
        value = bound.get(name)
        if is_recordable(value) and not (values and values[-1] is value):
            values.append(value if isinstance(value, torch.Tensor) else torch.tensor(value))
    if not isinstance(current, Proxy) or len(values) < 2:
        return current
    recorder = block.session_recorder
    moment = latest((proxy._origin for proxy in proxies_in(values)), block.number)
    origin = LastOrigin(
        recorder, location, name, moment=moment, scope=recorder.scope, values=tuple(values)
    )
    proxy: Proxy = wrap(_common([as_meta(value) for value in values]), origin, type(current))
    if recorder.is_saved(current):
        recorder.block.save(proxy, name, current._origin.location)
    return proxy


def _common(metas: Sequence[Any]) -> Any:
    """Gives what all have in common: a meta tensor if all are alike."""
    first = metas[0]
    are_alike = all(
        isinstance(meta, torch.Tensor) and meta.shape == first.shape and meta.dtype == first.dtype
        for meta in metas
    )
    return first if are_alike else Unknown()
