"""Gives each random operation numbers of its own, the same on every rank and backend."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def seeded(key: str, device: torch.device) -> Iterator[None]:
    """Has torch draw the numbers that belong to a key, and puts its generators back."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed_of(key))
        yield


def seed_of(key: str) -> int:
    """Gives the seed of the numbers that belong to a key."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
