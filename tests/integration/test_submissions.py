"""Sessions that the client does not wait for, on a real server."""

from __future__ import annotations

import gc
import signal
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import insitu
from insitu import (
    CONFIG,
    CancelledError,
    ConfigurationError,
    DeadlineError,
    InvalidTraceError,
    LanguageModel,
    NotFoundError,
    PermissionDeniedError,
    SessionState,
    ValueNotAvailableError,
)
from support.tiny_models import TinyModels
from support.up import Up, interruptible, run_python
from support.up import insitu as run_insitu

IDS = [5, 9, 17, 23]
KEY = "a-secret-of-ada"


@pytest.fixture(scope="module")
def up(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("up")
    keys = folder / "keys"
    keys.write_text(f"ada:{KEY}\nbob:a-secret-of-bob\n")
    models = [f"tiny/llama={tiny.folder('llama')}"]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("INSITU_ORPHAN_GRACE_SECONDS", "0.2")
        with Up(folder / "data", models, ["--api-keys-file", str(keys)]) as server:
            yield server


@pytest.fixture
def model(up: Up, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
    monkeypatch.setenv("INSITU_API_KEY", KEY)
    monkeypatch.setattr(CONFIG, "_api_key", None)
    return LanguageModel("tiny/llama")


def _slow(model: LanguageModel) -> insitu.Session:
    """A session whose first trace saves `early`, and which then goes on for long."""
    with model.session(remote=True, blocking=False, exact=True) as session:
        with model.trace(IDS):
            early = model.lm_head.output.argmax(-1).save()
        for _ in range(3000):
            with model.trace(IDS):
                model.model.layers[2].output[0][:] = 0
        with model.trace(IDS):
            late = model.lm_head.output.argmax(-1).save()
    assert "'early'" in repr(early)
    assert "'late'" in repr(late)
    return session


def _until_running(submission: insitu.Submission) -> None:
    while submission.status() is not SessionState.RUNNING:
        time.sleep(0.05)


def test_a_block_need_not_wait_and_its_values_come_with_its_submission(
    model: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "insitu")
    with model.trace(IDS, remote=True):
        expected = model.lm_head.output.argmax(-1).save()
    caplog.clear()
    with model.session(remote=True, blocking=False, exact=True) as session:
        with model.trace(IDS):
            tokens = model.lm_head.output.argmax(-1).save()
            kept = model.model.layers[0].output
    with pytest.raises(ValueNotAvailableError, match=r"'tokens'.*\.wait\(\)"):
        _ = tokens + 1
    assert not caplog.messages
    session.submission.wait()
    assert torch.equal(tokens, expected)
    assert session.submission.status() is SessionState.COMPLETED
    assert torch.equal(session.submission.result()["tokens"], expected)
    with pytest.raises(ValueNotAvailableError, match=r"'kept'.*not saved"):
        _ = kept + 1
    shown = [text.split(" - ")[1].partition(":")[0] for text in caplog.messages]
    assert shown == ["RECEIVED", "APPROVED", "QUEUED", "RUNNING", "COMPLETED"]
    session.submission.wait()
    assert len(caplog.messages) == len(shown), "events are shown once"


def test_large_values_are_freed_when_nobody_has_them_any_more(model: LanguageModel) -> None:
    gc.collect()
    gc.disable()
    try:
        with model.session(remote=True, blocking=False) as session, model.trace([IDS]):
            saved = model.lm_head.output.save()
        session.submission.result()
        value = weakref.ref(saved)
        assert value() is not None
        del session, saved
        assert value() is None
    finally:
        gc.enable()


def test_a_single_trace_need_not_wait_either(model: LanguageModel) -> None:
    with model.trace(IDS, remote=True, blocking=False) as tracer:
        tokens = model.lm_head.output.argmax(-1).save()
    assert list(tracer.submission.result()) == ["tokens"]
    assert tokens.shape == (1, 4)


def test_a_session_in_this_process_can_not_go_on_without_it(
    tiny: TinyModels, model: LanguageModel
) -> None:
    local = LanguageModel(str(tiny.folder("llama")))
    with pytest.raises(ConfigurationError, match=r"blocking=False needs remote=True"):
        local.session(blocking=False)
    with pytest.raises(ConfigurationError, match=r"blocking=False needs remote=True"):
        local.trace(IDS, blocking=False)
    with model.trace(IDS, remote=True) as tracer:
        model.lm_head.output.argmax(-1).save()
    with pytest.raises(ValueNotAvailableError, match=r"blocking=False"):
        _ = tracer.submission


def test_what_the_server_refuses_is_an_error_at_the_block(model: LanguageModel) -> None:
    with pytest.raises(NotFoundError, match="gpt-5"):
        with LanguageModel("gpt-5").trace(IDS, remote=True, blocking=False):
            pass


def test_values_are_there_before_the_session_ends_and_a_cancelled_one_keeps_them(
    model: LanguageModel,
) -> None:
    submission = _slow(model).submission
    _until_running(submission)
    while not (values := submission.result(partial=True)):
        time.sleep(0.05)
    assert submission.status() is SessionState.RUNNING
    assert (list(values), values["early"].shape) == (["early"], (1, 4))
    with pytest.raises(TimeoutError, match=r"has not ended within 0\.05 seconds.*cancel") as raised:
        submission.wait(timeout=0.05)
    assert isinstance(raised.value, DeadlineError)
    submission.cancel()
    with pytest.raises(CancelledError):
        submission.wait()
    assert submission.status() is SessionState.CANCELLED
    with pytest.raises(CancelledError):
        submission.result()
    assert list(submission.result(partial=True)) == ["early"]
    submission.cancel()


def test_a_session_that_has_ended_needs_no_time_to_wait(model: LanguageModel) -> None:
    with model.trace(IDS, remote=True, blocking=False) as tracer:
        tokens = model.lm_head.output.argmax(-1).save()
    while tracer.submission.status() is not SessionState.COMPLETED:
        time.sleep(0.02)
    tracer.submission.wait(timeout=0)
    assert tokens.shape == (1, 4)


@pytest.mark.parametrize("where", ["local", "remote", "submitted"])
def test_a_failure_names_its_trace_and_leaves_the_values_of_those_before(
    model: LanguageModel, tiny: TinyModels, where: str
) -> None:
    if where == "local":
        model = LanguageModel(str(tiny.folder("llama")))
    session = model.session(remote=where != "local", blocking=where != "submitted")
    with pytest.raises(InvalidTraceError) as raised:
        with session:
            with model.trace(IDS):
                first = model.lm_head.output.argmax(-1).save()
            with model.trace(IDS):
                hidden = model.model.layers[0].output[0]
                second = model.lm_head.output.argmax(-1).save()
                model.model.layers[1].output[0][:, -1, :] = hidden[hidden > 0]
            with model.trace(IDS):
                third = model.lm_head.output.argmax(-1).save()
        session.submission.wait()
    assert raised.value.trace_number == 2
    assert "in trace 2 of the session" in str(raised.value)
    assert first.tolist()[0][0] >= 0
    for value, name in ((second, "second"), (third, "third")):
        with pytest.raises(ValueNotAvailableError, match=f"'{name}'.*has not come back"):
            value.tolist()
    if where == "submitted":
        assert session.submission.status() is SessionState.ERROR
        assert list(session.submission.result(partial=True)) == ["first"]


SCRIPT = """
import insitu
model = insitu.LanguageModel("tiny/llama")
with model.session(remote=True, blocking=False, exact=True) as session:
    for _ in range({num_traces}):
        with model.trace([5, 9, 17]):
            model.model.layers[2].output[0][:] = 0
    for prompt in ([5, 9], [17]):
        with model.trace(prompt):
            tokens = model.lm_head.output.argmax(-1).save()
            model.lm_head.output.shape
            print(model.lm_head.output.sum().save())
print(session.submission.id)
"""


def _submit_elsewhere(tmp_path: Path, num_traces: int = 1) -> str:
    """Submits a session from a process that ends; gives its id."""
    script = tmp_path / "client.py"
    script.write_text(SCRIPT.format(num_traces=num_traces))
    done = run_python([sys.executable, str(script)])
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_another_process_takes_hold_of_a_session_and_its_values_again_and_again(
    model: LanguageModel, tmp_path: Path
) -> None:
    # Long enough that the server would have cancelled what its client must watch.
    session_id = _submit_elsewhere(tmp_path, num_traces=1000)
    submission = insitu.attach(session_id)
    assert submission.id == session_id
    values = submission.result(timeout=60)
    assert {name: tuple(value.shape) for name, value in values.items()} == {
        "tokens": (1, 2),
        "value_1": (),
        "tokens_2": (1, 1),
        "value_2": (),
    }
    again = insitu.attach(session_id)
    again.wait()
    assert again.status() is SessionState.COMPLETED
    assert torch.equal(again.result()["tokens"], values["tokens"])


def test_a_session_is_cancelled_from_another_process(model: LanguageModel, tmp_path: Path) -> None:
    submission = insitu.attach(_submit_elsewhere(tmp_path, num_traces=3000))
    submission.cancel()
    with pytest.raises(CancelledError):
        submission.wait()
    with model.trace(IDS, remote=True):
        tokens = model.lm_head.output.argmax(-1).save()
    assert tokens.shape == (1, 4)


def test_nobody_takes_hold_of_what_does_not_exist_or_is_not_theirs(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFoundError, match="'no-such-session'"):
        insitu.attach("no-such-session")
    session_id = _submit_elsewhere(tmp_path)
    monkeypatch.setenv("INSITU_API_KEY", "a-secret-of-bob")
    with pytest.raises(PermissionDeniedError, match=session_id):
        insitu.attach(session_id)


def test_ctrl_c_while_waiting_for_a_submission_leaves_it_alone(
    model: LanguageModel, tmp_path: Path
) -> None:
    session_id = _submit_elsewhere(tmp_path, num_traces=2000)
    code = f"import insitu; insitu.attach({session_id!r}).wait()"
    with interruptible([sys.executable, "-c", code]) as client:
        assert client.stderr is not None
        for line in client.stderr:
            if " - RUNNING: " in line:
                break
        client.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in client.stderr.read()
    insitu.attach(session_id).wait(timeout=60)


def test_the_command_line_lists_fetches_and_cancels_ones_own_sessions(
    up: Up, model: LanguageModel, tmp_path: Path
) -> None:
    with model.session(remote=True, blocking=False) as session:
        with model.trace(IDS):
            token = model.lm_head.output.argmax(-1).save()
    session.submission.wait()
    server = {"INSITU_ENDPOINT": up.endpoint, "INSITU_API_KEY": KEY, "COLUMNS": "150"}
    listed = run_insitu("sessions", **server).stdout
    assert session.submission.id in listed
    assert "completed" in listed
    output = tmp_path / "saved.safetensors"
    run_insitu("sessions", "fetch", session.submission.id, "--output", str(output), **server)
    assert torch.equal(load_file(output)["token"], token)
    slow = _slow(model)
    assert "cancelled" in run_insitu("sessions", "cancel", slow.submission.id, **server).stdout
    others = run_insitu("sessions", **{**server, "INSITU_API_KEY": "a-secret-of-bob"}).stdout
    assert session.submission.id not in others


def test_tokens_come_while_a_generation_runs_and_a_cancel_ends_it_at_the_next_step(
    model: LanguageModel,
) -> None:
    plain = LanguageModel("tiny/llama")
    options = {"eos_token_id": None, "remote": True}
    with plain.generate(IDS, max_new_tokens=3, **options) as tracer:
        first = tracer.result.save()
    with model.generate(
        IDS, max_new_tokens=50_000, stream=True, blocking=False, **options
    ) as tracer:
        tracer.result.save()
    told = tracer.submission.tokens(timeout=60)
    seen = [next(told) for _ in range(3)]
    assert [at.step for at in seen] == [0, 1, 2]
    assert [at.token_ids[0] for at in seen] == first[0, len(IDS) :].tolist()
    assert tracer.submission.status() is SessionState.RUNNING
    tracer.submission.cancel()
    with pytest.raises(CancelledError):
        list(told)
    with plain.generate(IDS, max_new_tokens=3, **options) as tracer:
        again = tracer.result.save()
    assert torch.equal(again, first)
