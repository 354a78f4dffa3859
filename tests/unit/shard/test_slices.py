"""What a rank reads of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from insitu_shard.engine.slices import lazy_state_dict
from support.tiny_models import TinyModels

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def sharded(tiny: TinyModels, tmp_path: Path) -> Path:
    tiny.module("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    return tmp_path


def test_every_slice_of_every_tensor_is_that_of_the_file(sharded: Path) -> None:
    stored = {k: v for file in sharded.glob("*.safetensors") for k, v in load_file(file).items()}
    with lazy_state_dict(sharded) as tensors:
        assert tensors.keys() == stored.keys()
        for name, whole in stored.items():
            lazy = tensors[name]
            assert lazy.get_shape() == list(whole.shape)
            assert (lazy.dtype, lazy.is_floating_point()) == (torch.float32, True)
            assert torch.equal(lazy[...], whole)
            for index in ((slice(3, 40),), (slice(0, 64), slice(16, 48))):
                if whole.ndim == len(index):
                    assert torch.equal(lazy[index], whole[index])


def test_rows_are_a_view_of_the_file_and_columns_memory_of_their_own(sharded: Path) -> None:
    with lazy_state_dict(sharded) as tensors:
        rows = tensors[NAME][0:32, :]
        columns = tensors[NAME][:, 0:64]
        expected = columns.clone()
    assert rows.untyped_storage().nbytes() > rows.nbytes
    assert columns.is_contiguous()
    assert columns.untyped_storage().nbytes() == columns.nbytes
    assert torch.equal(columns, expected)
