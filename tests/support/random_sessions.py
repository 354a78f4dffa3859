"""Random sessions of traces that share prompts, writes and values, and a way to run them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st

import insitu
from insitu_wire.errors import Error

if TYPE_CHECKING:
    from insitu import LanguageModel

# Matrices of fewer than 12 rows go another way in the CPU's libraries, and differ in the last bits.
PROMPTS: list[list[int] | list[list[int]]] = [
    list(range(3, 17)),
    list(range(40, 54)),
    [list(range(60, 74)), list(range(80, 94))],
    list(range(100, 113)),
    [list(range(120, 134)), list(range(140, 146))],
]
NUM_LAYERS = 3

POINTS = ("block out", "block in", "mlp out", "norm in", "embedding", "final norm", "head in")
SLICES: dict[str, Any] = {
    "all": slice(None),
    "last": (slice(None), -1),
    "one": (slice(None), 3),
    "some": (slice(None), slice(2, 5)),
    "features": (slice(None), -2, slice(0, 7)),
    "row": 0,
}
LOGITS: dict[str, Any] = {
    "last": (slice(None), -1),
    "two": (0, -1, [5, 9]),
    "range": (slice(None), slice(-4, -1)),
    "dots": (..., -2, slice(None)),
    "steps": (slice(None), slice(None, None, 2)),
    "first": (0, 0),
    "all": slice(None),
}


@dataclass(frozen=True)
class Op:
    """One thing that a trace does."""

    kind: str
    layer: int
    point: str
    part: str
    logits: str
    scale: float


@dataclass
class Outcome:
    """What came of a session."""

    values: dict[str, Any] = field(default_factory=dict)
    error: tuple[str, int, str] | None = None
    session: Any = None


_ops = st.builds(
    Op,
    kind=st.sampled_from(
        ["save", "add", "set", "whole", "copy", "earlier", "compare", "lens", "log", "append"] * 2
        + ["total", "noise", "fail", "stop", "model out", "inputs", "clone", "replace"]
        + ["same", "restore"]
    ),
    layer=st.integers(0, NUM_LAYERS - 1),
    point=st.sampled_from(POINTS),
    part=st.sampled_from(list(SLICES)),
    logits=st.sampled_from(list(LOGITS)),
    scale=st.sampled_from([0.5, 2.0]),
)
traces = st.tuples(
    st.sampled_from([0, 0, 0, 1, 1, 2, 3, 4]),
    st.lists(_ops, min_size=1, max_size=4),
    st.booleans(),
)
sessions = st.lists(
    st.one_of(traces, traces, traces, st.sampled_from(["log", "compute", "exit", "total"])),
    min_size=2,
    max_size=7,
)


def run(model: LanguageModel, description: list[Any], **options: bool) -> Outcome:
    """Records a session as described, and runs it."""
    outcome = Outcome()
    values = outcome.values
    try:
        with model.session(**options) as session:
            outcome.session = session
            torch.manual_seed(7)
            shared = _Shared(insitu.list().save(), torch.zeros(()) + 0.0)
            for number, step in enumerate(description):
                if step == "log":
                    session.log("between", number)
                elif step == "compute":
                    shared.hidden = shared.hidden * 2 if shared.hidden is not None else None
                elif step == "total":
                    shared.total += 1
                elif step == "exit" and number > 2:
                    session.exit()
                elif not isinstance(step, str):
                    prompt, ops, reads_last = step
                    with model.trace(PROMPTS[prompt], seed=number + 1) as tracer:
                        for place, op in enumerate(ops):
                            _do(model, tracer, op, shared, values, f"{number}.{place}")
                        if reads_last:
                            values[f"{number} logits"] = model.lm_head.output[:, -1].save()
            values["total"] = shared.total.save()
            values["list"] = shared.found
    except Error as err:
        line = err.location.line if err.location else 0
        outcome.error = (err.reason, line, str(err.trace_number))
    return outcome


@dataclass
class _Shared:
    found: Any
    total: Any
    hidden: Any = None


def _do(  # noqa: C901, PLR0915 - one case a kind
    model: Any, tracer: Any, op: Op, shared: _Shared, values: dict[str, Any], name: str
) -> None:
    target = _target(model, op)
    part = SLICES[op.part]
    match op.kind:
        case "save":
            values[name] = target[part].save()
        case "add":
            target[part] += op.scale
        case "set":
            target[part] = op.scale
        case "same":
            target[part] = target[part].clone()
        case "restore" if shared.hidden is not None:
            target[:1, 2] = shared.hidden
        case "restore":
            shared.hidden = target[:1, 2]
        case "whole":
            _write(model, op, target * op.scale)
        case "replace":
            _write(model, op, torch.zeros_like(target))
        case "copy":
            target[:, -1] = target[:, 0] * op.scale
        case "clone":
            other = target.clone()
            other[part] += 1
            values[name] = (other - target).sum().save()
        case "earlier" if shared.hidden is not None:
            target[:, -1] = shared.hidden
            shared.hidden = target[:1, 2]
        case "earlier":
            shared.hidden = target[:1, 2]
        case "compare" if shared.hidden is not None:
            values[name] = (target[:, -1] - shared.hidden).save()
        case "lens":
            norm, head = _norm(model), model.lm_head
            values[name] = [
                head(norm(layer.output[0][:, -1])).argmax(-1).save() for layer in _layers(model)
            ]
        case "log":
            tracer.log("in", name, target[:, -1].sum())
        case "append":
            shared.found.append(model.lm_head.output[LOGITS[op.logits]].sum())
        case "total":
            shared.total += target[:, 1].sum()
        case "noise":
            target[:, -1] += torch.randn(target.shape[-1])
        case "fail":
            values[name] = target[0, target[0, 0].argmax() + 1000].save()
        case "stop":
            tracer.stop()
        case "model out":
            values[name] = model.output["logits"][:, -1].save()
        case "inputs":
            values[name] = _layers(model)[op.layer].inputs[0][0].save()
    if op.kind not in ("fail", "stop"):
        values[f"{name} logits"] = model.lm_head.output[LOGITS[op.logits]].save()


def _layers(model: Any) -> Any:
    for path in ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers"):
        found = _find(model, path)
        if found is not None:
            return found
    raise AssertionError("the model has layers")


def _norm(model: Any) -> Any:
    paths = (
        "model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm",
        "model.decoder.final_layer_norm",
    )  # fmt: skip
    return next(found for path in paths if (found := _find(model, path)) is not None)


def _find(model: Any, path: str) -> Any:
    for name in path.split("."):
        if name not in dir(model):
            return None
        model = getattr(model, name)
    return model


def _place(model: Any, op: Op) -> tuple[Any, str]:
    layer = _layers(model)[op.layer]
    names = ("input_layernorm", "ln_1", "self_attn_layer_norm")
    match op.point:
        case "block in":
            return layer, "input"
        case "mlp out":
            return layer.mlp, "output"
        case "norm in":
            return next(getattr(layer, name) for name in names if name in dir(layer)), "input"
        case "embedding":
            paths = ("model.embed_tokens", "transformer.wte", "gpt_neox.embed_in")
            return next(at for path in paths if (at := _find(model, path)) is not None), "output"
        case "final norm":
            return _norm(model), "output"
        case "head in":
            return model.lm_head, "input"
    return layer, "output"


def _target(model: Any, op: Op) -> Any:
    module, side = _place(model, op)
    value = getattr(module, side)
    return value[0] if op.point == "block out" else value


def _write(model: Any, op: Op, value: Any) -> None:
    module, side = _place(model, op)
    setattr(module, side, value)
