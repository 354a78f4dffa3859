from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Before anything imports transformers: no test reaches a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests start many processes: our modules are compiled for the first of them alone.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Tiny models gain nothing from threads, and on a busy machine these wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The variable is for processes that tests start: here a plugin of pytest had imported torch before.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The trained demo model, made once a machine."""
    from insitu.cli._demo_model import prepare_demo_model

    return prepare_demo_model()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Makes tiny random models of many families, each once a test session."""
    from support.tiny_models import TinyModels

    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("INSITU_")]:
        if name != "INSITU_CACHE_DIR":
            monkeypatch.delenv(name)
