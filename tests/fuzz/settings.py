"""How much is tried in the suite: the same each time; tests/fuzz/search.py tries more."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, Phase, settings


def bounded(max_examples: int) -> Any:
    return settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
