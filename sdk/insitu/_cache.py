"""Saves what many modules return, in one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from insitu._envoy import Envoy
from insitu._proxy import Proxy, as_meta

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from insitu._base_model import BaseModel
    from insitu._structure import ModuleTree
    from insitu_proto.v1 import model_pb2


@dataclass(slots=True)
class CacheEntry:
    """What a cache has of one module."""

    output: Any = None
    """What the module returned, or what was made of it; None if not asked for."""
    input: Any = None
    """Its first argument, or what was made of it; None if not asked for."""


class Cache(dict[str, CacheEntry]):
    """What modules returned, by path; there after the trace's session has run."""

    def __init__(
        self,
        model: BaseModel,
        tree: ModuleTree,
        modules: Sequence[str | Envoy] | None,
        include_output: bool,
        include_inputs: bool,
        reduce: Callable[[torch.Tensor], object] | None,
    ) -> None:
        super().__init__()
        self._model = model
        self._include_output = include_output
        self._include_inputs = include_inputs
        self._reduce = reduce
        self._envoys = (
            [model.get(path) for path in _cacheable(tree)]
            if modules is None
            else [at if isinstance(at, Envoy) else model.get(at) for at in modules]
        )

    def record(self) -> None:
        """Adds the reads and saves to the open trace."""
        for envoy in self._envoys:
            entry = self[envoy.path] = CacheEntry()
            if self._include_output:
                entry.output = self._saved(envoy.output)
            if self._include_inputs:
                entry.input = self._saved(envoy.input)

    def _saved(self, value: Any) -> Any:
        value = pytree.tree_map_only(Proxy, self._reduced, value)
        for part in pytree.tree_leaves(value):
            if isinstance(part, Proxy):
                part.save()
        return value

    def _reduced(self, value: Proxy) -> object:
        if not isinstance(as_meta(value), torch.Tensor):
            # No tensor: a flag or a cache among the arguments.
            return None
        return self._reduce(value) if self._reduce is not None else value


def _cacheable(tree: ModuleTree) -> list[str]:
    """Gives the modules that a forward pass calls and that return tensors."""
    return [
        module.path
        for module in tree.modules
        if module.path
        and module.call_order
        and not module.is_point
        and _returns_tensors(module.output)
    ]


def _returns_tensors(spec: model_pb2.StructureSpec) -> bool:
    kind = spec.WhichOneof("kind")
    if kind in ("tuple", "list"):
        return all(_returns_tensors(item) for item in getattr(spec, kind).items)
    return kind == "tensor"
