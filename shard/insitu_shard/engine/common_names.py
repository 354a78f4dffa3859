"""Finds the modules that everyone asks for under names that hold in every family.

Families name them differently; what they are shows in the model's structure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel

    from insitu_proto.v1 import model_pb2


def add_common_names(description: model_pb2.ModelDescription, model: PreTrainedModel) -> None:
    """Sets the common names of a described model's modules."""
    entries = {entry.path: entry for entry in description.modules}
    for path, name in _common_names(description, model):
        if not entries[path].common_name:
            entries[path].common_name = name


def _common_names(
    description: model_pb2.ModelDescription, model: PreTrainedModel
) -> Iterator[tuple[str, str]]:
    modules = dict(model.named_modules())
    blocks = [entry.path for entry in description.modules if entry.is_block]
    parents = {path.rpartition(".")[0] for path in blocks}
    if len(parents) == 1:
        yield parents.pop(), "blocks"
    for path in blocks:
        yield from _names_in_block(path, modules[path])
    ends = {"embed": model.get_input_embeddings(), "unembed": model.get_output_embeddings()}
    for name, module in ends.items():
        yield from ((path, name) for path, other in modules.items() if other is module)
    if path := _last_norm(description):
        yield path, "ln_f"


def _names_in_block(path: str, block: torch.nn.Module) -> Iterator[tuple[str, str]]:
    with_weights = {
        name: child
        for name, child in block.named_children()
        if any(parameter.ndim > 1 for parameter in child.parameters())
    }
    attention = [name for name, child in with_weights.items() if is_attention(child)]
    others = [name for name in with_weights if name not in attention]
    if len(attention) != 1:
        return
    yield f"{path}.{attention[0]}", "attn"
    # OPT's has several, and no module that holds them.
    if len(others) == 1:
        yield f"{path}.{others[0]}", "mlp"


def is_attention(module: torch.nn.Module) -> bool:
    """Whether a module of a decoder layer is its attention."""
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name


def _last_norm(description: model_pb2.ModelDescription) -> str:
    """Gives the path of the norm that runs after the last block; empty if there is none."""
    called = [entry for entry in description.modules if entry.call_order]
    last_block = max((entry.call_order for entry in called if entry.is_block), default=0)
    blocks = tuple(f"{entry.path}." for entry in called if entry.is_block)
    after = [
        entry
        for entry in called
        if entry.call_order > last_block and not entry.path.startswith(blocks)
    ]
    norms = [entry for entry in after if _is_norm(entry)]
    return max(norms, key=lambda entry: entry.call_order).path if blocks and norms else ""


def _is_norm(entry: model_pb2.Module) -> bool:
    return "norm" in entry.class_name.lower()
