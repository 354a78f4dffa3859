"""How the devices of a group share its model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from insitu import ConfigurationError
from insitu_shard.config import Placement, ShardConfig
from insitu_shard.placing import with_placement
from insitu_shard.preflight import check_before_start
from support.tiny_models import TinyModels


def _config(tiny: TinyModels, family: str, **settings: object) -> ShardConfig:
    folder = str(tiny.folder(family))
    return ShardConfig(model="tiny", model_path=folder, scheduler="127.0.0.1:1", **settings)


def test_a_model_is_split_where_it_can_be(tiny: TinyModels) -> None:
    placed = with_placement(_config(tiny, "llama", num_ranks=2))
    assert (placed.placement, placed.num_ranks, placed.spread) == (Placement.TP, 2, None)


def test_a_limit_of_memory_spreads_it_in_one_rank(tiny: TinyModels) -> None:
    placed = with_placement(_config(tiny, "llama", num_ranks=2, max_memory="cpu=1MiB"))
    assert (placed.placement, placed.num_ranks) == (Placement.SPREAD, 1)
    assert placed.spread is not None
    assert placed.spread.max_memory == {"cpu": 2**20}


def test_a_model_that_can_not_be_split_is_spread_where_there_are_gpus(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tiny, "llama", num_ranks=5, max_memory="")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigurationError, match="5 ranks"):
        with_placement(config)
    asked = with_placement(replace(config, placement=Placement.SPREAD))
    assert (asked.num_ranks, set(asked.spread.max_memory)) == (1, {"cpu"})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    assert with_placement(config).placement is Placement.SPREAD


def test_a_limit_of_memory_is_not_for_a_split_model(tiny: TinyModels) -> None:
    with pytest.raises(ConfigurationError, match="--max-memory"):
        _config(tiny, "llama", placement=Placement.TP, max_memory="cpu=1GiB")


def test_more_ranks_than_gpus_are_refused_before_any_starts(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tiny, "llama", num_ranks=2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigurationError, match=r"2 ranks here, .* shows 1 GPU"):
        check_before_start(config)
    # Two nodes with one each are enough.
    check_before_start(replace(config, num_nodes=2, rendezvous="node-0"))


@pytest.mark.parametrize(("cuda", "said"), [(None, "built for CPUs alone"), ("13.0", "driver")])
def test_where_gpus_are_required_a_machine_without_any_is_refused(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, cuda: str | None, said: str
) -> None:
    config = _config(tiny, "llama", num_ranks=2, needs_gpus=True)
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigurationError, match=f"shows no GPU; .*{said}"):
        check_before_start(config)
    check_before_start(replace(config, needs_gpus=False))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_before_start(config)
