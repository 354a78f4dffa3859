"""A session that is cancelled in the middle of a pass, as one rank of a group hears of it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from insitu_proto.v1.shard_service_pb2 import Segment
from insitu_shard.engine import Saved, SegmentPool, SegmentRun
from support.split_cases import split_model

if TYPE_CHECKING:
    from pathlib import Path

    from insitu import LanguageModel
    from insitu_shard.engine.ranks import Ranks


def cancelled(ranks: Ranks, folder: Path, num_rows: int) -> dict[str, Any]:
    """Cancels a session on rank 0 as the first layer of its pass has run.

    Returns:
        The layers that ran, whether the pool is idle then, and whether the next session gives what
        it gave before.
    """
    model = split_model(folder, ranks)
    pool = SegmentPool()
    rows = [[5, 9, 17, 23] * 4] * num_rows
    before = _logits(model, pool, rows)
    reached: list[str] = []
    loaded = model._local._model
    with ExitStack() as hooks:
        for path in sorted(loaded.block_paths):

            def reach(*_: object, path: str = path) -> None:
                reached.append(path)
                if ranks.rank == 0 and len(reached) == 1:
                    pool.cancel("gone")

            hook = loaded.modules[path].register_forward_hook(reach)
            hooks.callback(hook.remove)
        pool.add("gone", _run(model, rows))
        told = [event for _, event in pool.round()]
    is_idle = pool.is_idle
    pool.drop("gone")
    after = _logits(model, pool, rows)
    return {
        "reached": reached,
        "is_idle": is_idle,
        "has_saved": any(isinstance(event, Saved) for event in told),
        "is_as_before": torch.equal(after, before),
    }


def _run(model: LanguageModel, rows: list[list[int]]) -> SegmentRun:
    with model.session(run=False) as session, model.trace(rows):
        model.lm_head.output.save()
    recorded = session._recorder.session
    segment = Segment(
        steps=recorded.steps, locations=recorded.locations, first_trace_number=1, seed=recorded.seed
    )
    return SegmentRun({model.name: model._local._model}, segment, values={})


def _logits(model: LanguageModel, pool: SegmentPool, rows: list[list[int]]) -> torch.Tensor:
    pool.add("whole", _run(model, rows))
    values = []
    while len(pool):
        values += [event.value for _, event in pool.round() if isinstance(event, Saved)]
    (logits,) = values
    assert isinstance(logits, torch.Tensor)
    return logits
