"""The head gets its argument in one piece of memory, whoever calls it."""

from __future__ import annotations

import pytest
import torch

from insitu import LanguageModel
from insitu_shard.engine.head_input import packed_rows
from support.tiny_models import TinyModels

IDS = [[5, 9, 17, 23], [3, 4, 5, 6], [7, 8, 9, 1]]


@pytest.mark.parametrize("num_rows", [1, 3])
def test_slices_are_packed(num_rows: int) -> None:
    hidden = torch.randn(num_rows, 4, 8)[:, -1:]
    packed = packed_rows(hidden)
    assert torch.equal(packed, hidden)
    assert packed.stride() == torch.empty(packed.shape).stride()
    assert packed_rows(packed).data_ptr() == packed.data_ptr()


@pytest.mark.parametrize("num_rows", [1, 3])
def test_the_head_gets_packed_rows_in_passes_and_in_calls_of_sessions(
    num_rows: int, tiny: TinyModels
) -> None:
    model = LanguageModel(str(tiny.folder("llama")))
    strides: list[tuple[torch.Size, tuple[int, ...]]] = []
    module = model._backend._model.module  # type: ignore[attr-defined]
    seen = module.lm_head.register_forward_pre_hook(
        lambda _, args: strides.append((args[0].shape, args[0].stride()))
    )
    with seen:
        with model.trace(IDS[:num_rows]):
            model.lm_head(model.model.norm(model.model.layers[1].output[0])[:, -2:]).save()
            model.lm_head.output[:, -1].save()
        with torch.no_grad():
            module(torch.tensor(IDS[:num_rows]), logits_to_keep=1)
    assert len(strides) == 3
    for shape, stride in strides:
        assert stride == torch.empty(shape).stride()
