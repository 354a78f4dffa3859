"""Describes a model's structure from its configuration alone: no weights are read."""

from __future__ import annotations

import copy
import json
import logging
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM
from transformers import __version__ as transformers_version

from insitu_proto.v1 import model_pb2
from insitu_shard.engine.common_names import add_common_names
from insitu_shard.engine.measure import PROBE_SIZES, Measurement, block_paths, measure
from insitu_shard.engine.point_plan import PointPlan, attach_points, find_points
from insitu_shard.engine.points import Point
from insitu_wire.errors import Reason, error
from insitu_wire.torch_codec import dtype_to_pb

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_log = logging.getLogger(__name__)

# Running a model without weights takes seconds, and both the client's side and the engine's ask.
_MAX_DESCRIBED = 8
_DESCRIBED: dict[tuple[str, torch.dtype], tuple[model_pb2.ModelDescription, PointPlan]] = {}


def describe(
    config: PretrainedConfig, *, name: str, dtype: torch.dtype, tokenizer_hash: str = ""
) -> model_pb2.ModelDescription:
    """Describes the module tree, with shapes for any input size where they can be known."""
    description = model_pb2.ModelDescription()
    description.CopyFrom(_described(config, dtype)[0])
    description.name, description.config_json = name, _as_json(config)
    description.tokenizer_hash = tokenizer_hash
    return description


def point_plan(config: PretrainedConfig, *, dtype: torch.dtype) -> PointPlan:
    """Tells where the model shows what is inside of its modules."""
    return _described(config, dtype)[1]


def _described(
    config: PretrainedConfig, dtype: torch.dtype
) -> tuple[model_pb2.ModelDescription, PointPlan]:
    key = (_as_json(config), dtype)
    if key not in _DESCRIBED:
        while len(_DESCRIBED) >= _MAX_DESCRIBED:
            del _DESCRIBED[next(iter(_DESCRIBED))]
        _DESCRIBED[key] = _describe(config, dtype)
    return _DESCRIBED[key]


def _as_json(config: PretrainedConfig) -> str:
    return json.dumps(config.to_dict(), default=str)


def _describe(
    config: PretrainedConfig, dtype: torch.dtype
) -> tuple[model_pb2.ModelDescription, PointPlan]:
    module, measurements, plan = _measured(config, dtype)
    description = model_pb2.ModelDescription(
        class_name=type(module).__name__,
        dtype=dtype_to_pb(dtype),
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
        transformers_version=transformers_version,
    )
    add_modules(description, module, measurements)
    add_common_names(description, module)
    return description, plan


def add_modules(
    description: model_pb2.ModelDescription,
    module: torch.nn.Module,
    measurements: list[Measurement],
) -> None:
    """Adds a module and all below it, with what was measured of them."""
    blocks = block_paths(module)
    order = measurements[0].call_order if measurements else {}
    for path, part in module.named_modules():
        entry = description.modules.add(
            path=path,
            class_name=type(part).__name__,
            detail=part.extra_repr(),
            is_block=path in blocks,
            call_order=order.get(path, 0),
            is_point=isinstance(part, Point),
        )
        if path in order:
            _add_structures(entry, measurements)


def measure_whole(config: PretrainedConfig, *, dtype: torch.dtype) -> Measurement:
    """Measures the whole model without its weights, over the first probe size.

    Raises:
        ConfigurationError: its forward pass depends on values.
    """
    module, measurements, _ = _measured(config, dtype)
    if not measurements:
        raise error(
            Reason.INVALID_CONFIGURATION,
            f"the shapes in a {type(module).__name__} can not be known without its weights, and so "
            "it can not be split over ranks; use 1 rank",
        )
    return measurements[0]


