"""Brings saved values from a GPU into the host's memory while the GPU goes on computing."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.utils import _pytree as pytree

from insitu_shard.engine import Saved

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from insitu_shard.engine import SegmentEvent
    from insitu_wire.errors import Error


@dataclass(frozen=True, slots=True)
class Download:
    """A saved value on its way into the host's memory."""

    event: Saved
    """The value's tensors, to be read once it is there only."""
    is_there: torch.cuda.Event | None = None
    """What the GPU tells; None if there is nothing to wait for."""

    @property
    def is_done(self) -> bool:
        """Whether the value is there."""
        return self.is_there is None or self.is_there.query()

    async def finished(self) -> Saved:
        """Waits until the value is there."""
        if self.is_there is not None:
            await asyncio.to_thread(self.is_there.synchronize)
        return self.event


class Downloads:
    """Starts downloads on a stream of their own. Used by the engine's thread only.

    On a device that is no GPU values are in the host's memory already, and are passed on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begun(self, event: SegmentEvent | Error) -> SegmentEvent | Error | Download:
        """Gives an event as it is told: of a saved value, its download."""
        if not isinstance(event, Saved):
            return event
        if self._stream is None:
            return Download(event)
        # What computes the value has been asked for, and not done yet.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            value = pytree.tree_map_only(torch.Tensor, self._copied, event.value)
            is_there = torch.cuda.Event()
            is_there.record(self._stream)
        return Download(replace(event, value=value), is_there)

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "cuda" or self._stream is None:
            return tensor
        # From pageable memory a copy would keep the GPU's stream waiting.
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor.detach(), non_blocking=True)
        # Its memory is not given to others before the copy is done.
        tensor.record_stream(self._stream)
        return host


async def finished_downloads(
    events: Iterable[SegmentEvent | Error | Download],
) -> AsyncIterator[list[SegmentEvent | Error]]:
    """Yields events in order, as many at once as there are before a download that takes time."""
    there: list[SegmentEvent | Error] = []
    for event in events:
        if not isinstance(event, Download):
            there.append(event)
            continue
        if there and not event.is_done:
            yield there
            there = []
        there.append(await event.finished())
    if there:
        yield there
