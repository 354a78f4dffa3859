"""Measures the shapes at every module boundary by running the model once."""

from __future__ import annotations

import itertools
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from insitu_shard.engine.transformers_internals import GradientCheckpointingLayer

if TYPE_CHECKING:
    from collections.abc import Iterator

PROBE_SIZES = ((3, 7), (2, 11))
"""Batch sizes and lengths of probes: coprime, so that a size tells what it is made of."""


Moment = tuple[str, bool, int]
"""Module path, whether its call begins or else ends, and which call of it this is, from 0."""


@dataclass(slots=True)
class Measurement:
    """What went through the module boundaries in one forward pass."""

    inputs: dict[str, tuple[tuple[object, ...], dict[str, object]]] = field(default_factory=dict)
    """Arguments of each module's first call, by path."""
    outputs: dict[str, object] = field(default_factory=dict)
    """Result of each module's first call, by path."""
    moments: list[Moment] = field(default_factory=list)
    """All that was entered and left, in order."""

    @property
    def call_order(self) -> dict[str, int]:
        """Place of each module in the order of first calls, from 1."""
        return {path: place for place, path in enumerate(self.inputs, 1)}


def measure(module: torch.nn.Module, size: tuple[int, int], device: torch.device) -> Measurement:
    """Runs one forward pass over a probe of (batch size, length) and records its boundaries."""
    with recorded(module) as measurement, torch.no_grad():
        module(input_ids=torch.zeros(size, dtype=torch.long, device=device), use_cache=False)
    return measurement


@contextmanager
def recorded(module: torch.nn.Module) -> Iterator[Measurement]:
    """Records what goes through the boundaries of a module and those below, for a while."""
    measurement = Measurement()
    with ExitStack() as hooks:
        for path, part in module.named_modules():
            hooks.enter_context(_recording(part, path, measurement))
        yield measurement


@contextmanager
def _recording(part: torch.nn.Module, path: str, measurement: Measurement) -> Iterator[None]:
    num_entered, num_left = itertools.count(), itertools.count()

    def before(_: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        measurement.inputs.setdefault(path, (args, kwargs))
        measurement.moments.append((path, True, next(num_entered)))

    def after(_: torch.nn.Module, __: object, result: object) -> None:
        measurement.outputs.setdefault(path, result)
        measurement.moments.append((path, False, next(num_left)))

    with (
        part.register_forward_pre_hook(before, with_kwargs=True),
        part.register_forward_hook(after),
    ):
        yield


def block_paths(module: torch.nn.Module) -> frozenset[str]:
    """Gives the paths of the decoder layers.

    transformers derives every family's decoder layer from one class, for the sake of checkpointing.
    """
    return frozenset(
        path
        for path, part in module.named_modules()
        if isinstance(part, GradientCheckpointingLayer)
    )
