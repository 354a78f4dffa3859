"""Whatever dies while sessions run: each ends once, as undisturbed, and nothing is left."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from insitu import CONFIG
from support import chaos
from support.chaos_cluster import Fault

if TYPE_CHECKING:
    from pathlib import Path

    from support.tiny_models import TinyModels


@pytest.mark.timeout(600)
def test_sessions_outlive_whatever_dies_and_breaks(
    tmp_path: Path,
    tiny: TinyModels,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("INSITU_ENDPOINT", "")
    monkeypatch.setattr(CONFIG, "_api_key", "chaos")
    caplog.set_level(logging.INFO, "insitu")
    scale = chaos.Scale(num_sessions=16, num_clients=4, num_traces=30, seed=3, pause_seconds=4.0)
    struck = chaos.run(tmp_path, tiny, scale)
    assert struck.keys() == set(Fault)
