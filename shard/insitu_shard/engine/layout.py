"""Shows whole tensors at boundaries that tensor parallelism splits over the ranks.

transformers' plans do not say how each boundary is split, so it is found out once: the shapes that
a rank sees in a probe, beside those of the whole model.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils import _pytree as pytree

from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from insitu_shard.engine.measure import Measurement
    from insitu_shard.engine.ranks import Ranks
    from insitu_shard.engine.regions import Region

# Of less than that the pages are not worth a call of the system.
_LARGE_BYTES = 1024**2


@dataclass(frozen=True, slots=True)
class Split:
    """Along which dimension a tensor is split, and how.

    Of a packed tensor, such as queries, keys and values beside each other, each part is split.
    """

    dim: int
    """Counted from the last, which is -1."""
    full_size: int
    num_parts: int = 1

    def gather(self, local: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        """Gives the whole tensor, joined from all ranks. Every rank must call it."""
        size = self.full_size // self.num_parts
        if self.num_parts == 1:
            return ranks.gather(local, dim=self.dim, full_size=size)
        parts = local.unflatten(self.dim, (self.num_parts, -1))
        return ranks.gather(parts, dim=self.dim, full_size=size).flatten(self.dim - 1, self.dim)

    def gather_region(self, local: torch.Tensor, ranks: Ranks, region: Region) -> torch.Tensor:
        """Gives a tensor like the whole that is zero outside of a region. Every rank must call it.

        Only what the region has crosses between the ranks; on the CPU only that takes memory. No
        gradient goes through it.
        """
        full = _zeros_like(local, self.full_shape(local))
        if region.is_empty:
            return full
        dim = full.ndim + self.dim
        start, stop = region.starts[dim], region.stops[dim]
        size = self.full_size // self.num_parts
        pieces = [
            ranks.gather_range(part, dim=dim, full_size=size, start=first, stop=after)
            for number, part in enumerate(
                region.of(local, but=dim).tensor_split(self.num_parts, dim)
            )
            if (first := max(start - number * size, 0)) < (after := min(stop - number * size, size))
        ]
        region.of(full).copy_(torch.cat(pieces, dim))
        return full

    def full_shape(self, local: torch.Tensor) -> list[int]:
        """Gives the shape of the whole tensor."""
        shape = list(local.shape)
        shape[self.dim] = self.full_size
        return shape

    def scatter(self, full: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        """Gives this rank's part of a whole tensor."""
        if self.num_parts == 1:
            return ranks.local_chunk(full, dim=self.dim)
        parts = full.unflatten(self.dim, (self.num_parts, -1))
        return ranks.local_chunk(parts, dim=self.dim).flatten(self.dim - 1, self.dim)


def _zeros_like(local: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Gives zeros of a tensor's type, on the CPU in pages that are not there until written to."""
    num_bytes = math.prod(shape) * local.element_size()
    if local.device.type != "cpu" or num_bytes < _LARGE_BYTES:
        return local.new_zeros(shape)
    # torch would write the zeros itself, so that all pages are there.
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=local.dtype).view(*shape)


