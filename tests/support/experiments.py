"""One and the same experiments, for every backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import insitu

if TYPE_CHECKING:
    from collections.abc import Callable

    from insitu import LanguageModel

IDS = [5, 9, 17, 23]
LONG = [3, 8, 21, 34, 55]


def reads_and_writes(model: LanguageModel, **where: bool) -> dict[str, Any]:
    """Reads and writes of every kind, whole and in part."""
    with model.trace(IDS, **where):
        layer = model.model.layers[1]
        args, _ = layer.inputs
        first = args[0].clone().save()
        layer.input[:, 0] *= 0.5
        layer.mlp.output = layer.mlp.output + 0.1 * first
        layer.self_attn.o_proj.input[..., :8] = 0
        gate = layer.mlp.gate_proj.output.save()
        logits = model.lm_head.output.save()
    return {"first": first, "gate": gate, "logits": logits}


def module_calls(model: LanguageModel, **where: bool) -> dict[str, Any]:
    """The logit lens."""
    with model.session(**where):
        with model.trace(IDS):
            hidden = [layer.output[0][:, -1] for layer in model.model.layers]
        lenses = torch.stack([model.lm_head(model.model.norm(h)) for h in hidden]).save()
    return {"lenses": lenses}


def invokes(model: LanguageModel, **where: bool) -> dict[str, Any]:
    """Prompts of several lengths in one trace, with values crossing."""
    with model.trace(**where) as tracer:
        with tracer.invoke(IDS):
            taken = model.model.layers[0].output[0][:, -1]
        with tracer.invoke(LONG):
            model.model.layers[1].output[0][:, -1] = taken
            patched = model.lm_head.output.save()
        with tracer.invoke():
            everything = model.lm_head.output[:, -1].save()
    return {"patched": patched, "everything": everything}


def control_flow(model: LanguageModel, **where: bool) -> dict[str, Any]:
    """Loops, branches, variables, lists and dicts."""
    with model.session(**where) as session:
        kept = insitu.list().save()
        norms = insitu.dict().save()
        total = insitu.variable(torch.zeros(64))
        with session.iter([0.0, 1.0, 3.0], return_context=True) as (scale, loop):
            with model.trace(IDS):
                model.model.layers[0].output[:] *= scale
                hidden = model.model.layers[2].output[0][0, -1]
                kept.append(hidden)
            total.update(total + hidden)
            with session.cond(scale > 0.5) as branch:
                norms["large"] = scale
                loop.exit()
            with branch.else_():
                norms["small"] = scale
        total.save()
    return {"kept": list(kept), "norms": dict(norms), "total": total}


def python_flow(model: LanguageModel, **where: bool) -> dict[str, Any]:
    """Plain if and for over run-time values."""
    with model.session(**where):
        with model.trace(IDS):
            best = model.lm_head.output[0, -1].topk(3).indices
        tokens = insitu.list(best)
        total = torch.zeros(())
        for token in tokens:
            if token % 2 == 0:
                total = total + token
                norm = token * 2
            else:
                total = total - token
                norm = token * 3
            total = total + norm
        total.save()
        best.save()
    return {"total": total, "best": best}


def stop_and_skip(model: LanguageModel, **where: bool) -> dict[str, Any]:
    """A skipped layer, and a pass that ends early."""
    with model.session(**where):
        with model.trace(IDS):
            model.model.layers[1].skip(model.model.layers[0].output)
            skipped = model.lm_head.output.save()
        with model.trace(IDS) as tracer:
            early = model.model.layers[0].output[0].save()
            tracer.stop()
    return {"skipped": skipped, "early": early}


def edits_and_cache(model: LanguageModel, **where: bool) -> dict[str, Any]:
    """An edited model, and all that its modules return."""
    with model.edit() as edited:
        model.model.layers[0].output[:] *= 2
    with edited.trace(IDS, **where) as tracer:
        cache = tracer.cache(reduce=lambda value: value.float().norm(dim=-1))
    return {path: entry.output for path, entry in cache.items()}


def factories(model: LanguageModel, **where: bool) -> dict[str, Any]:
    """Tensors that are made inside."""
    torch.manual_seed(7)
    with model.trace(IDS, **where):
        noise = torch.randn(1, 4, 64)
        mask = torch.zeros(1, 4, 1)
        mask[:, -1] = 1
        model.model.layers[0].output[:] += noise * mask
        logits = model.lm_head.output.save()
        noise.save()
    return {"noise": noise, "logits": logits}


def generation(model: LanguageModel, **where: bool) -> dict[str, Any]:
    """Greedy tokens, steered and read at each step, up to a recorded end."""
    with model.generate(IDS, max_new_tokens=12, eos_token_id=None, **where) as tracer:
        hidden = insitu.list().save()
        for step in tracer.iter[:]:
            layer = model.model.layers[1]
            if step:
                layer.output[0][:, -1] *= 1.5
            layer.mlp.gate_proj.output[..., :8] = 0
            hidden.append(layer.output[0][:, -1])
            last = model.lm_head.output[:, -1].save()
        with tracer.iter[3:] as step:
            likeliest = model.lm_head.output[0, -1].softmax(-1).max()
            tracer.stop(when=(likeliest > 0.9) & (step > 4))
        ids = tracer.result.save()
        num_steps = tracer.num_steps.save()
    return {"hidden": list(hidden), "last": last, "ids": ids, "num_steps": num_steps}


def drawn_tokens(model: LanguageModel, **where: bool) -> dict[str, Any]:
    """Tokens that are drawn, from a seed of their own, from the session's, and in a loop."""
    torch.manual_seed(11)
    with model.session(**where) as session:
        with model.generate(IDS, max_new_tokens=9, do_sample=True, seed=4, top_k=40) as tracer:
            own = tracer.result.save()
        with model.generate([IDS, LONG], max_new_tokens=9, do_sample=True) as tracer:
            rows = tracer.result.save()
        looped = insitu.list().save()
        with session.iter([0, 1]):
            with model.generate(LONG, max_new_tokens=5, do_sample=True) as tracer:
                looped.append(tracer.result)
    return {"own": own, "rows": rows, "looped": list(looped)}


