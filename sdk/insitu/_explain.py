"""Plans sessions as the engine plans them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from insitu._brought import session_tensors
from insitu_shard import engine

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from insitu_proto.v1 import model_pb2, session_pb2
    from insitu_shard.compiler import Explanation


def explain(
    session: session_pb2.Session,
    descriptions: Mapping[str, model_pb2.ModelDescription],
    tensors: Mapping[int, torch.Tensor],
) -> Explanation:
    """Plans a session, as far as it is recorded.

    Args:
        session: the session.
        descriptions: its models, by name.
        tensors: those of the session's list whose elements are not inside it, by their place.
    """
    return engine.explain(session, descriptions, list(session_tensors(session, tensors)))
