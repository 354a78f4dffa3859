"""Random generations give the same in one loop and one by one: ids, values, logs, errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings

from insitu import LanguageModel
from support.random_generations import generations, record
from support.same_merged import check_same

if TYPE_CHECKING:
    from support.tiny_models import TinyModels

FAMILIES = {"llama": 80, "gpt2": 30, "gemma3": 30, "mixtral": 30}


@pytest.mark.parametrize("padding", [False, True], ids=["as they are", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_generations_are_as_one_by_one(
    family: str, padding: bool, tiny: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    model = LanguageModel(str(tiny.folder(family)))

    @settings(
        max_examples=FAMILIES[family],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    @given(drawn=generations)
    def check(drawn: list[Any]) -> None:
        def recorded(_: Any, values: dict[str, Any]) -> None:
            record(model, drawn, values)

        check_same(model, recorded, caplog, tolerance=1e-3, padding=padding)

    check()
