"""Runs sessions over a torch module of the user's own, in this process."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from insitu.backends.local import LocalBackend
from insitu_shard import engine

if TYPE_CHECKING:
    from insitu_proto.v1 import model_pb2


class ModuleBackend(LocalBackend):
    """Runs sessions over one torch module."""

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        super().__init__(name)
        self._module = module

    def describe(self, model: str) -> model_pb2.ModelDescription:
        """Describes the module without shapes."""
        return self.describe_for("", None)[0]

    def describe_for(
        self, path: str, arguments: tuple[tuple[Any, ...], dict[str, Any]] | None
    ) -> tuple[model_pb2.ModelDescription, list[tuple[str, bool, int]]]:
        """Describes the module at a path with the shapes of a run; see `engine.describe_module`."""
        with self._running:
            return engine.describe_module(self._model, path, arguments)

    @cached_property
    def _model(self) -> engine.LoadedModule:
        parameter = next(self._module.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        return engine.LoadedModule(name=self._name, module=self._module, device=device)
