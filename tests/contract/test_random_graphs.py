"""Random programs give in a session, bit by bit, what they give in eager torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from insitu import LanguageModel
from insitu._proxy import Proxy
from support.random_programs import Activations, Program, programs, run_block
from support.tiny_models import TinyModels

ONE_LENGTH = ([5, 9, 17, 23, 42], [11, 3, 200, 7, 64])
TWO_LENGTHS = ([5, 9, 17, 23, 42], [11, 3, 200])
PATHS = (
    "model.embed_tokens",
    "model.layers.0",
    "model.layers.0.mlp.up_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.input_layernorm",
    "model.layers.2",
)

bounded = settings(
    max_examples=100,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.data_too_large,
    ],
)


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> LanguageModel:
    return LanguageModel(str(tiny.folder("llama")))


@pytest.fixture(scope="module")
def one_length(tiny: TinyModels) -> Activations:
    return Activations([_activations(tiny.module("llama"), ids) for ids in ONE_LENGTH])


@pytest.fixture(scope="module")
def two_lengths(tiny: TinyModels) -> Activations:
    return Activations([_activations(tiny.module("llama"), ids) for ids in TWO_LENGTHS])


def _activations(module: torch.nn.Module, ids: list[int]) -> Mapping[str, torch.Tensor]:
    kept: dict[str, torch.Tensor] = {}
    hooks = [
        module.get_submodule(path).register_forward_hook(
            lambda _, __, output, path=path: kept.update({path: output})
        )
        for path in PATHS
    ]
    with torch.no_grad():
        module(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return kept


@bounded
@pytest.mark.filterwarnings("ignore")
@given(data=st.data())
def test_one_trace_gives_what_torch_gives(
    model: LanguageModel, one_length: Activations, data: st.DataObject
) -> None:
    first = Activations(one_length.prompts[:1])
    _check(model, ONE_LENGTH, data.draw(programs(first, max_lines=30)))


@bounded
@pytest.mark.filterwarnings("ignore")
@given(data=st.data())
def test_values_that_cross_merged_traces_give_what_torch_gives(
    model: LanguageModel, one_length: Activations, data: st.DataObject
) -> None:
    _check(model, ONE_LENGTH, data.draw(programs(one_length, max_lines=15)))


@bounded
@pytest.mark.filterwarnings("ignore")
@given(data=st.data())
def test_values_that_cross_traces_of_two_lengths_give_what_torch_gives(
    model: LanguageModel, two_lengths: Activations, data: st.DataObject
) -> None:
    # Rows of two lengths that share a pass agree to 1e-4 only: see docs/adr/0022.
    _check(model, TWO_LENGTHS, data.draw(programs(two_lengths, max_lines=15)), exact=True)


def _check(
    model: LanguageModel, prompts: Sequence[list[int]], program: Program, *, exact: bool = False
) -> None:
    note(repr(program))
    names: dict[str, Any] = {}
    with model.session(exact=exact):
        for ids, lines in zip(prompts, program.blocks, strict=False):
            with model.trace(ids):
                run_block(lines, names, lambda path: _read(model, path))
                if lines is program.blocks[-1]:
                    told = {name: _told(names[name]) for name in program.values()}
                    for name in program.values():
                        names[name].save()
    for name, expected in program.values().items():
        assert told[name] in (None, (expected.shape, expected.dtype)), name
        torch.testing.assert_close(
            names[name],
            expected,
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=lambda m, at=name: f"{at}: {m}",
        )


def _read(model: LanguageModel, path: str) -> Any:
    output = model.get(path).output
    return output[0] if model._tree[path].is_block else output


def _told(proxy: Any) -> Any:
    """Gives the shape and dtype that are known while recording; None where they are not."""
    meta = proxy._meta if isinstance(proxy, Proxy) else None
    return None if meta is None else (meta.shape, meta.dtype)
