"""A model whose layers are partly on disk gives what one gives that is whole in memory."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from insitu import ConfigurationError, LanguageModel
from insitu_shard import engine
from insitu_shard.engine import Spread, load_model
from insitu_shard.engine.devices import brought, sent_back
from support.judge import with_hooks, with_insitu
from support.tiny_models import CONFIGS, TinyModels

IDS = [5, 9, 17, 23]


def _some_of(module: torch.nn.Module) -> Spread:
    """Memory for more than half of a model, the rest on disk."""
    return Spread({"cpu": int(0.6 * sum(weight.nbytes for weight in module.parameters()))})


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_language_equals_hand_written_hooks_in_every_family(
    family: str, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tiny.module(family)
    loaded = []

    def spread(*args: object, **kwargs: object) -> object:
        loaded.append(load_model(*args, **kwargs, spread=_some_of(module)))
        return loaded[-1]

    monkeypatch.setattr(engine, "load_model", spread)
    actual = with_insitu(LanguageModel(str(tiny.folder(family))))
    on_disk = [weight for weight in loaded[0].module.parameters() if weight.is_meta]
    assert 0 < len(on_disk) < len(list(module.parameters()))
    for name, tensor in with_hooks(module).items():
        assert torch.equal(actual[name], tensor), name


def test_a_skipped_layer_runs_again_in_the_next_trace(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread = _some_of(tiny.module("llama"))
    monkeypatch.setattr(engine, "load_model", partial(load_model, spread=spread))
    model = LanguageModel(str(tiny.folder("llama")))
    logits = []
    for is_skipping in (False, True, False):
        with model.trace(IDS):
            if is_skipping:
                model.model.layers[2].skip(model.model.layers[1].output)
            logits.append(model.lm_head.output.save())
    assert torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[0], logits[1])


def test_weights_on_disk_have_the_asked_element_type(tiny: TinyModels) -> None:
    module = tiny.module("llama", torch.bfloat16)
    loaded = load_model("tiny", tiny.folder("llama"), dtype=torch.bfloat16, spread=_some_of(module))
    ids = torch.tensor([IDS])
    with torch.no_grad():
        assert torch.equal(loaded.module(input_ids=ids).logits, module(input_ids=ids).logits)


def test_values_go_to_where_sessions_compute_and_back() -> None:
    # The meta device is the only second one of a machine without GPUs.
    here, there = torch.zeros(2), torch.zeros(2, device="meta")
    value = brought((here, {"x": here, "n": 1}), there.device)
    assert (value[0].device.type, value[1]["x"].device.type, value[1]["n"]) == ("meta", "meta", 1)
    back = sent_back((here, {"x": here, "n": 2}), (there, {"x": here, "n": 1}))
    assert (back[0].device.type, back[1]["x"].device.type, back[1]["n"]) == ("meta", "cpu", 2)


@pytest.mark.parametrize("text", ["cpu", "cpu=", "cpu=lots", "7=1GiB", "gpu=1GiB", "=1GB", "a=b=c"])
def test_limits_that_can_not_be_read_say_how_they_are_written(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--max-memory is .* like 0=20GiB,cpu=64GiB"):
        Spread.parse(text, num_devices=1)


def test_limits_have_units() -> None:
    assert Spread.parse("cpu=2GiB", num_devices=1) == Spread({"cpu": 2 * 1024**3})
    assert Spread.parse("cpu=1000", num_devices=1) == Spread({"cpu": 1000})
    assert Spread.parse("", num_devices=1).max_memory["cpu"] > 0
