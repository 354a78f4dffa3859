"""Refuses before any rank is started what every rank would refuse."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import torch

from insitu_shard.engine import (
    check_checkpoint,
    check_ranks,
    load_config,
    parse_dtype,
    rank_device,
    resolve_model_folder,
)
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from insitu_shard.config import ShardConfig


def check_before_start(config: ShardConfig) -> None:
    """Checks the ports and the model's files; no weights are read.

    Raises:
        Error: the group could not start; the message is one line that says what to do.
    """
    check_port(config.host, config.port, "--port")
    if config.metrics_port is not None:
        check_port(config.host, config.metrics_port, "--metrics-port")
    if config.health_port is not None:
        check_port(config.host, config.health_port, "--health-port")
    folder = resolve_model_folder(config.model_path)
    check_ranks(load_config(folder), config.num_ranks)
    _check_devices(config)
    check_checkpoint(folder)
    # To ask a GPU would take some of its memory, for as long as the group lives.
    if config.dtype and (device := rank_device(0)).type == "cpu":
        parse_dtype(config.dtype, device)


def _check_devices(config: ShardConfig) -> None:
    """Refuses fewer GPUs than ranks; where there is none at all, ranks may run on the CPU."""
    num_local, num_gpus = config.num_ranks // config.num_nodes, torch.cuda.device_count()
    if config.needs_gpus and not num_gpus:
        is_for_cpus = torch.version.cuda is None and torch.version.hip is None
        cure = (
            f"torch {torch.__version__} is built for CPUs alone: install a build for GPUs, or an "
            "image that has one"
            if is_for_cpus
            else "see whether the driver is there, and whether the pod or process is given GPUs"
        )
        raise error(
            Reason.INVALID_CONFIGURATION,
            f"--require-gpus is set, and this machine shows no GPU; {cure}",
            numRanks=num_local,
        )
    if config.spread is None and 0 < num_gpus < num_local:
        raise error(
            Reason.INVALID_CONFIGURATION,
            f"--tp asks for {num_local} ranks here, and this machine shows {num_gpus} GPU(s); a "
            "rank has one of its own: lower --tp, or give the pod or process more GPUs",
            numRanks=num_local,
            numGpus=num_gpus,
        )


def check_port(host: str, port: int, flag: str) -> None:
    """Refuses an address that nobody can listen on now; port 0 is a free one.

    Raises:
        ConfigurationError: naming the flag.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # As servers do, so that what a server has just left does not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except (OSError, OverflowError) as exception:
        why = getattr(exception, "strerror", None) or exception
        raise error(
            Reason.INVALID_CONFIGURATION,
            f"can not listen on {host}:{port} ({why}); choose a free port with {flag}, or 0",
            host=host,
            port=port,
        ) from exception
