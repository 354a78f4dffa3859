"""Shows each invoke of a trace its own rows of the batch, without the padding of the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from insitu_shard.engine.memory import copied
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from insitu_proto.v1 import model_pb2
    from insitu_shard.engine.boundary_value import InputValue, OutputValue
    from insitu_shard.engine.graph import HookPoint
    from insitu_shard.engine.inputs import Batch, InvokeRows


@dataclass(slots=True)
class InvokesValue:
    """What the model holds at a boundary, seen as a whole and by invoke.

    Where nodes write at the boundary each invoke has memory of its own until all have run; so a
    write of one is never seen by another.
    """

    whole: InputValue | OutputValue
    structure: model_pb2.StructureSpec
    """Of `whole.raw`."""
    batch: Batch
    is_written: bool
    _parts: dict[int, InputValue | OutputValue] = field(default_factory=dict)

    @property
    def raw(self) -> Any:
        """What the model is to go on with."""
        if not self.is_written or not self._parts:
            return self.whole.raw
        full = copied(self.whole.raw)
        for number, part in self._parts.items():
            _copy_into(self._part_of(full, number), part.raw)
        return full

    def read(self, point: HookPoint) -> object:
        """Gives the rows of the hook point's invoke, or all."""
        if point.invoke:
            return self._part(point.invoke).read(point)
        return self._settled().read(point)

    def write(self, point: HookPoint, value: object) -> None:
        """Replaces the rows of the hook point's invoke, or all."""
        if point.invoke:
            self._part(point.invoke).write(point, value)
        else:
            self._settled().write(point, value)

    def _settled(self) -> InputValue | OutputValue:
        self.whole = self.whole.holding(self.raw)
        self._parts.clear()
        return self.whole

    def _part(self, number: int) -> InputValue | OutputValue:
        if number not in self._parts:
            part = self._part_of(self.whole.raw, number)
            self._parts[number] = self.whole.holding(copied(part) if self.is_written else part)
        return self._parts[number]

    def _part_of(self, raw: Any, number: int) -> Any:
        return narrowed(raw, self.structure, self.batch.invokes[number - 1], self.batch)


def narrowed(
    value: Any, structure: model_pb2.StructureSpec, invoke: InvokeRows, batch: Batch
) -> Any:
    """Gives views of an invoke's rows in all tensors whose dimensions are known."""
    match structure.WhichOneof("kind"):
        case "tensor" if isinstance(value, torch.Tensor):
            return _narrowed_tensor(value, structure.tensor, invoke, batch)
        case "tuple" | "list" as kind if isinstance(value, tuple | list):
            items = getattr(structure, kind).items
            parts = (narrowed(*pair, invoke, batch) for pair in zip(value, items, strict=True))
            return type(value)(parts)
        case "dict" if isinstance(value, dict):
            known = dict(zip(structure.dict.keys, structure.dict.items, strict=True))
            return {
                key: narrowed(item, known[key], invoke, batch) if key in known else item
                for key, item in value.items()
            }
    return value


def _narrowed_tensor(
    tensor: torch.Tensor, spec: model_pb2.TensorSpec, invoke: InvokeRows, batch: Batch
) -> torch.Tensor:
    if tensor.ndim != len(spec.dimensions):
        return tensor
    for dim, size in enumerate(spec.dimensions):
        match (size.batch_power, size.length_power):
            case (1, 0):
                first, count = invoke.first_row, invoke.num_rows
            case (0, 1):
                first, count = invoke.padding, invoke.length
            case (1, 1) if not invoke.padding:
                first, count = invoke.first_row * batch.length, invoke.num_rows * batch.length
            case (1, 1):
                raise error(
                    Reason.UNSUPPORTED_FEATURE,
                    "here all tokens of the batch are in one dimension, and invokes differ in "
                    "length; use it in an empty invoke (tracer.invoke()), or invokes of one length",
                )
            case _:
                continue
        tensor = tensor.narrow(dim, first * size.factor, count * size.factor)
    return tensor


def _copy_into(target: Any, value: Any) -> None:
    match target:
        case torch.Tensor():
            target.copy_(value)
        case tuple() | list():
            for part, item in zip(target, value, strict=True):
                _copy_into(part, item)
        case dict():
            for key, part in target.items():
                _copy_into(part, value[key])