@dataclass(frozen=True, slots=True)
class BoundaryLayout:
    """How the tensors at one boundary are split; by their place in its structure."""

    splits: Mapping[str, Split | None] = field(default_factory=dict)
    """None for a tensor whose split is not understood."""
    ranks: Ranks | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether any tensor is split."""
        return bool(self.splits)

    def gather(self, value: Any, region: Region | None = None) -> Any:
        """Gives the whole value, joined from all ranks. Every rank must call it.

        Args:
            value: what this rank has.
            region: what is needed of its one split tensor; None for all. The rest is zeros.
        """
        gather = partial(self._gather_leaf, region=region)
        return pytree.tree_map_with_path(gather, value) if self.splits else value

    def full_shape(self, value: object, tensor: object) -> list[int] | None:
        """Gives the whole shape of a tensor in a value; None unless it alone is split."""
        split_leaves = [
            (leaf, split)
            for path, leaf in pytree.tree_flatten_with_path(value)[0]
            if (split := self.splits.get(pytree.keystr(path))) is not None
        ]
        match split_leaves:
            case [(torch.Tensor() as leaf, split)] if leaf is tensor and len(self.splits) == 1:
                return split.full_shape(leaf)
        return None

    def scatter(self, value: Any) -> Any:
        """Gives this rank's part of a whole value."""
        return pytree.tree_map_with_path(self._scatter_leaf, value) if self.splits else value

    def _gather_leaf(self, path: pytree.KeyPath, leaf: object, *, region: Region | None) -> object:
        split = self._split(path, leaf)
        if split is None or self.ranks is None or not isinstance(leaf, torch.Tensor):
            return leaf
        if region is None or region.is_all_of(split.full_shape(leaf)):
            return split.gather(leaf, self.ranks)
        return split.gather_region(leaf, self.ranks, region)

    def _scatter_leaf(self, path: pytree.KeyPath, leaf: object) -> object:
        split = self._split(path, leaf)
        if split is None or self.ranks is None or not isinstance(leaf, torch.Tensor):
            return leaf
        return split.scatter(leaf, self.ranks)

    def _split(self, path: pytree.KeyPath, leaf: object) -> Split | None:
        key = pytree.keystr(path)
        if key not in self.splits or not isinstance(leaf, torch.Tensor):
            return None
        if (split := self.splits[key]) is None:
            raise error(
                Reason.UNSUPPORTED_FEATURE,
                "this tensor is split over the ranks in a way that can not be shown whole; read "
                "the module before or after",
                place=key,
            )
        return split


_WHOLE = BoundaryLayout()


@dataclass(frozen=True, slots=True)
class Layouts:
    """The layouts of all boundaries that are split; every other boundary is whole on each rank."""

    inputs: Mapping[str, BoundaryLayout] = field(default_factory=dict)
    outputs: Mapping[str, BoundaryLayout] = field(default_factory=dict)

    def at(self, module_path: str, *, is_input: bool) -> BoundaryLayout:
        """Gives the layout of a module's input or output."""
        return (self.inputs if is_input else self.outputs).get(module_path, _WHOLE)


def find_layouts(
    full: Measurement, local: Measurement, ranks: Ranks, packed: Mapping[str, int]
) -> Layouts:
    """Compares what a rank sees with the whole model, both measured over the same probe.

    Args:
        full: of the whole model.
        local: of this rank.
        ranks: this rank's place.
        packed: of how many parts the output of a module is packed, by path; shapes do not tell.
    """

    def compare(
        full_values: Mapping[str, Any], local_values: Mapping[str, Any], packed: Mapping[str, int]
    ) -> dict[str, Any]:
        found = {}
        for path, value in local_values.items():
            num_parts = packed.get(path, 1)
            whole = full_values.get(path)
            if splits := _splits(whole, value, ranks, num_parts):
                found[path] = BoundaryLayout(splits, ranks)
        return found

    return Layouts(
        inputs=compare(full.inputs, local.inputs, {}),
        outputs=compare(full.outputs, local.outputs, packed),
    )


def packed_outputs(module: torch.nn.Module) -> dict[str, int]:
    """Gives of how many parts the outputs of modules are packed, by path, where it is several."""
    found: dict[str, int] = {}
    for path, part in module.named_modules():
        weight = getattr(part, "weight", None)
        for placement in getattr(weight, "placements", ()):
            if isinstance(placement, _StridedShard):
                found[path] = int(placement.split_factor)
    return found


def _splits(full: Any, local: Any, ranks: Ranks, num_parts: int) -> dict[str, Split | None]:
    full_leaves = dict(pytree.tree_flatten_with_path(full)[0])
    found: dict[str, Split | None] = {}
    for path, leaf in pytree.tree_flatten_with_path(local)[0]:
        whole = full_leaves.get(path)
        if not isinstance(leaf, torch.Tensor) or not isinstance(whole, torch.Tensor):
            continue
        if leaf.shape != whole.shape:
            found[pytree.keystr(path)] = _split(whole.shape, leaf.shape, ranks, num_parts)
    return found


def _split(full: torch.Size, local: torch.Size, ranks: Ranks, num_parts: int = 1) -> Split | None:
    dims = [
        dim for dim, (whole, part) in enumerate(zip(full, local, strict=False)) if whole != part
    ]
    if len(full) != len(local) or len(dims) != 1:
        return None
    (dim,) = dims
    if local[dim] != num_parts * ranks.chunk_size(full[dim] // num_parts):
        return None
    return Split(dim - len(full), full[dim], num_parts)