def _measured(
    config: PretrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, list[Measurement], PointPlan]:
    """Builds the whole model without memory and measures it, once a probe size.

    Returns:
        The model on the meta device, its measurements, none where its forward pass depends on
        values, and where it has points.
    """
    plan = PointPlan()
    module = empty_model(config, dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            plan = find_points(module)
            attach_points(module, plan)
            return module, _probed(module), plan
    except Exception as exception:  # noqa: BLE001 - any model file may do anything
        _log.warning("%s shows nothing inside its modules: %s", type(module).__name__, exception)
    module = empty_model(config, dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return module, _probed(module), PointPlan()
    except Exception as exception:  # noqa: BLE001 - as above
        _log.warning("%s has no known shapes: %s", type(module).__name__, exception)
        return module, [], PointPlan()


def _probed(module: torch.nn.Module) -> list[Measurement]:
    return [measure(module, size, torch.device("meta")) for size in PROBE_SIZES]


def empty_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Builds the whole model on the meta device, without memory."""
    with init_empty_weights(include_buffers=True):
        # What is set below would be set for all who have this configuration.
        own = copy.deepcopy(config)
        module: PreTrainedModel = AutoModelForCausalLM.from_config(own, dtype=dtype).eval()
    if hasattr(module, "set_experts_implementation"):
        # The grouped kernel has a fake version in bfloat16 only.
        module.set_experts_implementation("batched_mm")
    return module


def _add_structures(entry: model_pb2.Module, measurements: list[Measurement]) -> None:
    outputs = [measurement.outputs.get(entry.path) for measurement in measurements]
    if entry.is_block:
        outputs = [out[0] if isinstance(out, tuple) else out for out in outputs]
    entry.output.CopyFrom(_structure(outputs))
    inputs = [measurement.inputs[entry.path] for measurement in measurements]
    entry.args.CopyFrom(_structure([args for args, _ in inputs]))
    entry.kwargs.CopyFrom(_structure([kwargs for _, kwargs in inputs]))


def _structure(values: list[Any]) -> model_pb2.StructureSpec:
    """Gives the structure that a value has in all probes."""
    first = values[0]
    if all(isinstance(value, torch.Tensor) for value in values):
        if (tensor := _tensor(values)) is not None:
            return model_pb2.StructureSpec(tensor=tensor)
    elif all(isinstance(value, dict) and value.keys() == first.keys() for value in values):
        items = [_structure([value[key] for value in values]) for key in first]
        keys = [str(key) for key in first]
        return model_pb2.StructureSpec(dict=model_pb2.StructureDict(keys=keys, items=items))
    elif all(isinstance(value, tuple | list) and len(value) == len(first) for value in values):
        parts = [_structure(list(item)) for item in zip(*values, strict=True)]
        sequence = model_pb2.StructureList(items=parts)
        if isinstance(first, tuple):
            return model_pb2.StructureSpec(tuple=sequence)
        return model_pb2.StructureSpec(list=sequence)
    return model_pb2.StructureSpec(opaque=model_pb2.OpaqueSpec(class_name=type(first).__name__))


def _tensor(tensors: list[torch.Tensor]) -> model_pb2.TensorSpec | None:
    if len({tensor.ndim for tensor in tensors}) > 1:
        return None
    dimensions = [_dimension(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    known = [dimension for dimension in dimensions if dimension is not None]
    if len(known) < len(dimensions):
        return None
    return model_pb2.TensorSpec(dtype=dtype_to_pb(tensors[0].dtype), dimensions=known)


def _dimension(sizes: tuple[int, ...]) -> model_pb2.DimensionSpec | None:
    """Finds what a size is made of: a constant, rows, tokens, or both."""
    if len(sizes) == 1:
        return model_pb2.DimensionSpec(factor=sizes[0])
    for batch_power, length_power in ((0, 0), (1, 0), (0, 1), (1, 1)):
        units = [batch**batch_power * length**length_power for batch, length in PROBE_SIZES]
        factors = {size / unit for size, unit in zip(sizes, units, strict=True)}
        if len(factors) == 1 and (factor := factors.pop()).is_integer():
            return model_pb2.DimensionSpec(
                factor=int(factor), batch_power=batch_power, length_power=length_power
            )
    return None
