"""A session is a file: recorded here, looked at, run there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from insitu import (
    CONFIG,
    ConfigurationError,
    InvalidTraceError,
    LanguageModel,
    ValueNotAvailableError,
)
from insitu._session_file import read_session
from support.tiny_models import TinyModels
from support.up import Up, insitu, run_python

IDS = [5, 9, 17, 23]
STEERING = torch.ones(64)


@pytest.fixture(scope="module")
def up(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Up(tmp_path_factory.mktemp("up"), [f"tiny/llama={tiny.folder('llama')}"]) as server:
        yield server


@pytest.fixture
def model(up: Up, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
    monkeypatch.setenv("INSITU_API_KEY", "tests")
    monkeypatch.setattr(CONFIG, "_api_key", None)
    return LanguageModel("tiny/llama")


@pytest.fixture
def local(tiny: TinyModels) -> LanguageModel:
    return LanguageModel(str(tiny.folder("llama")))


def _record(model: LanguageModel, path: Path, **options: bool) -> tuple[Any, Any]:
    with model.session(**options) as session:
        with model.trace(IDS):
            tokens = model.lm_head.output.argmax(-1).save()
            double = model.lm_head.output[0, -1, :2].to(torch.complex128).save()
            attended = model.model.layers[0].self_attn.output.save()
        session.log("half way")
        with model.trace(IDS):
            model.model.layers[1].output[0][:, -1] = STEERING
            hidden = model.model.layers[2].output[0].save()
    assert (len(attended), double.shape) == (2, (2,))
    session.save(path)
    return tokens, hidden


@pytest.mark.parametrize("where", ["--local", "--remote"])
def test_a_session_that_was_only_recorded_runs_from_its_file(
    local: LanguageModel, model: LanguageModel, tmp_path: Path, where: str
) -> None:
    recorded_on = local if where == "--local" else model
    path, output = tmp_path / "experiment.pb", tmp_path / "results.safetensors"
    never, _ = _record(recorded_on, path, run=False, remote=where == "--remote")
    with pytest.raises(ValueNotAvailableError, match=r"'tokens'.*recorded without running"):
        never.tolist()
    tokens, hidden = _record(local, tmp_path / "ran.pb")
    done = insitu("run", str(path), where, "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert " - LOG: half way" in done.stderr
    assert (" - COMPLETED: " in done.stderr) is (where == "--remote")
    shown = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert shown["tokens"] == f"int64[1, 4]  {' '.join(str(tokens).split())}"
    assert shown["hidden"] == "float32[1, 4, 64]"
    assert shown["attended[0]"] == "float32[1, 4, 64]"
    assert shown["attended[1]"] == "None"
    saved = load_file(output)
    assert saved.keys() == {"tokens", "hidden", "attended[0]", "double"}
    assert saved["double"].shape == (2, 2)
    with safe_open(output, "pt") as file:
        assert file.metadata()["attended[1]"] == "None", "what is no tensor is kept as text"
        assert file.metadata()["double"].startswith("complex128: ")
    assert torch.equal(saved["tokens"], tokens)
    torch.testing.assert_close(saved["hidden"], torch.as_tensor(hidden))


def test_a_file_is_the_same_whether_the_session_ran_or_not(
    model: LanguageModel, tmp_path: Path
) -> None:
    files = [tmp_path / name for name in ("recorded", "ran", "submitted")]
    _record(model, files[0], run=False, remote=True)
    _record(model, files[1], remote=True)
    _record(model, files[2], remote=True, blocking=False)
    assert len({file.read_bytes() for file in files}) == 1


def test_the_same_script_gives_the_same_bytes_in_every_process(
    local: LanguageModel, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import insitu, sys, torch\n"
        f"model = insitu.LanguageModel({local.name!r})\n"
        "with model.session(run=False) as session:\n"
        "    with model.trace([5, 9]):\n"
        "        logits = model.lm_head.output\n"
        "        best = logits.topk(k=2, dim=-1, largest=True, sorted=True).indices.save()\n"
        "        spread = logits.std(dim=-1, correction=0, keepdim=True).save()\n"
        "session.save(sys.argv[1])\n"
    )
    files = [tmp_path / name for name in ("one.pb", "two.pb")]
    for seed, file in enumerate(files, start=1):
        done = run_python([sys.executable, str(script), str(file)], PYTHONHASHSEED=str(seed))
        assert done.returncode == 0, done.stderr
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_a_failed_session_saved_is_shown_and_written(
    model: LanguageModel, tmp_path: Path
) -> None:
    with model.session(remote=True, run=False) as session:
        with model.trace(IDS):
            tokens = model.lm_head.output.argmax(-1).save()
        with model.trace(IDS):
            hidden = model.model.layers[0].output[0]
            model.model.layers[1].output[0][:, -1, :] = hidden[hidden > 0]
    path, output = tmp_path / "experiment.pb", tmp_path / "results.safetensors"
    session.save(path)
    done = insitu("run", str(path), "--output", str(output))
    assert done.returncode == 1
    assert "in trace 2 of the session" in done.stderr
    assert "model.model.layers[1].output[0][:, -1, :] = hidden[hidden > 0]" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("tokens  int64[1, 4]")
    assert load_file(output)["tokens"].shape == tokens.shape


def test_a_session_is_saved_after_its_block_only(local: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "experiment.pb"
    with pytest.raises(InvalidTraceError, match="after its block"):
        with local.session(run=False) as session:
            session.log("hello")
            session.save(path)
    with pytest.raises(InvalidTraceError, match="after its block"):
        session.save(path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "can not be read (No such file or directory)"),
        (b"", "is no session of insitu"),
        (b"import insitu\n", "is no session of insitu"),
        (b"\x0a\x05other", "is no session of insitu"),
    ],
    ids=["missing", "empty", "text", "another message"],
)
def test_a_file_of_another_kind_is_a_clear_error(
    content: bytes | None, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "some.pb"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=re.escape(says)) as raised:
        read_session(path)
    assert "session.save(path)" in str(raised.value)


def test_the_commands_tell_a_file_of_another_kind_in_one_line() -> None:
    for command in ("run", "show"):
        done = insitu(command, __file__)
        assert done.returncode == 1
        assert done.stderr.startswith(f"insitu: the file {__file__!r} is no session of insitu")
        assert len(done.stderr.splitlines()) == 1


def test_a_damaged_file_is_a_clear_error(local: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "experiment.pb"
    _record(local, path, run=False)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigurationError, match="damaged"):
        read_session(path)


def test_an_output_that_can_not_be_written_is_told_before_anything_runs(
    local: LanguageModel, tmp_path: Path
) -> None:
    path = tmp_path / "experiment.pb"
    _record(local, path, run=False)
    done = insitu("run", str(path), "--local", "--output", str(tmp_path / "none" / "x"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "a folder that does not exist" in done.stderr


def test_a_file_is_shown_as_text_under_the_lines_that_recorded_it(
    local: LanguageModel, tmp_path: Path
) -> None:
    path = tmp_path / "experiment.pb"
    _record(local, path, run=False)
    done = insitu("show", str(path))
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert 'session.log("half way")' in done.stdout
    save = next(index for index, line in enumerate(lines) if 'name: "tokens"' in line)
    assert lines[save - 3].startswith(f"# {__file__}:")
    assert lines[save - 3].endswith("tokens = model.lm_head.output.argmax(-1).save()")
    assert lines[save].startswith("%3 = save { value { reference { node_id: 2 } }")
    assert "token_ids: [5, 9, 17, 23]" in done.stdout
    assert "data: ..." in done.stdout