def generations_together(model: LanguageModel, **where: bool) -> dict[str, Any]:
    """Generations that share passes, each with interventions, options and an end of its own."""
    saved: dict[str, Any] = {}
    with model.session(**where):
        for number in range(4):
            ids = [number + 3, *IDS[1:]]
            options = {"do_sample": number > 1, "eos_token_id": None, "seed": number + 1}
            with model.generate(ids, max_new_tokens=4 + 3 * number, **options) as tracer:
                norms = insitu.list().save()
                for step in tracer.iter[:]:
                    layer = model.model.layers[number % 3]
                    layer.output[0][:, -1] *= 1 + 0.1 * number
                    norms.append(layer.output[0].norm())
                    if step == 2 and number == 3:
                        tracer.stop(when=torch.ones((), dtype=torch.bool))
                saved[f"ids {number}"] = tracer.result.save()
            saved[f"norms {number}"] = norms
    return {name: list(value) if "norms" in name else value for name, value in saved.items()}


def chosen_steps(model: LanguageModel, **where: bool) -> dict[str, Any]:
    """Steps named in every way, and an end of sequence before the last of them."""
    ends = list(range(0, 256, 3))
    with model.session(**where):
        with model.generate(IDS, max_new_tokens=6, eos_token_id=None) as tracer:
            seen = insitu.list().save()
            for _ in tracer.iter[[0, 2]]:
                model.model.layers[1].output[0][:, -1] *= 1.5
            for step in tracer.iter[1:4]:
                seen.append(model.model.layers[1].output[0][:, -1] * step)
            with tracer.all() as number:
                seen.append(model.model.layers[2].mlp.output[:, -1] + number)
        with model.generate(IDS, max_new_tokens=3, eos_token_id=None):
            chosen = [model.lm_head.output[0, -1].argmax().save()]
            chosen += [model.lm_head.next().output[0, -1].argmax().save() for _ in range(2)]
        with model.generate(IDS, max_new_tokens=3, eos_token_id=None) as tracer:
            tracer.next()
            second = model.model.layers[0].output[0].save()
        with model.generate(LONG, max_new_tokens=12, eos_token_id=ends) as tracer:
            total = torch.zeros(())
            for _ in tracer.iter[:]:
                last = model.model.layers[2].output[0][:, -1].save()
                total = total + last.mean()
            twice = (total * 2).save()
            ids = tracer.result.save()
            num_steps = tracer.num_steps.save()
        with model.generate(max_new_tokens=5, eos_token_id=None) as tracer:
            with tracer.invoke(IDS):
                pass
            with tracer.invoke([LONG, LONG[::-1]]):
                for _ in tracer.iter[1:]:
                    tracer.stop(when=model.lm_head.output[:, -1].argmax(-1) % 2 == 0)
            ended = tracer.result.save()
    assert int(num_steps) == ids.shape[1] - len(LONG) < 12
    return {
        "seen": list(seen), "chosen": chosen, "second": second,
        "last": last, "twice": twice, "ids": ids, "ended": ended,
    }  # fmt: skip


