"""Values that are kept from one session to the next, on a server: only their names cross."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable

import pytest
import torch

from insitu import CONFIG, LanguageModel, NotFoundError, PermissionDeniedError
from support.tiny_models import TinyModels
from support.up import Up

IDS = [5, 9, 17, 23]


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def up(
    request: pytest.FixtureRequest, tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> Up:
    models = [f"tiny/{family}={tiny.folder(family)}" for family in ("llama", "qwen3")]
    flags = ["--tp", str(request.param)]
    with Up(tmp_path_factory.mktemp("handles"), models, flags) as up:
        yield up


@pytest.fixture
def model(up: Up, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
    monkeypatch.setattr(CONFIG, "_api_key", "ann")
    return LanguageModel("tiny/llama")


def test_cell_by_cell_is_one_session(model: LanguageModel) -> None:
    with model.session(remote=True):
        with model.trace(IDS):
            hidden = model.model.layers[1].output[0]
        with model.trace(IDS[::-1]):
            model.model.layers[1].output = hidden
            expected = model.lm_head.output.save()
    with model.trace(IDS, remote=True):
        kept = model.model.layers[1].output[0].keep()
    with model.trace(IDS[::-1], remote=True):
        model.model.layers[1].output = kept
        actual = model.lm_head.output.save()
    assert torch.equal(actual, expected)
    other = LanguageModel("tiny/qwen3")
    with other.session(remote=True):
        value = kept.clone()
        with other.trace(IDS):
            other.model.layers[1].output = value
            moved = other.model.layers[1].output[0].norm().save()
    with model.session(remote=True):
        norm = kept.norm().save()
    torch.testing.assert_close(moved, norm)


def test_another_user_is_refused(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with model.trace(IDS, remote=True):
        kept = model.model.layers[1].output[0].keep()
    monkeypatch.setattr(CONFIG, "_api_key", "bob")
    with pytest.raises(PermissionDeniedError, match="is another user's"):
        with model.session(remote=True):
            kept.sum().save()
    with pytest.raises(PermissionDeniedError, match="is another user's"):
        kept.release()
    monkeypatch.setattr(CONFIG, "_api_key", "ann")
    with model.session(remote=True):
        total = kept.sum().save()
    assert total.ndim == 0
    kept.release()
    for user in ("ann", "bob"):
        monkeypatch.setattr(CONFIG, "_api_key", user)
        with pytest.raises(NotFoundError, match="no kept value"):
            with model.session(remote=True):
                kept.sum().save()


def test_metrics_tell_to_the_byte_what_is_kept_and_that_it_is_freed(
    up: Up, model: LanguageModel
) -> None:
    names = ("insitu_shard_handles", "insitu_shard_handle_bytes", "insitu_shard_session_bytes")
    time.sleep(6)  # what was before is told, too
    before = [_metric(up, name) for name in names]
    with model.session(remote=True):
        with model.trace(IDS):
            hidden = model.model.layers[1].output[0]
            kept = hidden.keep()
        with model.trace(IDS):
            model.model.layers[1].output = hidden
            model.lm_head.output.argmax(-1).save()
    # [1, 4, 64] in float32: what the session had is gone, what the user keeps is there.
    _wait_for(lambda: [_metric(up, name) for name in names] == [before[0] + 1, before[1] + 1024, 0])
    kept.release()
    _wait_for(lambda: [_metric(up, name) for name in names] == [before[0], before[1], 0])


def _metric(up: Up, name: str) -> float:
    """Gives what the group of tiny/llama tells, which it brings up to date every five seconds."""
    for address in re.findall(r"insitu_shard\.server .*metrics are at (\S+)", up.log):
        with urllib.request.urlopen(address) as response:
            told = response.read().decode()
        if found := re.search(rf'^{name}{{model="tiny/llama"}} (\S+)$', told, re.MULTILINE):
            return float(found[1])
    raise AssertionError(f"no group of tiny/llama tells {name}")


def _wait_for(has_happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not has_happened():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_value_that_nobody_uses_is_let_go(
    tiny: TinyModels,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("INSITU_KEPT_SECONDS", "1")
    monkeypatch.setenv("INSITU_KEPT_BYTES", "4096")
    with Up(tmp_path_factory.mktemp("expiry"), [f"tiny/llama={tiny.folder('llama')}"]) as up:
        monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
        monkeypatch.setattr(CONFIG, "_api_key", "ann")
        model = LanguageModel("tiny/llama")
        with model.trace(IDS, remote=True):
            kept = model.model.layers[1].output[0].keep()
        with pytest.raises(Exception, match="take at most 4,096"):
            with model.trace(IDS * 4, remote=True):
                model.model.layers[1].output[0].keep()
        with model.session(remote=True):
            kept.sum().save()
        time.sleep(1.5)
        with pytest.raises(NotFoundError, match="not been used for long"):
            with model.session(remote=True):
                kept.sum().save()
