"""docs/usage: the blocks that need a server, against a real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from insitu import CONFIG, LanguageModel
from support.pages import GUIDES, examples, run_page
from support.up import Up

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAGES = [page for page in GUIDES if any(example.needs_server for example in examples(page))]


@pytest.fixture(scope="module")
def up(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Up:
    with Up(tmp_path_factory.mktemp("pages"), [f"{NAME}={demo_folder}"]) as up:
        yield up


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_on_a_server(
    page: Path, up: Up, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
    monkeypatch.setattr(CONFIG, "_api_key", "tests")
    run_page(page, LanguageModel(NAME), tmp_path, with_server=True)
