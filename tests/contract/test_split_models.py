"""A model that is split over ranks gives what a whole one gives, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from transformers import AutoConfig

from support.cancelled_passes import cancelled
from support.gathered import gathered, memory_of_a_region, packed_regions
from support.lone_failures import outcomes, outcomes_in_the_model
from support.on_ranks import on_ranks
from support.random_sessions import sessions
from support.split_cases import IDS, differences, gradients
from support.tiny_models import SPLIT_CONFIGS, TinyModels

FAMILIES = [
    "llama",
    "qwen3",
    "gemma3",
    "gpt_neox",
    "mixtral",
    "gpt2",
    "phi3",
    "opt",
    "gptj",
    *SPLIT_CONFIGS,
]
WITH_RANDOM_SESSIONS = {"llama": 6, "gpt2": 4, "gpt_neox": 2, "mixtral": 2, "llama of 9 heads": 2}


def _random_sessions(number: int) -> list[Any]:
    drawn: list[Any] = []

    @settings(
        max_examples=20,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(description=sessions)
    def draw(description: list[Any]) -> None:
        drawn.append(description)

    draw()
    # The first ones are the simplest.
    return drawn[len(drawn) - number :]


@pytest.fixture(scope="module")
def found(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What differed on either of two ranks, by family."""
    drawn = {name: _random_sessions(WITH_RANDOM_SESSIONS.get(name, 0)) for name in FAMILIES}
    folders = {name: tiny.folder(name) for name in FAMILIES}
    folder: Path = tmp_path_factory.mktemp("ranks")
    leader, follower = on_ranks(differences, 2, folder, folders, drawn)
    return {name: leader[name] + follower[name] for name in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_give_what_one_gives(family: str, found: dict[str, list[str]]) -> None:
    assert not found[family], "\n".join(found[family][:5])


@pytest.mark.parametrize("family", ["llama of 9 heads", "gpt2 of 3 heads", "gpt_neox of 3 heads"])
def test_three_ranks_give_what_one_gives(family: str, tiny: TinyModels, tmp_path: Path) -> None:
    drawn = {family: _random_sessions(2)}
    for found in on_ranks(differences, 3, tmp_path, {family: tiny.folder(family)}, drawn):
        assert not found[family], "\n".join(found[family][:5])


def test_what_fails_on_one_rank_alone_ends_its_trace_and_nothing_else(
    tiny: TinyModels, tmp_path: Path
) -> None:
    for told in on_ranks(outcomes, 2, tmp_path, tiny.folder("llama")):
        assert len(told) == 12
        for case, outcome in told.items():
            assert outcome.endswith("Error, True"), f"{case}: {outcome}"


@pytest.mark.parametrize("case", ["pass", "module call", "gradient"])
def test_memory_that_runs_out_in_the_model_on_all_ranks_ends_the_trace_alone(
    case: str, tiny: TinyModels, tmp_path: Path
) -> None:
    for told in on_ranks(outcomes_in_the_model, 2, tmp_path, tiny.folder("llama"), [0, 1], case):
        assert told == ["OUT_OF_MEMORY", "True"]


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("case", ["pass", "module call", "gradient"])
def test_a_rank_that_alone_runs_out_of_memory_in_the_model_ends_the_group(
    case: str, failing: int, tiny: TinyModels, tmp_path: Path
) -> None:
    arguments = (tiny.folder("llama"), [failing], case)
    told = on_ranks(outcomes_in_the_model, 2, tmp_path, *arguments)
    assert "alone could not go on" in told[failing][0]
    assert "memory" in told[failing][0]
    assert "lost another rank" in told[1 - failing][0]


@pytest.mark.parametrize("num_rows", [64, 4])
def test_a_long_pass_of_a_cancelled_session_ends_at_one_layer_on_all_ranks(
    num_rows: int, tiny: TinyModels, tmp_path: Path
) -> None:
    leader, follower = on_ranks(cancelled, 2, tmp_path, tiny.folder("llama"), num_rows)
    is_long = num_rows == 64
    assert len(leader["reached"]) == (1 if is_long else 3)
    assert follower["reached"] == leader["reached"]
    for told in (leader, follower):
        assert told["is_as_before"]
        assert told["is_idle"]
        assert told["has_saved"] == (not is_long)


def test_gradients_go_through_whole_views_of_split_tensors(
    tiny: TinyModels, tmp_path: Path
) -> None:
    folders = {name: tiny.folder(name) for name in ("llama", "gpt2", "llama of odd widths")}
    for found in on_ranks(gradients, 2, tmp_path, folders):
        assert not any(found.values()), found


def test_no_more_crosses_between_ranks_than_is_looked_at(tiny: TinyModels, tmp_path: Path) -> None:
    width = AutoConfig.from_pretrained(tiny.folder("llama")).intermediate_size
    for found in on_ranks(gathered, 2, tmp_path, tiny.folder("llama")):
        assert [case for case, (_, is_same) in found.items() if not is_same] == []
        row = width * torch.float32.itemsize
        assert {case: num_bytes for case, (num_bytes, _) in found.items()} == {
            "everything": len(IDS) * row,
            "one_position": row,
            "one_position_of_an_input": row,
            "three_columns_of_one_rank": len(IDS) * 2 * 3 * 4,
            "columns_of_both_ranks": 2 * 2 * 2 * 4,
            "two_positions_used_apart": 2 * row,
            "positions_of_traces_that_share_a_pass": 4 * row,
            "positions_of_invokes": 4 * row,
            "a_part_beside_the_whole": len(IDS) * row,
            "a_part_beside_a_write": len(IDS) * row,
            "a_part_that_a_later_step_uses_whole": len(IDS) * row,
        }


def test_what_is_gathered_takes_memory_where_it_is_looked_at_alone(tmp_path: Path) -> None:
    for num_bytes, elements in on_ranks(memory_of_a_region, 2, tmp_path):
        assert num_bytes < 2**26, "of a GiB"
        assert elements == [0, 1, 2]


def test_of_packed_parts_no_more_crosses_than_is_looked_at(tmp_path: Path) -> None:
    # Of each part the ranks have six columns each; each sends as many as the one that has most.
    columns = [3 * 6, 6, 2, 2 + 1, 5 + 6 + 6]
    for found in on_ranks(packed_regions, 2, tmp_path):
        assert found == [(2 * number * 2 * 4, True) for number in columns]