def gradients(model: LanguageModel, **where: bool) -> dict[str, Any]:
    """Gradients of two backward passes, read and written in any order, and of invokes."""
    with model.session(**where):
        with model.trace(IDS):
            hidden = [block.output[0] for block in model.blocks]
            hidden[1][:, 0] *= 0.5
            scores = model.unembed.output[0, -1].log_softmax(-1)
            with scores[7].backward(retain_graph=True):
                plain = [at.grad.save() for at in hidden]
                hidden[2].grad[:, 1] = 0
                hidden[1].grad = hidden[1].grad * 2
                written = hidden[0].grad.save()
            scores[8].backward()
            other = [at.grad.save() for at in (*hidden[::-1], model.embed.output)]
        with model.trace() as tracer:
            loss, found = 0, []
            for ids in (IDS, LONG):
                with tracer.invoke(ids):
                    found.append(model.blocks[0].output[0])
                    loss = loss + model.unembed.output[0, -1].log_softmax(-1)[7]
            loss.backward()
            invoked = [at.grad.save() for at in found]
    return {"plain": plain, "written": written, "other": other, "invoked": invoked}


def gradients_together(model: LanguageModel, **where: bool) -> dict[str, Any]:
    """Traces of losses of their own, which share a backward pass."""
    saved: dict[str, Any] = {}
    with model.session(**where) as session:
        for number in range(3):
            with model.trace([number + 3, *IDS[1:]]):
                hidden = [block.output[0] for block in model.blocks[number % 2 :]]
                hidden[0][:, 2] *= 0.5
                model.unembed.output[0, -1].log_softmax(-1)[7 + number].backward()
                saved[f"{number}"] = [at.grad.save() for at in hidden]
    assert len(session.explain().passes) == 1
    return saved


def attention(model: LanguageModel, **where: bool) -> dict[str, Any]:
    """What is in the heads of a layer and beside them: read, written, and differentiated."""
    saved: dict[str, Any] = {}
    names = ("q", "k", "q_rotary", "k_rotary", "v", "scores", "pattern", "z")
    with model.session(**where):
        with model.trace([IDS, IDS[::-1]]):
            heads = model.model.layers[1].self_attn.heads
            saved.update({name: getattr(heads, name).save() for name in names})
            saved["mid"] = model.blocks[1].resid_mid.save()
        for name in names:
            with model.trace(IDS):
                value = getattr(model.blocks[1].attn.heads, name)
                value[:, 3] = value[:, 0] * 0.5
                model.blocks[2].resid_mid[:, -1] += value[0, 2, 0, 0]
                saved[f"written {name}"] = model.lm_head.output.save()
        with model.trace(IDS):
            heads = model.blocks[1].attn.heads
            values = {name: getattr(heads, name) for name in names}
            values["mid"] = model.blocks[1].resid_mid
            model.unembed.output[0, -1].log_softmax(-1)[7].backward()
            for name, value in values.items():
                saved[f"by {name}"] = value.grad.save()
    return saved


EXPERIMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function
    for function in (
        reads_and_writes, module_calls, invokes, control_flow, python_flow, stop_and_skip,
        edits_and_cache, factories, generation, drawn_tokens, generations_together,
        chosen_steps, gradients, gradients_together, attention,
    )
}  # fmt: skip


def assert_same(actual: Any, expected: Any, *, atol: float, rtol: float = 0) -> None:
    """Compares results, however deep; exactly if both tolerances are 0."""
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_same(actual[key], value, atol=atol, rtol=rtol)
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other, atol=atol, rtol=rtol)
    else:
        torch.testing.assert_close(
            torch.as_tensor(actual), torch.as_tensor(expected), rtol=rtol, atol=atol
        )
