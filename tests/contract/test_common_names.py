"""The names that hold in every family stand for what each family calls otherwise."""

from __future__ import annotations

import pytest
import torch

from insitu import LanguageModel, UnknownModuleError
from support.tiny_models import CONFIGS, TinyModels

IDS = [5, 9, 17, 23, 42, 61, 7]

OWN = {
    "gpt2": {
        "blocks": "transformer.h",
        "embed": "transformer.wte",
        "ln_f": "transformer.ln_f",
        "attn": "transformer.h.1.attn",
        "mlp": "transformer.h.1.mlp",
    },
    "gpt_neox": {
        "blocks": "gpt_neox.layers",
        "embed": "gpt_neox.embed_in",
        "ln_f": "gpt_neox.final_layer_norm",
        "attn": "gpt_neox.layers.1.attention",
        "mlp": "gpt_neox.layers.1.mlp",
    },
    "opt": {
        "blocks": "model.decoder.layers",
        "embed": "model.decoder.embed_tokens",
        "ln_f": "model.decoder.final_layer_norm",
        "attn": "model.decoder.layers.1.self_attn",
    },
    "phi": {"ln_f": "model.final_layernorm"},
}
LLAMA = {
    "blocks": "model.layers",
    "embed": "model.embed_tokens",
    "ln_f": "model.norm",
    "unembed": "lm_head",
    "attn": "model.layers.1.self_attn",
    "mlp": "model.layers.1.mlp",
}


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_common_name_stands_for_the_module_of_the_family(family: str, tiny: TinyModels) -> None:
    model = LanguageModel(str(tiny.folder(family)))
    for name, path in {**LLAMA, **OWN.get(family, {})}.items():
        if name in ("attn", "mlp"):
            if (family, name) != ("opt", "mlp"):
                assert getattr(model.blocks[1], name).path == path
        else:
            assert getattr(model, name).path == path
    assert len(model.blocks) == 3
    assert model.get("blocks.1.attn").path == model.blocks[1].attn.path


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_residual_stream_is_read_and_written_before_and_after_a_block(
    family: str, tiny: TinyModels
) -> None:
    model = LanguageModel(str(tiny.folder(family)))
    module = tiny.module(family)
    with model.session(exact=True):
        with model.trace(IDS):
            before = model.blocks[1].resid_pre.save()
            after = model.blocks[1].resid_post.save()
            logits = model.unembed.output.save()
        with model.trace(IDS):
            model.blocks[1].resid_pre = before * 0.5
            model.blocks[1].resid_post[:, 2] += 1
            model.blocks[2].resid_pre[:, 3] = 0
            written = model.unembed.output.save()
    with torch.no_grad():
        plain = module(input_ids=torch.tensor([IDS]), output_hidden_states=True)
    assert torch.equal(before, plain.hidden_states[1])
    assert torch.equal(after, plain.hidden_states[2])
    assert torch.equal(logits, plain.logits)

    def halve(_: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0] * 0.5, *args[1:])

    def change(_: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = args[0].clone()
        hidden[:, 2] += 1
        hidden[:, 3] = 0
        return (hidden, *args[1:])

    blocks = module.get_submodule(model.blocks.path)
    blocks[1].register_forward_pre_hook(halve)
    blocks[2].register_forward_pre_hook(change)
    with torch.no_grad():
        assert torch.equal(written, module(input_ids=torch.tensor([IDS])).logits)


def test_an_unknown_name_lists_what_there_is(tiny: TinyModels) -> None:
    model = LanguageModel(str(tiny.folder("opt")))
    with pytest.raises(UnknownModuleError, match=r"has no module .*has .*fc1, .*attn, resid_pre"):
        _ = model.blocks[0].mlp
    with pytest.raises(
        UnknownModuleError, match=r"the model has model, lm_head, embed, ln_f, blocks"
    ):
        _ = model.layers
    assert {"attn", "resid_pre", "self_attn"} <= set(dir(model.blocks[0]))


def test_a_name_of_the_users_own_goes_before(tiny: TinyModels) -> None:
    model = LanguageModel(str(tiny.folder("llama")), rename={"model.norm": "blocks"})
    assert model.blocks.path == "model.norm"
