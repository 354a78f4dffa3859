"""Settings of a shard group."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from insitu_wire.errors import Reason, error
from insitu_wire.logs import LogFormat
from insitu_wire.tls import Tls

if TYPE_CHECKING:
    from insitu_shard.engine import Spread


class Placement(StrEnum):
    """How the devices of a group share its model."""

    AUTO = "auto"
    """As TP where the model can be split so, else as SPREAD if there are several GPUs."""
    TP = "tp"
    """Split over ranks, one a device: tensor parallelism."""
    SPREAD = "spread"
    """One rank with layers on all devices, one after the other, in memory and on disk."""


@dataclass(frozen=True, slots=True)
class ShardConfig:
    """Settings of one rank; the same on all ranks of a group."""

    model: str
    """Name by which sessions ask for the model."""
    model_path: str
    """Folder of its safetensors files, or a Hugging Face hub id."""
    scheduler: str
    """host:port of the scheduler that the group registers with."""
    host: str = "127.0.0.1"
    """Address that the leader listens on."""
    port: int = 0
    """Port that the leader listens on; 0 takes a free one."""
    advertise_address: str = ""
    """host:port under which the scheduler reaches the leader; by default host and port."""
    tls: Tls = field(default_factory=Tls)
    """Certificates; all three, or none for no encryption."""
    join_token: str = field(default="", repr=False)
    """What the scheduler wants of groups that register."""
    log_format: LogFormat = LogFormat.TEXT
    """How lines of the log look."""
    has_reflection: bool = True
    """Whether gRPC reflection tells callers what services there are."""
    metrics_port: int | None = None
    """Port of the leader's /metrics; 0 takes a free one, None serves none."""
    health_port: int | None = None
    """Port where the leader answers probes without TLS, from the start on; None for none."""
    num_ranks: int = 1
    """Ranks that the model is split over."""
    num_nodes: int = 1
    """Machines that share the ranks."""
    node_rank: int = 0
    """Which of them this is; 0 has the leader."""
    rendezvous: str = ""
    """host or host:port of machine 0, where they meet."""
    rendezvous_timeout_seconds: int = 3600
    """How long they wait for each other to come."""
    max_sessions: int = 16
    """How many sessions the scheduler may have it run at once."""
    max_pass_tokens: int = 8192
    """How many tokens, over all rows, go through a layer at once."""
    max_pass_bytes: int = 2 * 1024**3
    """Memory that a forward pass may take beside the weights, by estimate."""
    max_graph_bytes: int = 8 * 1024**3
    """Memory that a trace may keep for its gradients, by estimate."""
    needs_gpus: bool = False
    """Whether it must not start where no GPU is found, rather than run on the CPU."""
    placement: Placement = Placement.AUTO
    """How the devices share the model."""
    max_memory: str = ""
    """Limits of a spread model, such as "0=20GiB,cpu=64GiB"; by default what is free."""
    spread: Spread | None = None
    """What `with_placement` has decided, for a model that is spread."""
    dtype: str = ""
    """Element type of the weights, such as "bfloat16"; by default as stored."""
    upload_cache_bytes: int = 8 * 1024**3
    """Memory of each rank for tensors that users bring; the least recently used make room."""
    kept_bytes: int = 4 * 1024**3
    """Memory of each rank for values that one user keeps beyond sessions."""
    session_bytes: int = 8 * 1024**3
    """Memory of each rank for values that the steps of one session give to later ones."""
    handle_bytes: int = 16 * 1024**3
    """The same, for all sessions together."""
    kept_seconds: float = 3600.0
    """How long a kept value stays after it was last used."""
    collective_timeout_seconds: float = 60.0
    """How long a rank waits for the others before the group is given up."""
    host_id: str = ""
    """Name of the host that started the group; empty if none did."""
    grace_seconds: float = 30.0
    """How long a running segment may still take once the group is told to stop."""
    max_restarts: int = 3
    """How often torchrun starts the ranks again after one has failed."""

    def __post_init__(self) -> None:
        self.tls.check()
        if self.tls.is_on != self.tls.is_mutual:
            raise error(
                Reason.INVALID_CONFIGURATION,
                "--tls-cert, --tls-key and --tls-client-ca go together: a shard group takes "
                "calls of the scheduler and other groups alone; give all three, or none",
            )
        for name, lowest in _LOWEST.items():
            if (value := getattr(self, name)) < lowest:
                raise error(
                    Reason.INVALID_CONFIGURATION,
                    f"--{name.replace('_', '-')} is {value}; it must be {lowest} or more",
                    value=value,
                )
        if self.collective_timeout_seconds <= 0:
            raise error(
                Reason.INVALID_CONFIGURATION,
                f"--collective-timeout-seconds is {self.collective_timeout_seconds}; it must be "
                "more than 0",
            )
        if self.max_memory and self.placement is Placement.TP:
            raise error(
                Reason.INVALID_CONFIGURATION,
                f"--max-memory is {self.max_memory!r}, which is for --placement spread; leave one "
                "of the two out",
                maxMemory=self.max_memory,
            )
        if self.num_ranks < 1:
            raise error(
                Reason.INVALID_CONFIGURATION,
                f"--tp is {self.num_ranks}; it is the number of ranks, 1 or more",
                numRanks=self.num_ranks,
            )
        self._check_nodes()

    def _check_nodes(self) -> None:
        if self.num_nodes < 1 or self.num_ranks % self.num_nodes:
            raise error(
                Reason.INVALID_CONFIGURATION,
                f"--nodes is {self.num_nodes}, and --tp {self.num_ranks}; each node has as many "
                "ranks as the others: choose a --tp that --nodes divides",
                numNodes=self.num_nodes,
                numRanks=self.num_ranks,
            )
        if not 0 <= self.node_rank < self.num_nodes:
            raise error(
                Reason.INVALID_CONFIGURATION,
                f"--node-rank is {self.node_rank}; of {self.num_nodes} nodes it is 0 to "
                f"{self.num_nodes - 1}",
                nodeRank=self.node_rank,
            )
        if self.num_nodes > 1 and not self.rendezvous:
            raise error(
                Reason.INVALID_CONFIGURATION,
                f"--nodes is {self.num_nodes}, and nothing says where they meet; give the address "
                "of node 0 with --rendezvous",
                numNodes=self.num_nodes,
            )


_LOWEST = {
    "max_sessions": 1,
    "max_pass_tokens": 1,
    "max_pass_bytes": 1,
    "max_graph_bytes": 1,
    "upload_cache_bytes": 0,
    "session_bytes": 0,
    "handle_bytes": 0,
    "grace_seconds": 0,
    "max_restarts": 0,
}


def parse_model(text: str) -> tuple[str, str]:
    """Splits "NAME=PATH" or "NAME" into name and path; the name is its own path by default."""
    name, _, path = text.partition("=")
    return name, path or name
