"""GGUF files as a source of models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from insitu import ConfigurationError, LanguageModel
from insitu_shard.engine import load_model, resolve_model_folder
from support.gguf_files import write_gguf
from support.tiny_models import TinyModels


@pytest.fixture
def gguf(tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INSITU_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "source" / "tiny.gguf"
    file.parent.mkdir()
    write_gguf(tiny.module("llama"), file)
    return file


def test_a_gguf_file_is_the_model_that_it_was_written_from(gguf: Path, tiny: TinyModels) -> None:
    ids = [5, 9, 17, 23]
    with torch.no_grad():
        expected = tiny.module("llama")(input_ids=torch.tensor([ids])).logits
    model = LanguageModel(str(gguf))
    with model.trace(ids):
        logits = model.lm_head.output.save()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert model.tokenizer("ab")["input_ids"]


def test_who_may_read_the_configuration_may_read_the_weights(gguf: Path) -> None:
    folder = resolve_model_folder(str(gguf))
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def test_a_folder_of_one_gguf_file_is_that_file(gguf: Path) -> None:
    assert resolve_model_folder(str(gguf.parent)) == resolve_model_folder(str(gguf))


def test_a_folder_of_two_gguf_files_asks_for_one(gguf: Path) -> None:
    (gguf.parent / "other.gguf").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"has 2 GGUF files.*other\.gguf, tiny\.gguf"):
        resolve_model_folder(str(gguf.parent))


def test_a_file_is_converted_once_and_again_if_another_takes_its_place(
    gguf: Path, tiny: TinyModels
) -> None:
    first = resolve_model_folder(str(gguf))
    written_at = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve_model_folder(str(gguf)) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written_at
    module = tiny.module("llama")
    with torch.no_grad():
        module.lm_head.weight.zero_()
    write_gguf(module, gguf)
    second = resolve_model_folder(str(gguf))
    assert second != first
    assert not load_model("tiny", second).module.lm_head.weight.any()


def test_processes_that_want_a_file_at_once_convert_it_once(gguf: Path) -> None:
    code = (
        "import logging, sys; logging.basicConfig(level=logging.INFO)\n"
        "from insitu_shard.engine import resolve_model_folder\n"
        "print(resolve_model_folder(sys.argv[1]))"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(gguf)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
        for _ in range(3)
    ]
    printed = [process.communicate() for process in started]
    assert len({folder for folder, _ in printed}) == 1
    assert sum("converting" in log for _, log in printed) == 1
    folder = Path(printed[0][0].strip())
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no model at all" * 100])
def test_a_file_that_is_no_gguf_says_so_in_one_line(gguf: Path, content: bytes) -> None:
    gguf.write_bytes(content)
    with pytest.raises(ConfigurationError, match="is no GGUF file of a model") as raised:
        resolve_model_folder(str(gguf))
    assert "\n" not in str(raised.value)


def test_a_gguf_file_cut_short_says_so(gguf: Path) -> None:
    gguf.write_bytes(gguf.read_bytes()[:-5000])
    with pytest.raises(ConfigurationError, match="is no GGUF file of a model"):
        resolve_model_folder(str(gguf))
