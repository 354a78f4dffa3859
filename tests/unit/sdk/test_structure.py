from __future__ import annotations

import pytest

from insitu import InvalidTraceError, LanguageModel
from insitu._structure import ModuleTree
from insitu_proto.v1 import model_pb2
from support.tiny_models import TinyModels

IDS = [5, 9, 17]


def test_a_module_is_left_after_all_that_it_calls() -> None:
    order = ["", "emb", "layers.0", "layers.0.mlp", "layers.1", "layers.1.mlp", "head"]
    modules = [
        model_pb2.Module(path=path, call_order=number) for number, path in enumerate(order, 1)
    ]
    modules.insert(2, model_pb2.Module(path="layers"))
    tree = ModuleTree(model_pb2.ModelDescription(modules=modules))
    moments = [
        ("", True), ("emb", True), ("emb", False), ("layers.0", True), ("layers.0.mlp", True),
        ("layers.0.mlp", False), ("layers.0", False), ("layers.1", True), ("layers.1.mlp", True),
        ("layers.1.mlp", False), ("layers.1", False), ("head", True), ("head", False), ("", False),
    ]  # fmt: skip
    places = [tree.place(path, is_input=is_input) for path, is_input in moments]
    assert places == list(range(1, len(moments) + 1))
    assert tree.place("layers", is_input=True) == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_write_that_needs_a_later_module_is_refused_while_recording(
    family: str, tiny: TinyModels
) -> None:
    model = LanguageModel(str(tiny.folder(family)))
    layers = model.get("transformer.h" if family == "gpt2" else "model.layers")
    ran_past = False
    with pytest.raises(InvalidTraceError, match=r"needs .*2\.output") as raised:
        with model.trace(IDS):
            late = layers[2].output[0].mean(0)
            layers[0].output[0][:, -1] += late[-1]
            ran_past = True
    assert raised.value.reason == "CYCLIC_TRACE"
    assert not ran_past
    assert raised.value.location is not None
    assert raised.value.location.source == "layers[0].output[0][:, -1] += late[-1]"
    assert "late = layers[2].output[0].mean(0)" in str(raised.value)


def test_writes_that_come_in_time_are_not_refused(tiny: TinyModels) -> None:
    model = LanguageModel(str(tiny.folder("llama")))
    layers = model.model.layers
    with model.session():
        with model.trace(IDS):
            kept = layers[2].output[0]
            copied = layers[0].output[0].clone()
            copied += kept
            layers[2].mlp.output = layers[2].mlp.output + layers[1].output[0]
            layers[2].output = layers[2].output[0] + layers[2].self_attn.output[0]
            total = copied.sum().save()
        with model.trace(IDS):
            layers[0].output[0][:] = kept
            first = layers[0].output[0].save()
    assert total.ndim == 0
    assert first.shape == (1, 3, 64)
