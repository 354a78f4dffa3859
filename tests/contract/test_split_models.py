"""A model that is split over ranks gives what a whole one gives, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from support.lone_failures import outcomes
from support.on_ranks import on_ranks
from support.random_sessions import sessions
from support.split_cases import differences, gradients
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


def test_what_fails_on_one_rank_alone_ends_its_trace_and_nothing_else(
    tiny: TinyModels, tmp_path: Path
) -> None:
    for told in on_ranks(outcomes, 2, tmp_path, tiny.folder("llama")):
        assert len(told) == 12
        for case, outcome in told.items():
            assert outcome.endswith("Error, True"), f"{case}: {outcome}"


def test_gradients_go_through_whole_views_of_split_tensors(
    tiny: TinyModels, tmp_path: Path
) -> None:
    folders = {name: tiny.folder(name) for name in ("llama", "gpt2", "llama of odd widths")}
    for found in on_ranks(gradients, 2, tmp_path, folders):
        assert not any(found.values()), found
