"""Describes any torch module, with the shapes of a run over inputs of given shapes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils import _pytree as pytree

from insitu_proto.v1 import model_pb2
from insitu_shard.engine.describe import add_modules
from insitu_shard.engine.measure import Measurement, recorded

if TYPE_CHECKING:
    from insitu_shard.engine.measure import Moment
    from insitu_shard.engine.module import LoadedModule

_log = logging.getLogger(__name__)


def describe_module(
    model: LoadedModule, path: str, arguments: tuple[tuple[Any, ...], dict[str, Any]] | None
) -> tuple[model_pb2.ModelDescription, list[Moment]]:
    """Describes a module and those below it.

    Args:
        model: where it is loaded.
        path: its path.
        arguments: positional and keyword arguments, with tensors on the meta device; None where
            they are not known.

    Returns:
        The description, without shapes where they can not be known, and the moments of the run.
    """
    module = model.modules[path]
    measured = _measured(module, model.device, *arguments) if arguments is not None else None
    description = model_pb2.ModelDescription(name=model.name, class_name=type(module).__name__)
    add_modules(description, module, [measured] if measured is not None else [])
    return description, measured.moments if measured is not None else []


def _measured(
    module: torch.nn.Module, device: torch.device, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Measurement | None:
    """Runs a module on tensors without elements; None where it depends on these."""

    def without_elements(meta: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(meta.size(), meta.stride(), dtype=meta.dtype, device=device)

    # What the module makes of tensors is none of the session's doing.
    with torch._C.DisableTorchFunction(), torch.no_grad():
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode, recorded(module) as measured:
                # Fakes in the place of weights and buffers: nothing of the module is written to.
                owned = (*module.named_parameters(), *module.named_buffers())
                fakes: dict[str, torch.Tensor] = {
                    name: mode.from_tensor(tensor) for name, tensor in owned
                }
                args, kwargs = pytree.tree_map_only(torch.Tensor, without_elements, (args, kwargs))
                functional_call(module, fakes, args, kwargs)
        except Exception as exception:  # noqa: BLE001 - any module may do anything
            _log.info("%s has no known shapes: %s", type(module).__name__, exception)
            return None
    return measured
