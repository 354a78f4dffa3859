"""Tiny random models of many families, with weights large enough that logits differ visibly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

_COMMON = {
    "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GPT2 = {
    "vocab_size": 256, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_COMMON, "intermediate_size": 128, "num_key_value_heads": 2}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "gpt2": ("gpt2", _GPT2),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 16}),
    "gemma3": ("gemma3_text", {**_GROUPED, "head_dim": 16, "sliding_window": 8}),
    "gpt_neox": ("gpt_neox", {**_COMMON, "intermediate_size": 128}),
    "mistral": ("mistral", {**_GROUPED, "head_dim": 16, "sliding_window": None}),
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4}),
    "opt": ("opt", {**_COMMON, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "phi": ("phi", {**_COMMON, "intermediate_size": 128}),
    "phi3": ("phi3", {**_GROUPED, "sliding_window": None}),
}
# Only for tests that ask for them.
_OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"vocab_size": 256, "hidden_size": 64, "n_layer": 3, "n_head": 4}),
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 8, "n_inner": 128}),
}
# Those that matter where a model is split over ranks: what the number of ranks does not divide.
SPLIT_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama of 9 heads": (
        "llama",
        {**_GROUPED, "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "gemma3 of 1 kv head": (
        "gemma3_text",
        {**_GROUPED, "head_dim": 16, "sliding_window": 8, "num_key_value_heads": 1},
    ),
    "gpt_neox of 3 heads": (
        "gpt_neox",
        {**_COMMON, "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 128},
    ),
    "llama of odd widths": ("llama", {**_GROUPED, "vocab_size": 251, "intermediate_size": 127}),
    "gpt2 of odd widths": ("gpt2", {**_GPT2, "vocab_size": 251, "n_inner": 127}),
    "gpt2 of 3 heads": ("gpt2", {**_GPT2, "n_embd": 48, "n_head": 3}),
}


class TinyModels:
    """Makes each model once, in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def folder(self, family: str) -> Path:
        """Gives the folder of a family's model."""
        folder = self._root / family
        if not folder.exists():
            kind, values = {**CONFIGS, **_OTHERS, **SPLIT_CONFIGS}[family]
            torch.manual_seed(0)
            module = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**values))
            with torch.no_grad():
                for parameter in module.parameters():
                    if parameter.ndim >= 2:
                        parameter.normal_(0, 0.15)
            module.save_pretrained(folder)
        return folder

    def module(self, family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """Loads a family's model with plain transformers."""
        folder = self.folder(family)
        module: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return module.eval()
