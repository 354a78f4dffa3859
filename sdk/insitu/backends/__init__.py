"""Where sessions run: behind one small interface, in this process or on a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

    from insitu_proto.v1 import model_pb2, session_pb2

    OnTokens = Callable[[int, int, Sequence[int]], None]
    """Takes the number of a trace, from 1, a step, from 0, and the token id of each row."""


class Backend(Protocol):
    """Runs sessions and tells what models look like."""

    def describe(self, model: str) -> model_pb2.ModelDescription:
        """Describes a model's structure."""

    def tokenizer_folder(self, description: model_pb2.ModelDescription) -> Path:
        """Gives a local folder that holds the model's tokenizer."""

    def run(
        self,
        session: session_pb2.Session,
        tensors: Mapping[int, torch.Tensor],
        others: Sequence[Any] = (),
        on_tokens: OnTokens | None = None,
    ) -> Iterator[tuple[int, object]]:
        """Runs a session and yields saved values by the id of their save node.

        `tensors` are those of the session's list whose elements are not inside it, by their place.
        `others` are the backends of all its models, where each model has one of its own.
        `on_tokens` is told the tokens of traces that stream them, as they are chosen.
        Values of traces that ran before a failure are yielded before the error is raised.
        """

    def release_handle(self, handle_id: str) -> None:
        """Lets go of a value that a session kept; one that is gone already is fine."""

    def close(self) -> None:
        """Frees what the backend holds."""
