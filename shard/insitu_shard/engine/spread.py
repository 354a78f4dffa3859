"""Spreads a model over the devices of one process, with accelerate: what does not fit goes on."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from accelerate.utils import convert_file_size_to_int, get_max_memory

from insitu_shard.engine.pretrained import from_pretrained
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Spread:
    """The devices that layers are put on in order, each up to its limit; the rest stays on disk."""

    max_memory: Mapping[int | str, int] = field(default_factory=dict)
    """Bytes by number of a GPU, or "cpu"; by default what is free."""

    @classmethod
    def parse(cls, text: str, *, num_devices: int) -> Spread:
        """Reads limits such as "0=20GiB,cpu=64GiB".

        Args:
            text: the limits; empty for what is free on the first GPUs and in memory.
            num_devices: how many GPUs it may take, of those that there are.

        Raises:
            ConfigurationError: the text is not of this form, or names a GPU that is not there.
        """
        if not text:
            free = get_max_memory()
            return cls({at: free[at] for at in free if at == "cpu" or at in range(num_devices)})
        try:
            pairs = (item.split("=") for item in text.split(","))
            limits = {_device(name): _num_bytes(size) for name, size in pairs}
        except ValueError as exception:
            raise error(
                Reason.INVALID_CONFIGURATION,
                f"--max-memory is {text!r}; it must be like 0=20GiB,cpu=64GiB, with the numbers of "
                f"GPUs, of which there are {torch.cuda.device_count()}",
                maxMemory=text,
            ) from exception
        return cls(limits)


def load_spread(
    folder: Path, spread: Spread, *, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Loads a model over several devices; as `from_pretrained` else."""
    # Weights that stay on disk are read from the checkpoint itself, where they are as stored there.
    changed = tempfile.mkdtemp(prefix="insitu-offload-")
    try:
        module = from_pretrained(
            folder,
            dtype=dtype,
            device_map="auto",
            max_memory=dict(spread.max_memory),
            offload_folder=changed,
        )
    except BaseException:
        shutil.rmtree(changed)
        raise
    weakref.finalize(module, shutil.rmtree, changed, ignore_errors=True)
    return module


def _num_bytes(size: str) -> int:
    num_bytes: int = int(size) if size.isdecimal() else convert_file_size_to_int(size)
    return num_bytes


def _device(name: str) -> int | str:
    name = name.strip()
    if name != "cpu" and int(name) not in range(torch.cuda.device_count()):
        raise ValueError(name)
    return name if name == "cpu" else int(name)
