"""The first session of the README, through real processes, against plain transformers."""

from __future__ import annotations

import itertools
import re
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from insitu import CONFIG, LanguageModel
from support.recording_proxy import RecordingProxy
from support.routed_server import RoutedServer
from support.up import Up, run_python

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SCRIPT = Path(__file__).parents[2] / "examples" / "first_session.py"
EIFFEL = "The Eiffel Tower is in the city of"
PALACE = "Buckingham Palace is in the city of"


@pytest.fixture(scope="module")
def up(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Up(tmp_path_factory.mktemp("up"), [f"{NAME}={demo_folder}"]) as server:
        yield server


@pytest.fixture
def model(up: Up, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
    monkeypatch.setattr(CONFIG, "_api_key", "tests")
    return LanguageModel(NAME)


@pytest.fixture(scope="module")
def expected(demo_folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The same experiment in plain transformers, with hand-written hooks."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_folder)
    module = AutoModelForCausalLM.from_pretrained(demo_folder).eval()
    kept: dict[str, torch.Tensor] = {}

    def hidden(output: Any) -> torch.Tensor:
        return output[0] if isinstance(output, tuple) else output

    def read(_: Any, __: Any, output: Any) -> None:
        kept["hidden"] = hidden(output)[:, -1, :].clone()

    def write(_: Any, __: Any, output: Any) -> None:
        hidden(output)[:, -1, :] = kept["hidden"]

    def tokens(prompt: str, layer: int, hook: Any) -> torch.Tensor:
        handle = module.model.layers[layer].register_forward_hook(hook)
        with torch.no_grad():
            logits = module(**tokenizer(prompt, return_tensors="pt")).logits
        handle.remove()
        return logits.argmax(dim=-1)

    return tokens(EIFFEL, 29, read), tokens(PALACE, 1, write)


def _run_session(model: LanguageModel, *, remote: bool) -> tuple[torch.Tensor, torch.Tensor]:
    with model.session(remote=remote):
        with model.trace(EIFFEL):
            hs_29 = model.model.layers[29].output[0][:, -1, :]
            t1 = model.lm_head.output.argmax(dim=-1).save()
        with model.trace(PALACE):
            model.model.layers[1].output[0][:, -1, :] = hs_29[:]
            t2 = model.lm_head.output.argmax(dim=-1).save()
    return t1, t2


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
def test_the_session_gives_what_hand_written_hooks_give(
    model: LanguageModel, expected: tuple[torch.Tensor, torch.Tensor], remote: bool
) -> None:
    t1, t2 = _run_session(model, remote=remote)
    assert torch.equal(t1, expected[0])
    assert torch.equal(t2, expected[1])
    assert model.tokenizer.decode(t1[0][-1]) == " Paris"


def test_the_script_of_the_readme_prints_and_logs_what_it_says(
    up: Up, model: LanguageModel, expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    done = run_python([sys.executable, str(SCRIPT)], INSITU_ENDPOINT=up.endpoint)
    assert done.returncode == 0, done.stderr
    assert "T1 - Original Prediction:   Paris" in done.stdout
    assert f"T2 - Modified Prediction:  {model.tokenizer.decode(expected[1][0][-1])}" in done.stdout
    assert "Downloading result: 100%" in done.stderr
    lines = re.findall(
        r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} insitu INFO ([0-9a-f-]{36}) - ([A-Z]+): (.+)$",
        done.stderr,
        re.MULTILINE,
    )
    kinds = [kind for id_, kind, _ in lines if id_ == lines[0][0]]
    # A slow machine shows RUNNING once more, for the second trace.
    first = [kind for kind, _ in itertools.groupby(kinds)]
    second = [(kind, text) for id_, kind, text in lines if id_ == lines[-1][0]]
    # A slow machine tells RUNNING again with the second trace.
    assert list(dict.fromkeys(first)) == [
        "RECEIVED", "APPROVED", "QUEUED", "RUNNING", "COMPLETED",
    ]  # fmt: skip
    assert [kind for kind, _ in second] == [
        "RECEIVED", "APPROVED", "QUEUED", "RUNNING", "LOG", "COMPLETED",
    ]  # fmt: skip
    assert ("RECEIVED", "Your session has been received and is waiting approval.") in second
    assert ("LOG", "-- Early Stop --") in second
    assert lines[0][0] != lines[-1][0]


def test_the_journal_shows_the_states_of_the_sessions(up: Up, model: LanguageModel) -> None:
    _run_session(model, remote=True)
    with sqlite3.connect(up.data_dir / "journal.sqlite") as connection:
        (session_id,) = connection.execute(
            "SELECT id FROM sessions ORDER BY created_at DESC LIMIT 1"
        ).fetchone()
        (state,) = connection.execute(
            "SELECT state FROM sessions WHERE id = ?", (session_id,)
        ).fetchone()
        (events,) = connection.execute(
            "SELECT COUNT(DISTINCT kind) FROM events WHERE session_id = ?", (session_id,)
        ).fetchone()
    connection.close()
    assert state == "COMPLETED"
    assert events == 5


def test_steps_after_exit_do_not_run(
    model: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "insitu")
    with model.session(remote=True) as session:
        with model.trace(EIFFEL):
            tokens = model.lm_head.output.argmax(dim=-1).save()
        session.log("before")
        session.exit()
        session.log("after")
        with model.trace(PALACE):
            never = model.lm_head.output.argmax(dim=-1).save()
    assert tokens.shape == (1, 9)
    assert "before" in caplog.text
    assert "after" not in caplog.text
    with pytest.raises(Exception, match="'never'"):
        _ = never + 1


def test_logs_come_in_the_order_of_definition(
    model: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "insitu")
    with model.session(remote=True) as session:
        session.log("one")
        with model.trace(EIFFEL) as tracer:
            hidden = model.model.layers[3].output[0]
            tracer.log("two", hidden.shape, hidden)
        session.log("three", hidden[0, 0, :2])
    logged = [text for text in caplog.messages if " - LOG: " in text]
    assert [text.partition(" - LOG: ")[2][:5].split()[0] for text in logged] == [
        "one", "two", "three",
    ]  # fmt: skip
    assert "tensor(float32[1, 9, 576], min=" in logged[1]


def test_the_client_holds_no_weights(model: LanguageModel, up: Up) -> None:
    code = (
        "import insitu, torch, gc, sys\n"
        "assert 'torch' in sys.modules\n"
        "model = insitu.LanguageModel(sys.argv[1])\n"
        "with model.trace('Hello', remote=True):\n"
        "    tokens = model.lm_head.output.argmax(-1).save()\n"
        "print(model)\n"
        "tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]\n"
        "print(sum(t.numel() for t in tensors if not t.is_meta) < 10_000)\n"
        "print('insitu_shard' in sys.modules)\n"
    )
    done = run_python(
        [sys.executable, "-c", code, NAME], INSITU_ENDPOINT=up.endpoint, INSITU_API_KEY="tests"
    )
    assert done.returncode == 0, done.stderr
    assert "(0-29): 30 x LlamaDecoderLayer(" in done.stdout
    assert done.stdout.splitlines()[-2:] == ["True", "False"]


def test_the_kept_activation_crosses_neither_to_the_client_nor_to_the_scheduler(
    demo_folder: Path, up: Up, model: LanguageModel, tmp_path: Path
) -> None:
    with model.trace(EIFFEL, remote=True):
        kept = model.model.layers[29].output[0][:, -1, :].save()
    secret = kept.numpy().tobytes()
    to_scheduler, to_shard = RecordingProxy(), RecordingProxy()
    with RoutedServer(f"{NAME}={demo_folder}", tmp_path, to_scheduler, to_shard) as endpoint:
        CONFIG.set_default_endpoint(endpoint)
        try:
            _run_session(LanguageModel(NAME), remote=True)
        finally:
            CONFIG._endpoint = None
        crossed = bytes(to_scheduler.captured) + bytes(to_shard.captured)
    for proxy in (to_scheduler, to_shard):
        assert b"lm_head" in proxy.captured, "nothing was captured"
        proxy.close()
    # Any 64 bytes of it would be 16 of its numbers.
    pieces = [secret[start : start + 64] for start in range(0, len(secret), 64)]
    assert not any(piece in crossed for piece in pieces)
