"""docs/usage and the guide for nnsight's users: every block runs, top to bottom of its page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import insitu
from insitu import LanguageModel
from support.pages import GUIDES, run_page


@pytest.fixture(scope="module")
def model(demo_folder: Path) -> LanguageModel:
    del demo_folder  # it is in the cache now, under its name
    return LanguageModel("HuggingFaceTB/SmolLM2-135M-Instruct")


@pytest.mark.filterwarnings("ignore::insitu.UnusedValueWarning")
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_a_page_runs(page: Path, model: LanguageModel, tmp_path: Path) -> None:
    run_page(page, model, tmp_path, with_server=False)


def test_every_page_is_in_the_index() -> None:
    index = next(page for page in GUIDES if page.name == "README.md").read_text()
    pages = {page.name for page in GUIDES if page.parent.name == "usage"} - {"README.md"}
    assert all(f"[{name}]({name})" in index for name in pages)


def test_a_loop_over_texts_runs_over_prompts(model: LanguageModel) -> None:
    prompts = ["The Eiffel Tower is in the city of", "Two plus two is"]
    with model.session() as session:
        answers = insitu.list().save()
        with session.iter(prompts) as prompt, model.trace(prompt):
            answers.append(model.lm_head.output[0, -1].argmax())
    for prompt, answer in zip(prompts, answers, strict=True):
        with model.trace(prompt):
            expected = model.lm_head.output[0, -1].argmax().save()
        assert torch.equal(answer, expected)
