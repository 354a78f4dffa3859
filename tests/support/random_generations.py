"""Random generations of one session, which share loops, prompts and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st

import insitu

if TYPE_CHECKING:
    from insitu import LanguageModel

PROMPTS: list[list[int] | list[list[int]]] = [
    [5, 9, 17, 23, 42],
    [11, 3, 200, 150, 31],
    [[71, 2, 30, 8, 90], [6, 3, 88, 41, 12]],
    [13, 77, 101],
    [[4, 5, 6, 7, 8], [19, 20]],
]
STEPS: list[Any] = [slice(None), slice(1, None), slice(None, None, 2), slice(0, 1)]
ENDS: list[list[int] | None] = [None, None, list(range(0, 256, 4)), list(range(1, 256, 2))]


@dataclass(frozen=True)
class Op:
    """One thing that a generation does."""

    kind: str
    steps: int
    layer: int
    scale: float


@dataclass(frozen=True)
class Drawn:
    """One generation."""

    prompts: list[int]
    num_tokens: int
    seed: int
    ends: int
    ops: list[Op]


KINDS = (
    "steer", "steer", "list", "last", "block", "branch", "stop", "head", "pattern", "earlier",
    "log", "next", "noise",
)  # fmt: skip

_ops = st.builds(
    Op,
    kind=st.sampled_from(KINDS),
    steps=st.integers(0, len(STEPS) - 1),
    layer=st.integers(0, 2),
    scale=st.sampled_from([0.5, 1.5]),
)
generations = st.lists(
    st.builds(
        Drawn,
        prompts=st.lists(st.sampled_from([0, 0, 0, 1, 1, 2, 3, 4]), min_size=1, max_size=2),
        num_tokens=st.integers(1, 6),
        seed=st.integers(0, 3),
        ends=st.integers(0, len(ENDS) - 1),
        ops=st.lists(_ops, max_size=3),
    ),
    min_size=2,
    max_size=4,
)


def record(model: LanguageModel, drawn: list[Drawn], values: dict[str, Any]) -> None:
    """Records generations in the open session.

    Args:
        model: what they run on.
        drawn: the generations.
        values: gets what is saved.
    """
    torch.manual_seed(3)
    shared: dict[str, Any] = {"list": insitu.list().save()}
    for number, one in enumerate(drawn):
        options = {
            "max_new_tokens": one.num_tokens,
            "do_sample": one.seed > 0,
            "seed": one.seed,
            "eos_token_id": ENDS[one.ends],
        }
        prompts = [PROMPTS[at] for at in one.prompts]
        if len(prompts) == 1:
            with model.generate(prompts[0], **options) as tracer:
                _do_all(model, tracer, one, shared, values, f"{number}")
                values[f"{number} ids"] = tracer.result.save()
                values[f"{number} steps"] = tracer.num_steps.save()
            continue
        with model.generate(**options) as tracer:
            for place, prompt in enumerate(prompts):
                with tracer.invoke(prompt):
                    _do_all(model, tracer, one, shared, values, f"{number}.{place}")
                    values[f"{number}.{place} ids"] = tracer.result.save()
            values[f"{number} ids"] = tracer.result.save()
    values["list"] = shared["list"]


def _do_all(
    model: Any, tracer: Any, one: Drawn, shared: dict[str, Any], values: dict[str, Any], name: str
) -> None:
    for place, op in enumerate(one.ops):
        _do(model, tracer, op, one.num_tokens, shared, values, f"{name} {op.kind} {place}")


def _do(  # noqa: C901 - one case a kind
    model: Any,
    tracer: Any,
    op: Op,
    num_tokens: int,
    shared: dict[str, Any],
    values: dict[str, Any],
    name: str,
) -> None:
    block, heads = model.blocks[op.layer], model.blocks[op.layer].attn.heads
    chosen = list(range(num_tokens))[STEPS[op.steps]]
    if op.kind == "block" and chosen:
        with tracer.iter[chosen] as step:
            block.output[0][:, -1] *= op.scale + 0.1 * step
            values[name] = block.mlp.output[:, -1].norm().save()
    if op.kind == "next" and num_tokens > 1:
        values[name] = block.next().output[0][:, -1].save()
    if op.kind == "pattern":
        values[name] = heads.pattern[:, 1].clone().save()
        heads.pattern[:, 2] *= op.scale
    if op.kind == "earlier":
        before, shared["hidden"] = shared.get("hidden"), block.output[0][:1, -1] * 1
        if before is not None:
            block.output[0][:, -1] = before
    for step in tracer.iter[chosen]:
        hidden = block.output[0]
        match op.kind:
            case "steer":
                hidden[:, -1] *= op.scale
            case "list":
                shared["list"].append(hidden[:, -1].norm())
            case "last":
                last = hidden[:, -1] + step
            case "branch":
                with tracer.cond(hidden[0, -1].sum() > 0):
                    hidden[:, -1] *= op.scale
            case "stop":
                tracer.stop(when=model.unembed.output[:, -1].argmax(-1) % 3 == 0)
            case "head":
                heads.z[:, 1] *= op.scale
            case "log":
                tracer.log(name, step, hidden[:, -1].sum())
            case "noise":
                hidden[:, -1] += torch.randn(64)
    if op.kind == "last" and chosen:
        values[name] = (last * 2).save()
