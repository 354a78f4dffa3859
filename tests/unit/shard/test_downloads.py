"""Saved values on their way out; on a CPU they are there already."""

from __future__ import annotations

import torch

from insitu_shard.downloads import Download, Downloads
from insitu_shard.engine import Logged, Saved


async def test_without_a_gpu_a_value_is_passed_on_as_it_is() -> None:
    saved = Saved(1, "x", {"value": torch.ones(3)})
    download = Downloads(torch.device("cpu")).begun(saved)
    assert isinstance(download, Download)
    assert await download.finished() is saved


def test_what_is_no_value_is_told_at_once() -> None:
    logged = Logged("hello")
    assert Downloads(torch.device("cpu")).begun(logged) is logged
