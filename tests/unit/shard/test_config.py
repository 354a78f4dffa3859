"""Settings of a shard group."""

from __future__ import annotations

from typing import Any

import pytest

from insitu_shard.config import ShardConfig
from insitu_wire.errors import ConfigurationError


@pytest.mark.parametrize(
    ("setting", "flag"),
    [("max_sessions", "--max-sessions is 0"), ("num_ranks", "--tp is 0")],
)
def test_a_group_has_a_rank_and_room_for_a_session(setting: str, flag: str) -> None:
    with pytest.raises(ConfigurationError, match=flag):
        ShardConfig("tiny", "tiny", "127.0.0.1:1", **{setting: 0})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_ranks": 3, "num_nodes": 2}, "--nodes is 2, and --tp 3"),
        ({"num_ranks": 2, "num_nodes": 2, "node_rank": 2}, "0 to 1"),
        ({"num_ranks": 2, "num_nodes": 2}, "--rendezvous"),
    ],
)
def test_nodes_have_equal_parts_numbers_and_a_place_to_meet(
    settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        ShardConfig(model="m", model_path="m", scheduler="127.0.0.1:1", **settings)
