"""Reads of a checkpoint's tensors no more than is asked for, and keeps no more of them in memory.

safetensors maps files into memory. A slice of rows is a view of the mapping: only its own pages
are ever read. A slice of columns has to be copied, and that touches all pages of its tensor, which
then count as this process's memory for as long as the mapping lives. So these go through mappings
of their own, which end soon.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PASSING_BYTES = 128 * 1024**2
"""How much may be touched through a mapping before another takes its place."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


@contextmanager
def lazy_state_dict(folder: Path) -> Iterator[dict[str, LazyTensor]]:
    """Gives all tensors of a checkpoint by name, none of them read, for a while."""
    passing = _Passing()
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        # Its types are not known.
        file: Any = safe_open(path, framework="pt")
        for name in file.keys():  # noqa: SIM118 - it is no dict
            tensors[name] = LazyTensor(name, path, file.get_slice(name), passing)
    yield tensors
    passing.end()


class _Passing:
    """The mapping that columns are copied from: one at a time, and none for long."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: Any = None
        self._num_bytes = 0
        self._lock = Lock()

    def file(self, path: Path, num_bytes: int) -> Any:
        """Gives a file to read so many bytes from. Threads may call it."""
        with self._lock:
            self._num_bytes += num_bytes
            if path != self._path or self._num_bytes > _PASSING_BYTES:
                self._path, self._num_bytes = path, num_bytes
                self._file = safe_open(path, framework="pt")
            return self._file

    def end(self) -> None:
        """Lets go of the last mapping."""
        self._path = self._file = None


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor in a file; has of a tensor and of safetensors' slices what transformers asks for."""

    name: str
    path: Path
    whole: Any
    passing: _Passing

    def get_shape(self) -> list[int]:
        """Gives the whole tensor's shape."""
        shape: list[int] = self.whole.get_shape()
        return shape

    def get_dtype(self) -> str:
        """Gives its element type as safetensors names it."""
        dtype: str = self.whole.get_dtype()
        return dtype

    @property
    def dtype(self) -> torch.dtype:
        """Its element type; of those that `is_floating_point` tells."""
        return _DTYPES[self.get_dtype()]

    def is_floating_point(self) -> bool:
        """Whether its elements are numbers of a type that models run in."""
        return self.get_dtype() in _DTYPES

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor: torch.Tensor = self.whole[index]
        if tensor.is_contiguous():
            return tensor
        num_bytes = torch.Size(self.get_shape()).numel() * tensor.element_size()
        columns: torch.Tensor = self.passing.file(self.path, num_bytes).get_slice(self.name)[index]
        return columns.contiguous()
