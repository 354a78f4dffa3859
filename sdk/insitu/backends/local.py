"""Runs sessions in this process, with the engine that shards run."""

from __future__ import annotations

import sys
import uuid
from contextlib import ExitStack
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING

import torch

from insitu._brought import session_tensors
from insitu._logging import log_event
from insitu_proto.v1 import shard_service_pb2
from insitu_shard import engine

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from insitu.backends import OnTokens
    from insitu_proto.v1 import model_pb2, session_pb2


_KEPT = engine.KeptValues(sys.maxsize)
"""What sessions of this process keep; the user's own memory is the only limit."""


class LocalBackend:
    """Runs sessions over one model in this process; its weights are loaded at the first."""

    def __init__(self, model: str, *, dtype: torch.dtype | None = None) -> None:
        self._name = model
        self._dtype = dtype
        # The model runs one session at a time: its hooks are the session's.
        self._running = Lock()

    def describe(self, model: str) -> model_pb2.ModelDescription:
        """Describes the model from its configuration, without weights."""
        config = engine.load_config(self._folder)
        dtype = self._dtype or getattr(config, "dtype", None) or torch.float32
        return engine.describe(config, name=model, dtype=dtype)

    def tokenizer_folder(self, description: model_pb2.ModelDescription) -> Path:
        """Gives the model's own folder."""
        return self._folder

    def run(
        self,
        session: session_pb2.Session,
        tensors: Mapping[int, torch.Tensor],
        others: Sequence[LocalBackend] = (),
        on_tokens: OnTokens | None = None,
    ) -> Iterator[tuple[int, object]]:
        """Runs a session and yields saved values.

        Args:
            session: the session.
            tensors: see `Backend.run`.
            others: the backends of all models that its traces run on, if not this one's alone.
            on_tokens: is told tokens as they are chosen.
        """
        name = f"local-{uuid.uuid4().hex[:8]}"
        segment = shard_service_pb2.Segment(
            steps=session.steps,
            locations=session.locations,
            first_trace_number=1,
            seed=session.seed,
            exact=session.exact,
            padding=session.padding,
            checkpoint=session.checkpoint,
        )
        with ExitStack() as running:
            # In one order, so that no two sessions wait for each other.
            backends = sorted({self, *others}, key=id)
            for backend in backends:
                running.enter_context(backend._running)
            models = {backend._name: backend._model for backend in backends}
            brought = [
                tensor.to(self._model.device) for tensor in session_tensors(session, tensors)
            ]
            run = engine.SegmentRun(models, segment, values={}, tensors=brought, handles=_KEPT)
            for event in run.run():
                match event:
                    case engine.Logged(message=message):
                        log_event(name, "LOG", message)
                    case engine.TokensChosen() if on_tokens is not None:
                        on_tokens(event.trace_number, event.step, event.token_ids)
                    case engine.Saved(node_id=node_id, value=value):
                        yield node_id, value

    def release_handle(self, handle_id: str) -> None:
        """Lets go of a value that a session kept."""
        _KEPT.pop(handle_id, None)

    def close(self) -> None:
        """Frees the model's weights."""
        self.__dict__.pop("_model", None)

    @cached_property
    def _folder(self) -> Path:
        return engine.resolve_model_folder(self._name)

    @cached_property
    def _model(self) -> engine.LoadedModule:
        return engine.load_model(self._name, self._folder, dtype=self._dtype)
