"""Shows whole tensors at boundaries that tensor parallelism splits over the ranks.

transformers' plans do not say how each boundary is split, so it is found out once: the shapes that
a rank sees in a probe, beside those of the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from insitu_shard.engine.measure import Measurement
    from insitu_shard.engine.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Split:
    """Along which dimension a tensor is split, and its whole size there."""

    dim: int
    full_size: int


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

    def gather(self, value: Any) -> Any:
        """Gives the whole value, joined from all ranks. Every rank must call it."""
        return pytree.tree_map_with_path(self._gather_leaf, value) if self.splits else value

    def scatter(self, value: Any) -> Any:
        """Gives this rank's part of a whole value."""
        return pytree.tree_map_with_path(self._scatter_leaf, value) if self.splits else value

    def _gather_leaf(self, path: pytree.KeyPath, leaf: object) -> object:
        split = self._split(path, leaf)
        if split is None or self.ranks is None or not isinstance(leaf, torch.Tensor):
            return leaf
        return self.ranks.gather(leaf, dim=split.dim, full_size=split.full_size)

    def _scatter_leaf(self, path: pytree.KeyPath, leaf: object) -> object:
        split = self._split(path, leaf)
        if split is None or self.ranks is None or not isinstance(leaf, torch.Tensor):
            return leaf
        return self.ranks.local_chunk(leaf, dim=split.dim)

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


def find_layouts(full: Measurement, local: Measurement, ranks: Ranks) -> Layouts:
    """Compares what a rank sees with the whole model, both measured over the same probe."""

    def compare(full_values: Mapping[str, Any], local_values: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for path, value in local_values.items():
            splits = _splits(full_values[path], value, ranks) if path in full_values else {}
            if splits:
                found[path] = BoundaryLayout(splits, ranks)
        return found

    return Layouts(
        inputs=compare(full.inputs, local.inputs), outputs=compare(full.outputs, local.outputs)
    )


def _splits(full: Any, local: Any, ranks: Ranks) -> dict[str, Split | None]:
    full_leaves = dict(pytree.tree_flatten_with_path(full)[0])
    found: dict[str, Split | None] = {}
    for path, leaf in pytree.tree_flatten_with_path(local)[0]:
        whole = full_leaves.get(path)
        if not isinstance(leaf, torch.Tensor) or not isinstance(whole, torch.Tensor):
            continue
        if leaf.shape != whole.shape:
            found[pytree.keystr(path)] = _split(whole.shape, leaf.shape, ranks)
    return found


def _split(full: torch.Size, local: torch.Size, ranks: Ranks) -> Split | None:
    dims = [
        dim for dim, (whole, part) in enumerate(zip(full, local, strict=False)) if whole != part
    ]
    if len(full) != len(local) or len(dims) != 1:
        return None
    (dim,) = dims
    if local[dim] != ranks.chunk_size(full[dim]):
        return None
    return Split(dim - len(full), full[dim])
