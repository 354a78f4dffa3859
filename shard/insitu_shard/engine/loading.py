"""Loads a model from safetensors, whole or as this rank's slices."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch

from insitu_shard.engine.checkpoint import check_checkpoint
from insitu_shard.engine.describe import empty_model, measure_whole, point_plan
from insitu_shard.engine.head_input import pack_head_input
from insitu_shard.engine.layout import Layouts, find_layouts, packed_outputs
from insitu_shard.engine.measure import PROBE_SIZES, measure
from insitu_shard.engine.model import LoadedModel
from insitu_shard.engine.model_folder import load_config
from insitu_shard.engine.point_plan import attach_points
from insitu_shard.engine.pretrained import from_pretrained, from_slices
from insitu_shard.engine.progress import progress_shown
from insitu_shard.engine.ranks import Ranks
from insitu_shard.engine.spread import Spread, load_spread
from insitu_shard.engine.tensor_plan import check_ranks, describe_plan, tensor_plan
from insitu_shard.engine.transformers_internals import DistributedConfig

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel

_log = logging.getLogger(__name__)


def load_model(
    name: str,
    folder: Path,
    *,
    ranks: Ranks | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    spread: Spread | None = None,
) -> LoadedModel:
    """Loads a model.

    Args:
        name: name by which sessions ask for it.
        folder: folder of its config.json and safetensors files.
        ranks: this process's place in its group; every rank must call.
        device: where to put it; by default the CPU.
        dtype: element type of the weights; by default as stored.
        spread: over which devices to place it in this process, in the place of one device.

    Raises:
        ConfigurationError: the folder holds no model, or the model can not be split so.
    """
    ranks = ranks or Ranks()
    device = device or torch.device("cpu")
    config = load_config(folder)
    check_ranks(config, ranks.size)
    check_checkpoint(folder)
    started_at = time.monotonic()
    with progress_shown(name, is_shown=ranks.is_leader):
        if spread is not None:
            module = load_spread(folder, spread, dtype=dtype)
        else:
            module = load_weights(config, folder, dtype=dtype, ranks=ranks, device=device)
    attach_points(module, point_plan(config, dtype=module.dtype))
    pack_head_input(module)
    ranks.meet()
    layouts = _layouts(config, module, ranks, device)
    _log.info("%s is loaded, in %.1f s", name, time.monotonic() - started_at)
    return LoadedModel(
        name=name,
        folder=folder,
        config=config,
        module=module,
        device=device,
        dtype=module.dtype,
        layouts=layouts,
        ranks=ranks,
        is_spread=spread is not None,
    )


def load_weights(
    config: PretrainedConfig,
    folder: Path,
    *,
    dtype: torch.dtype | None,
    ranks: Ranks,
    device: torch.device,
) -> PreTrainedModel:
    """Loads a model's weights on one device, or this rank's slices of them.

    Raises:
        ConfigurationError: the files lack weights of the model.
    """
    if ranks.size > 1:
        plan = tensor_plan(empty_model(config), ranks.size)
        if ranks.is_leader:
            _log.info("%s", describe_plan(config, plan, ranks.size))
        if plan:
            distributed = DistributedConfig(tp_size=ranks.size, tp_plan=plan)
            return from_slices(config, folder, dtype=dtype, distributed_config=distributed)
    where = {"device_map": {"": device}} if device.type != "cpu" else {}
    return from_pretrained(folder, dtype=dtype, **where)


def _layouts(
    config: PretrainedConfig, module: torch.nn.Module, ranks: Ranks, device: torch.device
) -> Layouts:
    if ranks.size == 1:
        return Layouts()
    full = measure_whole(config, dtype=torch.float32)
    local = measure(module, PROBE_SIZES[0], device)
    return find_layouts(full, local, ranks, packed_outputs(module))
