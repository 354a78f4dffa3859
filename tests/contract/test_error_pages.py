"""docs/errors: a page for each reason, whose examples raise what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from insitu import CONFIG, LanguageModel
from insitu_wire.errors import Reason, error, status_code
from support.pages import ERROR_PAGES, agrees, as_shown, examples, namespace, raised_by

_ROW = re.compile(
    r"^\| \[(\w+)\]\((\w+)\.md\) \| `(\w+)` \| `(\w+)` \| (\w+) \| (.+) \|$", re.MULTILINE
)
_HEAD = re.compile(r"# (\w+)\n\n(.+)\n\n`(\w+)`, gRPC `(\w+)`\. Retry: (\w+)\.")


@pytest.fixture(scope="module")
def model(demo_folder: Path) -> LanguageModel:
    del demo_folder  # it is in the cache now, under its name
    return LanguageModel("HuggingFaceTB/SmolLM2-135M-Instruct")


@pytest.fixture(autouse=True)
def _client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONFIG, "_api_key", None)
    monkeypatch.setattr(CONFIG, "_endpoint", None)


def test_every_reason_has_a_page_and_every_page_a_reason() -> None:
    pages = {page.stem for page in ERROR_PAGES.glob("*.md")} - {"README"}
    assert pages == set(Reason)
    assert all((ERROR_PAGES.parents[1] / error(reason, "").page).is_file() for reason in Reason)


def test_the_index_and_the_heads_of_the_pages_tell_what_the_table_of_errors_does() -> None:
    rows = {row[0]: row for row in _ROW.findall((ERROR_PAGES / "README.md").read_text())}
    assert rows.keys() == set(Reason)
    for reason in Reason:
        head = _HEAD.match((ERROR_PAGES / f"{reason}.md").read_text())
        assert head is not None, reason
        title, meaning, exception, code, retry = head.groups()
        assert title == reason
        assert exception == type(error(reason, "")).__name__
        assert code == status_code(reason).name
        assert rows[reason] == (reason, reason, exception, code, retry, meaning)


@pytest.mark.parametrize("reason", Reason)
def test_an_example_raises_what_its_page_shows(
    reason: Reason, model: LanguageModel, tmp_path: Path
) -> None:
    names = namespace(model)
    local = (
        example for example in examples(ERROR_PAGES / f"{reason}.md") if not example.needs_server
    )
    for number, example in enumerate(local):
        folder = tmp_path / str(number)
        err = raised_by(example, names, folder)
        assert bool(err) == bool(example.shown), err
        if err is not None:
            assert err.reason is reason
            assert agrees(example.shown, as_shown(err, folder)), as_shown(err, folder)
