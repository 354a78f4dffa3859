"""Counts what crosses between ranks for reads of split tensors, and compares what they give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil
import torch

from insitu import LanguageModel
from insitu_shard.engine.layout import Split
from insitu_shard.engine.regions import Region
from support.split_cases import IDS, TOLERANCE, split_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from insitu_shard.engine.ranks import Ranks

Case = dict[str, Any]


def gathered(ranks: Ranks, folder: Path) -> dict[str, tuple[int, bool]]:
    """Runs each case split and whole.

    Returns:
        Of each case the bytes that were gathered, and whether it gave what a whole model gives.
    """
    split, whole = split_model(folder, ranks), LanguageModel(str(folder))
    return {case.__name__.strip("_"): _counted(case, split, whole, ranks) for case in _CASES}


def _counted(
    case: Callable[[Any], Case], split: LanguageModel, whole: LanguageModel, ranks: Ranks
) -> tuple[int, bool]:
    before = ranks.collectives.gathered_bytes
    actual = case(split)
    num_bytes = ranks.collectives.gathered_bytes - before
    expected = case(whole)
    is_same = all(
        torch.allclose(actual[name], value, rtol=TOLERANCE, atol=TOLERANCE)
        for name, value in expected.items()
    )
    return num_bytes, is_same


def _everything(model: Any) -> Case:
    with model.trace(IDS):
        value = model.model.layers[1].mlp.up_proj.output.save()
    return {"value": value}


def _one_position(model: Any) -> Case:
    with model.trace(IDS):
        value = model.model.layers[1].mlp.up_proj.output[:, -1].save()
    return {"value": value}


def _one_position_of_an_input(model: Any) -> Case:
    with model.trace(IDS):
        value = model.model.layers[1].mlp.down_proj.input[0, 2].save()
    return {"value": value}


def _three_columns_of_one_rank(model: Any) -> Case:
    with model.trace(IDS):
        value = model.model.layers[1].mlp.up_proj.output[..., -3:].save()
    return {"value": value}


def _columns_of_both_ranks(model: Any) -> Case:
    with model.trace(IDS):
        up_proj = model.model.layers[1].mlp.up_proj
        middle = up_proj.output.shape[-1] // 2
        value = up_proj.output[:, 1:3, middle - 2 : middle + 2].save()
    return {"value": value}


def _two_positions_used_apart(model: Any) -> Case:
    with model.trace(IDS):
        up = model.model.layers[1].mlp.up_proj.output
        first, second = up[:, 2].sum(-1).save(), up[:, 3].norm().save()
    return {"first": first, "second": second}


def _positions_of_traces_that_share_a_pass(model: Any) -> Case:
    found = {}
    with model.session():
        for number, ids in enumerate((IDS, IDS[::-1])):
            with model.trace(ids):
                up = model.model.layers[1].mlp.up_proj.output
                found[f"trace {number}"] = up[:, 3 + number].save()
    return found


def _positions_of_invokes(model: Any) -> Case:
    found = {}
    with model.trace() as tracer:
        for number, ids in enumerate((IDS, IDS[::-1])):
            with tracer.invoke(ids):
                up = model.model.layers[1].mlp.up_proj.output
                found[f"invoke {number}"] = up[:, 3 + number].save()
    return found


def _a_part_beside_the_whole(model: Any) -> Case:
    with model.trace(IDS):
        up = model.model.layers[1].mlp.up_proj.output
        part, total = up[:, -1].save(), up.sum().save()
    return {"part": part, "total": total}


def _a_part_beside_a_write(model: Any) -> Case:
    with model.trace(IDS):
        up = model.model.layers[1].mlp.up_proj.output
        part = up[:, -1].save()
        up[:, 2] = 0.5
        hidden = model.model.layers[1].output[0].save()
    return {"part": part, "hidden": hidden}


def _a_part_that_a_later_step_uses_whole(model: Any) -> Case:
    with model.session():
        with model.trace(IDS):
            up = model.model.layers[1].mlp.up_proj.output
            part = up[:, -1].save()
        total = up.sum().save()
    return {"part": part, "total": total}


_CASES = (
    _everything,
    _one_position,
    _one_position_of_an_input,
    _three_columns_of_one_rank,
    _columns_of_both_ranks,
    _two_positions_used_apart,
    _positions_of_traces_that_share_a_pass,
    _positions_of_invokes,
    _a_part_beside_the_whole,
    _a_part_beside_a_write,
    _a_part_that_a_later_step_uses_whole,
)


def memory_of_a_region(ranks: Ranks) -> tuple[int, list[float]]:
    """Gathers one position of what would be a GiB, in bfloat16.

    Returns:
        The bytes that this process has more of then, and elements: of an earlier position, and the
        first and the last of the one that was asked for.
    """
    # [1, positions, width], each rank's all of one number, without memory
    local = torch.full((1,), ranks.rank + 1, dtype=torch.bfloat16).expand(1, 4096, 2**16)
    region = Region((0, 4095, 0), (1, 4096, 2**17))
    before = psutil.Process().memory_info().rss
    full = Split(-1, 2**17).gather_region(local, ranks, region)
    held = psutil.Process().memory_info().rss - before
    return held, [full[0, 7, 3].item(), full[0, -1, 0].item(), full[0, -1, -1].item()]


def packed_regions(ranks: Ranks) -> list[tuple[int, bool]]:
    """Gathers boxes of a tensor that has three parts beside each other, each split.

    Returns:
        Of each box the bytes that were gathered, and whether it has what the whole has there, and
        nothing elsewhere.
    """
    full = torch.arange(1.0, 2 * 5 * 36 + 1).view(2, 5, 36)
    split = Split(-1, 36, num_parts=3)
    local = split.scatter(full, ranks)
    found = []
    for start, stop in [(0, 36), (12, 24), (3, 5), (10, 13), (7, 31)]:
        region = Region((0, 4, start), (2, 5, stop))
        before = ranks.collectives.gathered_bytes
        actual = split.gather_region(local, ranks, region)
        expected = torch.zeros_like(full)
        region.of(expected).copy_(region.of(full))
        num_bytes = ranks.collectives.gathered_bytes - before
        found.append((num_bytes, torch.equal(actual, expected)))
    return found
