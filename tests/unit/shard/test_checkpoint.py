"""What is wrong with a model's files is said before weights are read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from insitu import ConfigurationError
from insitu_shard.engine import check_checkpoint, load_config, load_model, parse_dtype
from support.tiny_models import TinyModels

CPU = torch.device("cpu")


@pytest.fixture
def sharded(tiny: TinyModels, tmp_path: Path) -> Path:
    """A model over several files with an index."""
    folder = tmp_path / "sharded"
    tiny.module("llama").save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def single(tiny: TinyModels, tmp_path: Path) -> Path:
    """A model of one file, to spoil."""
    return Path(shutil.copytree(tiny.folder("llama"), tmp_path / "single"))


def test_a_checkpoint_of_several_files_is_loaded_as_of_one(sharded: Path, tiny: TinyModels) -> None:
    check_checkpoint(sharded)
    loaded = load_model("tiny", sharded).module.state_dict()
    for name, tensor in tiny.module("llama").state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_a_missing_file_of_the_index_is_named(sharded: Path) -> None:
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(ConfigurationError, match=f"lacks 1 of the .*{file.name}; download"):
        check_checkpoint(sharded)


def test_a_file_cut_short_is_named(sharded: Path) -> None:
    file = sorted(sharded.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ConfigurationError, match=rf"{file.name} is damaged or cut short"):
        check_checkpoint(sharded)


def test_a_file_that_may_not_be_read_says_by_whom(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tests may run as root, who may read everything.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigurationError, match=rf"may not be read by user {os.getuid()}"):
        check_checkpoint(single)


def test_a_file_cut_within_its_header_is_named(single: Path) -> None:
    (single / "model.safetensors").write_bytes(b"\x00")
    with pytest.raises(ConfigurationError, match=r"model\.safetensors is damaged or cut short, 1"):
        check_checkpoint(single)


def test_an_index_of_other_tensors_is_named(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.odd.weight"] = sorted(content["weight_map"].values())[0]
    index.write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match=r"lacks 1 of the tensors .*model\.odd\.weight"):
        check_checkpoint(sharded)


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": []}', '{"metadata": {}}'])
def test_an_index_that_is_none_is_named(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigurationError, match="is no index of a checkpoint"):
        check_checkpoint(sharded)


def test_a_folder_without_safetensors_says_how_to_make_them(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match="save_pretrained"):
        check_checkpoint(single)


def test_weights_that_the_file_lacks_are_never_made_up(single: Path) -> None:
    tensors = load_file(single / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, single / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"lacks 1 weights .*layers\.1\.mlp\.up_proj"):
        load_model("tiny", single)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "can not be read"),
        ("[]", "can not be read"),
        ("{}", "model_type None"),
        ('{"model_type": "llama99"}', "model_type 'llama99', an architecture that transformers"),
        ('{"model_type": "vit"}', "of a vit model, which does not predict tokens"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "is not as transformers has it"),
    ],
)
def test_a_configuration_that_can_not_be_used_says_why_in_one_line(
    content: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigurationError) as raised:
        load_config(tmp_path)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_weights_are_as_stored_unless_asked(tiny: TinyModels, tmp_path: Path) -> None:
    tiny.module("llama", torch.bfloat16).save_pretrained(tmp_path)
    assert load_model("tiny", tmp_path).dtype == torch.bfloat16
    asked = load_model("tiny", tmp_path, dtype=torch.float16)
    assert {tensor.dtype for tensor in asked.module.parameters()} == {torch.float16}


@pytest.mark.parametrize("name", ["bf16", "int8", "float8_e4m3fn", "nn", "complex64"])
def test_an_element_type_that_the_device_lacks_names_those_it_has(name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"'{name}'; on cpu .* float32, bfloat16"):
        parse_dtype(name, CPU)


def test_element_types_have_torchs_names() -> None:
    assert parse_dtype("bfloat16", CPU) is torch.bfloat16
