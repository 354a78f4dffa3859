"""Settings of a shard group."""

from __future__ import annotations

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
