"""Decides how the devices of a group share its model: a rank each, or all of them in one rank."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from insitu_shard.config import Placement
from insitu_shard.engine import (
    Spread,
    check_ranks,
    has_plan,
    load_config,
    resolve_model_folder,
)
from insitu_wire.errors import ConfigurationError

if TYPE_CHECKING:
    from insitu_shard.config import ShardConfig

_log = logging.getLogger(__name__)


def with_placement(config: ShardConfig) -> ShardConfig:
    """Gives the settings with the placement decided, the same in every process of a group.

    By default a model is split over ranks. One that can not be split so, for it has no plan or the
    plan does not divide, is spread over the GPUs of one rank, where there are several.

    Raises:
        ConfigurationError: neither is possible.
    """
    if config.placement is Placement.AUTO:
        config = replace(config, placement=_chosen(config))
    if config.placement is Placement.TP:
        return config
    spread = Spread.parse(config.max_memory, num_devices=config.num_ranks)
    return replace(config, num_ranks=1, spread=spread)


def _chosen(config: ShardConfig) -> Placement:
    if config.max_memory:
        return Placement.SPREAD
    model_config = load_config(resolve_model_folder(config.model_path))
    has_gpus = torch.cuda.device_count() >= 2
    if config.num_ranks > 1 and has_gpus and not has_plan(model_config):
        _log.warning("%s has no plan: it is spread over one rank's GPUs", model_config.model_type)
        return Placement.SPREAD
    try:
        check_ranks(model_config, config.num_ranks)
    except ConfigurationError as err:
        if not has_gpus:
            raise
        _log.warning("%s; it is spread over the GPUs of one rank", err)
        return Placement.SPREAD
    return Placement.TP
