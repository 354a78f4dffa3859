"""How the leader of a shard group reaches the other ranks."""

from __future__ import annotations

import os
import struct
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from insitu_shard.engine.last_words import LastWords
from insitu_shard.engine.ranks import Ranks

# Followers wait for the next command as long as nobody uses the model. A leader that dies closes
# its connections, which ends the wait at once.
_IDLE_TIMEOUT = timedelta(days=365)

# A rank may read its slices much faster than another. One that dies is noticed by torchrun.
_LOADING_TIMEOUT = timedelta(hours=1)

_BROADCAST_BYTES = 64 * 1024 * 1024

# A command and the length of its payload. The first bytes of that come along: each broadcast is a
# wait of all ranks, and most payloads are short.
_HEAD = struct.Struct("<qq")
_HEAD_PAYLOAD_BYTES = 2048


class Command(IntEnum):
    """What all ranks do next."""

    BEGIN_SEGMENT = 1
    DROP_SEGMENT = 2
    RUN_ROUND = 3
    RELEASE_SESSION = 4
    STOP = 5
    STORE_UPLOAD = 6
    DROP_UPLOADS = 7
    STORE_VALUES = 8
    LET_GO = 9
    REPORT = 10
    PAUSE_SEGMENT = 11
    RESUME_SEGMENT = 12


class CommandChannel:
    """Carries commands from the leader to the followers, in one order."""

    def __init__(self, ranks: Ranks, *, timeout_seconds: float) -> None:
        """Makes it.

        Args:
            ranks: this process's place.
            timeout_seconds: how long the leader waits for the others to take a command.
        """
        self._ranks = ranks
        self._timeout = timedelta(seconds=timeout_seconds)
        self._group = ranks.patient

    def send(self, command: Command, payload: bytes = b"") -> None:
        """Sends a command to every follower. Leader only."""
        if self._group is None:
            return
        head = bytearray(_HEAD.size + _HEAD_PAYLOAD_BYTES)
        _HEAD.pack_into(head, 0, command, len(payload))
        first, rest = payload[:_HEAD_PAYLOAD_BYTES], payload[_HEAD_PAYLOAD_BYTES:]
        head[_HEAD.size : _HEAD.size + len(first)] = first
        self._broadcast(head)
        self._broadcast(bytearray(rest))

    def send_data(self, data: bytearray) -> None:
        """Sends the bytes that a command has announced to every follower. Leader only."""
        self._broadcast(data)

    def receive_data(self, size: int) -> bytearray:
        """Waits for the bytes that a command has announced. Followers only."""
        data = bytearray(size)
        self._broadcast(data)
        return data

    def _broadcast(self, data: bytearray) -> None:
        if self._group is None or not data:
            return
        for part in torch.frombuffer(data, dtype=torch.uint8).split(_BROADCAST_BYTES):
            work = dist.broadcast(part, src=0, group=self._group, async_op=True)
            # Whoever waits for a command waits for long. Who has one to send does not.
            if self._ranks.is_leader and work is not None:
                work.wait(self._timeout)
            elif work is not None:
                work.wait()

    def receive(self) -> tuple[Command, bytes]:
        """Waits for the leader's next command. Followers only."""
        head = self.receive_data(_HEAD.size + _HEAD_PAYLOAD_BYTES)
        command, size = _HEAD.unpack_from(head)
        first = head[_HEAD.size : _HEAD.size + size]
        return Command(command), bytes(first + self.receive_data(size - len(first)))


def join_group(num_ranks: int, rank: int) -> Ranks:
    """Joins the ranks that torchrun started; one rank alone joins nothing."""
    if num_ranks == 1:
        return Ranks(rank, num_ranks)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = _store()
    dist.init_process_group(
        backend=backend, store=store, rank=rank, world_size=num_ranks, timeout=_LOADING_TIMEOUT
    )
    patient = dist.new_group(backend="gloo", timeout=_IDLE_TIMEOUT)
    last_words = LastWords(store, rank=rank, size=num_ranks)
    return Ranks(rank, num_ranks, patient=patient, last_words=last_words)


def bound_collectives(ranks: Ranks, seconds: float) -> None:
    """Has ranks wait for each other no longer than that, now that all have loaded."""
    if ranks.size > 1:
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def _store() -> Any:
    """Gives what ranks find each other by, with nothing in it of ranks that ran before.

    The agent's own store stays when it starts the ranks again, and those would look for the dead.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    within = _LOADING_TIMEOUT
    store = dist.TCPStore(host, port, is_master=False, timeout=within)  # type: ignore[attr-defined]
    attempt = f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}"
    return dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]
