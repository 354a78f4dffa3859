"""Control flow over values that are known only when the session runs."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from insitu._origin import Origin, latest
from insitu._proxy import as_meta, proxies_in, wrap
from insitu._shapes import Unknown
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from insitu._recorder import SessionRecorder
    from insitu_proto.v1 import session_pb2
    from insitu_wire.errors import Location


class Branch:
    """What runs only if a condition holds; `else_` is what runs if it does not."""

    def __init__(self, recorder: SessionRecorder, condition: object, location: Location) -> None:
        self._recorder = recorder
        self._condition = condition
        self._location = location
        self._step: session_pb2.Branch | None = None
        self._open = ExitStack()
        meta = as_meta(condition)
        if isinstance(meta, torch.Tensor) and meta.numel() != 1:
            raise error(
                Reason.SHAPE_MISMATCH,
                f"a condition is one element, and this tensor is {list(meta.shape)}; reduce it "
                "with .any() or .all()",
                location=location,
            )

    def __enter__(self) -> Branch:
        self._open.enter_context(self.taken(negated=False))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open.close()

    @contextmanager
    def else_(self) -> Iterator[None]:
        """Records what runs if the condition does not hold."""
        with self.taken(negated=True):
            yield

    def cond(self, condition: object) -> Branch:
        """As `Session.cond`: a condition inside this one."""
        return Branch(self._recorder, condition, self._location)

    @contextmanager
    def taken(self, *, negated: bool) -> Iterator[None]:
        """Records what runs if the condition holds, or if it does not."""
        trace = self._recorder.trace
        if trace is not None:
            with trace.under(self._condition, self._location, negated=negated):
                yield
            return
        if self._step is None:
            condition = self._recorder.encode(self._condition, self._location)
            self._step = self._recorder.add_step().branch
            self._step.condition.CopyFrom(condition)
        steps = self._step.else_steps if negated else self._step.steps
        with self._recorder.inside(steps):
            yield


class Loop:
    """What runs once for each item."""

    def __init__(
        self,
        recorder: SessionRecorder,
        items: object,
        location: Location,
        *,
        return_context: bool = False,
    ) -> None:
        self._recorder = recorder
        self._items = list(items) if isinstance(items, range) else items
        self._location = location
        self._return_context = return_context
        self._item_node_id = 0
        self._open = ExitStack()

    def exit(self) -> None:
        """Leaves the loop: neither the rest of this item's steps nor later items run."""
        self._recorder.exit(self._item_node_id)

    def cond(self, condition: object) -> Branch:
        """As `Session.cond`, inside the loop."""
        return Branch(self._recorder, condition, self._location)

    def iter(self, items: object) -> Loop:
        """As `Session.iter`: a loop inside this one."""
        return Loop(self._recorder, items, self._location)

    def __enter__(self) -> Any:
        if self._recorder.trace is not None:
            raise error(
                Reason.UNSUPPORTED_FEATURE,
                "a loop over values of the session runs whole traces, so it can not stand in one; "
                "open the trace inside the loop, or use operations on the whole tensor",
                location=self._location,
            )
        items = self._recorder.encode(self._items, self._location)
        step = self._recorder.add_step().loop
        step.items.CopyFrom(items)
        step.item_node_id = self._item_node_id = self._recorder.next_id()
        self._open.enter_context(self._recorder.inside(step.steps))
        item = self._item()
        return (item, self) if self._return_context else item

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open.close()

    def _item(self) -> Any:
        origins = [proxy._origin for proxy in proxies_in(self._items)]
        origin = Origin(
            self._recorder,
            self._location,
            "an item of the loop",
            self._item_node_id,
            moment=latest(origins, 0),
            scope=self._recorder.scope,
        )
        return wrap(_structure_of_items(as_meta(self._items)), origin)


def _structure_of_items(items: Any) -> Any:
    """Gives what all items have in common, with meta tensors for tensors and numbers."""
    if isinstance(items, torch.Tensor) and items.ndim:
        return items[0] if len(items) else Unknown()
    if not isinstance(items, list | tuple) or not items:
        return Unknown()
    structures = [_structure(item) for item in items]
    return (
        structures[0]
        if all(_are_alike(structures[0], other) for other in structures)
        else Unknown()
    )


def _structure(item: Any) -> Any:
    match item:
        case bool() | int() | float():
            return torch.empty((), dtype=torch.tensor(item).dtype, device="meta")
        case tuple() | list():
            # Only the item itself, not what is in it, becomes a tensor.
            return type(item)(
                part if isinstance(part, torch.Tensor) else Unknown() for part in item
            )
        case torch.Tensor():
            return item
    return Unknown()


def _are_alike(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_are_alike, one, other))
    return isinstance(one, Unknown) and isinstance(other, Unknown)
