"""Sessions of several clients that one real shard group runs at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from insitu import (
    CONFIG,
    CancelledError,
    InvalidTraceError,
    LanguageModel,
    Session,
    SessionState,
    Submission,
)
from support.tiny_models import TinyModels
from support.up import Up

IDS = [5, 9, 17, 23]


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def up(
    request: pytest.FixtureRequest, tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> Up:
    models = [f"tiny/llama={tiny.folder('llama')}"]
    flags = ["--tp", str(request.param)]
    with Up(tmp_path_factory.mktemp("beside"), models, flags) as up:
        yield up


@pytest.fixture
def model(up: Up, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
    monkeypatch.setattr(CONFIG, "_api_key", "tests")
    return LanguageModel("tiny/llama")


def _patch(model: LanguageModel, number: int, *, remote: bool) -> torch.Tensor:
    """A session of three traces that no other number's is like."""
    layers = model.model.layers
    with model.session(remote=remote):
        with model.trace([number + 1, *IDS[: 1 + number % 3]]):
            hidden = layers[number % 3].output[0][:, -1, :]
        with model.trace(IDS):
            layers[1].output[0][:, -1, :] = hidden
            moved = layers[2].output[0][:, 0, :]
        with model.trace([number, *IDS]):
            layers[0].output[0][:, 0, :] = moved * number
            logits: torch.Tensor = model.lm_head.output.save()
    return logits


def _fail(model: LanguageModel) -> InvalidTraceError:
    with pytest.raises(InvalidTraceError) as raised, model.session(remote=True):
        with model.trace(IDS):
            hidden = model.model.layers[0].output[0]
        with model.trace(IDS):
            model.model.layers[1].output = hidden[hidden > 0]
    return raised.value


def _long(model: LanguageModel, num_traces: int = 3000) -> Session:
    with model.session(remote=True, blocking=False, exact=True) as session:
        with model.trace(IDS):
            model.lm_head.output.argmax(-1).save()
        for _ in range(num_traces):
            with model.trace(IDS):
                model.model.layers[2].output[0][:] = 0
    return session


def _until_it_has_saved(submission: Submission) -> None:
    while not submission.result(partial=True):
        assert submission.status() in (SessionState.QUEUED, SessionState.RUNNING)


def test_sixteen_clients_a_failing_and_a_cancelled_session_do_not_touch_each_other(
    model: LanguageModel, tiny: TinyModels
) -> None:
    local = LanguageModel(str(tiny.folder("llama")))
    expected = [_patch(local, number, remote=False) for number in range(16)]
    cancelled = _long(model).submission
    _until_it_has_saved(cancelled)
    with ThreadPoolExecutor(18) as clients:
        failing = clients.submit(_fail, model)
        running = [clients.submit(_patch, model, number, remote=True) for number in range(16)]
        cancelled.cancel()
        actual = [patched.result() for patched in running]
        assert failing.result().trace_number == 2
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    with pytest.raises(CancelledError):
        cancelled.wait()
    torch.testing.assert_close(_patch(model, 3, remote=True), expected[3], rtol=0, atol=1e-5)


def test_a_session_starts_and_ends_while_a_long_one_runs(model: LanguageModel) -> None:
    submission = _long(model).submission
    _until_it_has_saved(submission)
    with model.trace(IDS, remote=True):
        tokens = model.lm_head.output.argmax(-1).save()
    assert tokens.shape == (1, 4)
    assert submission.status() is SessionState.RUNNING
    submission.cancel()
    with pytest.raises(CancelledError):
        submission.wait()


def test_a_kept_value_that_is_released_serves_the_session_that_uses_it_to_its_end(
    model: LanguageModel,
) -> None:
    with model.trace(IDS, remote=True):
        kept = model.model.layers[1].output[0].keep()
    with model.session(remote=True, blocking=False, exact=True) as session:
        with model.trace(IDS):
            model.lm_head.output.argmax(-1).save()
        for _ in range(50):
            with model.trace(IDS):
                model.model.layers[2].output[0][:] = 0
        norm = kept.norm().save()
    _until_it_has_saved(session.submission)
    kept.release()
    session.submission.wait()
    assert norm.ndim == 0


def test_a_session_may_use_what_one_that_still_runs_will_keep(model: LanguageModel) -> None:
    with model.session(remote=True, blocking=False, exact=True) as keeping:
        with model.trace(IDS):
            model.lm_head.output.argmax(-1).save()
        for _ in range(50):
            with model.trace(IDS):
                model.model.layers[2].output[0][:] = 0
        with model.trace(IDS):
            kept = model.model.layers[1].output[0].keep()
    _until_it_has_saved(keeping.submission)
    with model.session(remote=True):
        norm = kept.norm().save()
    assert norm.ndim == 0
    assert keeping.submission.status() is SessionState.COMPLETED
