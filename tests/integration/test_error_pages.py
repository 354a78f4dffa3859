"""The examples of docs/errors that need a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from insitu import CONFIG, LanguageModel
from insitu_scheduler.keys import Key, digest_of, write_keys
from insitu_scheduler.limits import Limits
from support.pages import ERROR_PAGES, agrees, as_shown, examples, namespace, raised_by
from support.up import Up

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
REMOTE = {
    page.stem: [example for example in examples(page) if example.needs_server]
    for page in sorted(ERROR_PAGES.glob("*.md"))
}


def _key(user: str, **limits: int) -> Key:
    digest = digest_of(f"a-secret-of-{user}")
    bounds = Limits(**limits, max_saved_bytes=10_000 if limits else None)
    return Key(key_id=user, user=user, digest=digest, limits=bounds)


@pytest.fixture(scope="module")
def up(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("up")
    keys = folder / "keys"
    write_keys(keys, [_key("ada"), _key("bob"), _key("a-guest", max_waiting_sessions=1)])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("INSITU_MAX_QUEUED_SESSIONS", "1")
        environment.setenv("INSITU_MAX_SESSIONS", "1")
        environment.setenv("INSITU_UPLOAD_STORE_BYTES", "4000000")
        flags = ["--api-keys-file", str(keys)]
        with Up(folder / "data", [f"{MODEL}={demo_folder}"], flags) as server:
            yield server


@pytest.fixture
def model(up: Up, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    monkeypatch.setattr(CONFIG, "_endpoint", up.endpoint)
    monkeypatch.setattr(CONFIG, "_api_key", "a-secret-of-ada")
    monkeypatch.setattr(CONFIG, "_submit_wait", None)
    return LanguageModel(MODEL)


@pytest.mark.parametrize("reason", [reason for reason in REMOTE if REMOTE[reason]])
def test_an_example_raises_on_a_server_what_its_page_shows(
    reason: str, model: LanguageModel, tmp_path: Path
) -> None:
    names = namespace(model)
    for number, example in enumerate(REMOTE[reason]):
        folder = tmp_path / str(number)
        err = raised_by(example, names, folder)
        assert bool(err) == bool(example.shown), err
        if err is not None:
            assert err.reason == reason
            assert agrees(example.shown, as_shown(err, folder)), as_shown(err, folder)
