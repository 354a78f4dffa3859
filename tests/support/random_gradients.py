"""Random traces of one session that take gradients, in ways that share a pass and in others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st

if TYPE_CHECKING:
    from insitu import LanguageModel

PROMPTS: list[list[int] | list[list[int]]] = [
    [5, 9, 17, 23],
    [6, 3, 88, 41],
    [[71, 2, 2, 30], [200, 7, 150, 31]],
    [42, 61, 7, 8, 11, 90],
    [[4, 5, 6, 7], [19, 20]],
]
KINDS = (
    "output", "output", "input", "mlp", "heads", "middle", "vector", "part", "write", "write",
)  # fmt: skip
LOSSES = ("token", "token", "token", "all", "early")


@dataclass(frozen=True)
class Op:
    """A value that a gradient is taken by, or something that is written before the loss."""

    kind: str
    layer: int
    scale: float
    rewrites: bool
    """Whether the pass goes on with another gradient there."""


@dataclass(frozen=True)
class Drawn:
    """One trace."""

    prompts: list[int]
    loss: str
    ops: list[Op]
    has_second: bool
    """Whether there is another backward pass."""
    uses: bool
    """Whether it adds a gradient of the trace before it."""


_ops = st.builds(
    Op,
    kind=st.sampled_from(KINDS),
    layer=st.integers(0, 2),
    scale=st.sampled_from([0.5, 2.0]),
    rewrites=st.sampled_from([False, False, True]),
)
traces = st.lists(
    st.builds(
        Drawn,
        prompts=st.lists(st.sampled_from([0, 0, 0, 1, 1, 2, 3, 4]), min_size=1, max_size=2),
        loss=st.sampled_from(LOSSES),
        ops=st.lists(_ops, min_size=1, max_size=4),
        has_second=st.sampled_from([False, False, False, True]),
        uses=st.sampled_from([False, False, True]),
    ),
    min_size=2,
    max_size=4,
)


def record(model: LanguageModel, drawn: list[Drawn], values: dict[str, Any]) -> None:
    """Records traces in the open session.

    Args:
        model: what they run on.
        drawn: the traces.
        values: gets what is saved.
    """
    before: dict[str, Any] = {}
    for number, one in enumerate(drawn):
        prompts = [PROMPTS[at] for at in one.prompts]
        if len(prompts) == 1:
            with model.trace(prompts[0]):
                losses, found = _forward(model, one, before)
                _backward(one, losses, found, before, values, f"{number}")
            continue
        with model.trace() as tracer:
            losses, found = [], []
            for prompt in prompts:
                with tracer.invoke(prompt):
                    its_losses, its_found = _forward(model, one, before)
                    losses += its_losses
                    found += its_found
            _backward(one, losses, found, before, values, f"{number}")


def _forward(model: Any, one: Drawn, before: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Writes, and gives losses and the values that gradients are taken by, with their ops."""
    if one.uses and "gradient" in before:
        model.blocks[0].output[0][:, -1] += before["gradient"]
    found = []
    for op in one.ops:
        if op.kind == "write":
            model.blocks[op.layer].output[0][:, 1] *= op.scale
        else:
            found.append((op, _value(model, op)))
    logits = model.unembed.output
    match one.loss:
        case "token":
            loss = logits[:, -1].log_softmax(-1)[:, 7].sum()
        case "all":
            loss = (logits * 0.1).tanh().mean()
        case _:
            loss = model.blocks[1].output[0].norm()
    return [loss], found


def _value(model: Any, op: Op) -> Any:
    block = model.blocks[op.layer]
    match op.kind:
        case "input":
            return block.input
        case "mlp":
            return block.mlp.output
        case "heads":
            return block.attn.heads.z
        case "middle":
            return block.resid_mid
        case "vector":
            vector = torch.zeros(64)
            block.output[0][:] += vector
            return vector
        case "part":
            # A value of its own, of which the model makes nothing but this.
            part = block.output[0][:, -1] * op.scale
            block.output[0][:, -1] = part
            return part
    return block.output[0]


def _backward(
    one: Drawn,
    losses: list[Any],
    found: list[tuple[Op, Any]],
    before: dict[str, Any],
    values: dict[str, Any],
    name: str,
) -> None:
    loss = sum(losses[1:], losses[0])
    values[f"{name} loss"] = loss.save()
    with loss.backward():
        for op, value in found:
            if op.rewrites:
                value.grad = value.grad * op.scale
        for place, (op, value) in enumerate(found):
            values[f"{name} by {op.kind} {place}"] = value.grad.save()
            if op.kind == "output":
                before["gradient"] = value.grad[:1, -1] * op.scale
    if one.has_second and found:
        (loss * 2).backward()
        values[f"{name} again"] = found[-1][1].grad.save()
