"""Published experiments, as the examples do them, against plain transformers with hooks.

Differences of logits agree to 1e-4 and probabilities to 1e-5, in float32.
"""

from __future__ import annotations

import runpy
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

EXAMPLES = Path(__file__).parents[2] / "examples"
LOGITS_ATOL = 1e-4
PROBABILITIES_ATOL = 1e-5

Hooks = list[tuple[torch.nn.Module, "Callable[..., Any]"]]


class Plain:
    """Plain transformers with hand-written hooks."""

    def __init__(self, folder: Path, attention: str | None = None) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = (
            AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
            .eval()
            .requires_grad_(False)
        )
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.layers = self.model.model.layers

    def ids(self, text: str) -> torch.Tensor:
        return self.tokenizer(text, return_tensors="pt")["input_ids"]

    def logits(
        self, ids: torch.Tensor, after: Hooks | None = None, before: Hooks | None = None
    ) -> torch.Tensor:
        """Runs a forward pass; gives the logits at the last position, [rows, vocabulary]."""
        with ExitStack() as hooks, torch.no_grad():
            for module, hook in after or []:
                hooks.enter_context(module.register_forward_hook(hook))
            for module, hook in before or []:
                hooks.enter_context(module.register_forward_pre_hook(hook))
            return self.model(input_ids=ids, use_cache=False).logits[:, -1]

    def difference(self, logits: torch.Tensor, answers: tuple[str, str]) -> float:
        one, other = (self.tokenizer(answer)["input_ids"][0] for answer in answers)
        return float(logits[0, one] - logits[0, other])

    def hidden_states(self, ids: torch.Tensor) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        hooks: Hooks = [
            (each, lambda _, __, out: found.append(_hidden(out))) for each in self.layers
        ]
        self.logits(ids, hooks)
        return found


@pytest.fixture(scope="module")
def plain(demo_folder: Path) -> Plain:
    return Plain(demo_folder)


@pytest.fixture(scope="module")
def eager(demo_folder: Path) -> Plain:
    return Plain(demo_folder, "eager")


@pytest.fixture
def run_example(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, demo_folder: Path
) -> Callable[..., dict[str, Any]]:
    """Runs an example in this process and gives its variables."""
    del demo_folder  # it is in the cache now, under its name
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    return run


def test_activation_patching_is_what_hooks_give(
    run_example: Callable[..., dict[str, Any]], plain: Plain, tmp_path: Path
) -> None:
    found = run_example("activation_patching", "--every", "10")
    assert (tmp_path / "activation_patching.png").read_bytes().startswith(b"\x89PNG")
    for pair in found["PAIRS"]:
        clean_ids, corrupted_ids = plain.ids(pair.clean), plain.ids(pair.corrupted)
        assert clean_ids.shape == corrupted_ids.shape
        answers = pair.clean_answer, pair.corrupted_answer
        clean = plain.difference(plain.logits(clean_ids), answers)
        corrupted = plain.difference(plain.logits(corrupted_ids), answers)
        assert clean > 2  # the model knows both answers
        assert corrupted < -2
        assert float(pair.clean_difference) == pytest.approx(clean, abs=LOGITS_ATOL)
        assert float(pair.corrupted_difference) == pytest.approx(corrupted, abs=LOGITS_ATOL)
        hidden = plain.hidden_states(clean_ids)
        assert len(pair.patched) == 3 * clean_ids.shape[1]
        for (layer, position), difference in pair.patched.items():
            patch = _replace(hidden[layer][:, position], position)
            expected = plain.difference(
                plain.logits(corrupted_ids, [(plain.layers[layer], patch)]), answers
            )
            assert float(difference) == pytest.approx(expected, abs=LOGITS_ATOL)


def test_causal_tracing_is_what_hooks_give(
    run_example: Callable[..., dict[str, Any]], plain: Plain
) -> None:
    found = run_example("causal_tracing", "--every", "10")
    noise, subject, answer = found["noise"], found["SUBJECT"], found["answer"]
    ids = plain.ids(found["PROMPT"])
    rows = ids.expand(len(noise), -1)
    hidden = plain.hidden_states(ids)
    embeddings = plain.model.model.embed_tokens
    with torch.no_grad():
        scaled = 3 * embeddings(ids).std() * noise

    def add_noise(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, subject] += scaled
        return output

    def probability(ids: torch.Tensor, *hooks: tuple[torch.nn.Module, Any]) -> torch.Tensor:
        return plain.logits(ids, list(hooks)).softmax(-1)[:, answer]

    clean, corrupted = probability(ids), probability(rows, (embeddings, add_noise))
    assert clean > 0.5  # the model knows it
    assert corrupted.mean() < 0.1  # and the noise hides it
    _assert_close(found["clean"], clean, PROBABILITIES_ATOL)
    _assert_close(found["corrupted"], corrupted, PROBABILITIES_ATOL)
    assert len(found["restored"]) == 3 * ids.shape[1]
    for (layer, position), restored in found["restored"].items():
        patch = _replace(hidden[layer][:, position], position)
        expected = probability(rows, (embeddings, add_noise), (plain.layers[layer], patch))
        _assert_close(restored, expected, PROBABILITIES_ATOL)


def test_path_patching_is_what_hooks_give(
    run_example: Callable[..., dict[str, Any]], plain: Plain
) -> None:
    found = run_example("path_patching", "--first", "20")
    answers, receiver, size = found["ANSWERS"], found["receiver"], found["size"]
    queries = plain.layers[receiver].self_attn.q_proj
    own = slice(0, size)
    clean_ids, corrupted_ids = plain.ids(found["CLEAN"]), plain.ids(found["CORRUPTED"])

    def heads(ids: torch.Tensor) -> dict[int, torch.Tensor]:
        seen: dict[int, torch.Tensor] = {}
        plain.logits(
            ids,
            before=[
                (layer.self_attn.o_proj, lambda _, args, n=n: seen.__setitem__(n, args[0].clone()))
                for n, layer in enumerate(plain.layers)
            ],
        )
        return seen

    clean, corrupted = heads(clean_ids), heads(corrupted_ids)
    for (sender, head), difference in found["patched"].items():
        held = {layer: clean[layer] for layer in range(sender, receiver)}
        columns = slice(head * size, (head + 1) * size)
        held[sender] = clean[sender].clone()
        held[sender][..., columns] = corrupted[sender][..., columns]
        arriving: list[torch.Tensor] = []
        plain.logits(
            clean_ids,
            [(queries, lambda _, __, output, to=arriving: to.append(output[..., own].clone()))],
            [
                (plain.layers[layer].self_attn.o_proj, lambda _, __, value=value: (value,))
                for layer, value in held.items()
            ],
        )

        def receive(_: Any, __: Any, output: torch.Tensor, to: Any = arriving) -> torch.Tensor:
            output = output.clone()
            output[..., own] = to[0]
            return output

        expected = plain.difference(plain.logits(clean_ids, [(queries, receive)]), answers)
        assert float(difference) == pytest.approx(expected, abs=LOGITS_ATOL)
    strongest = min(found["patched"], key=lambda sender: float(found["patched"][sender]))
    assert strongest == (20, 0)


def test_the_logit_lens_is_what_hooks_give(
    run_example: Callable[..., dict[str, Any]], plain: Plain
) -> None:
    found = run_example("logit_lens")
    hidden = plain.hidden_states(plain.ids(found["arguments"].prompt))
    with torch.no_grad():
        states = torch.cat([state[:, -1] for state in hidden])
        expected = plain.model.lm_head(plain.model.model.norm(states)).softmax(-1).max(-1)
    assert torch.equal(found["tokens"], expected.indices)
    _assert_close(found["probabilities"], expected.values, PROBABILITIES_ATOL)


def test_induction_heads_are_those_of_eager_attention(
    run_example: Callable[..., dict[str, Any]], eager: Plain, tmp_path: Path
) -> None:
    found = run_example("induction_heads", "--length", "12")
    assert (tmp_path / "induction_heads.png").read_bytes().startswith(b"\x89PNG")
    with torch.no_grad():
        patterns = eager.model(input_ids=found["tokens"], output_attentions=True).attentions
    # [layer, head]
    expected = torch.stack(
        [
            torch.stack([pattern[0, :, query, query - 11] for query in range(12, 24)]).mean(0)
            for pattern in patterns
        ]
    )
    _assert_close(found["scores"], expected, PROBABILITIES_ATOL)
    assert expected.max() > 0.5  # the model has such heads
    _assert_close(found["pattern"], patterns[found["layer"]][0, found["head"]], PROBABILITIES_ATOL)


def test_direct_logit_attribution_is_what_hooks_give(
    run_example: Callable[..., dict[str, Any]], eager: Plain, tmp_path: Path
) -> None:
    found = run_example("direct_logit_attribution")
    assert (tmp_path / "direct_logit_attribution.png").read_bytes().startswith(b"\x89PNG")
    ids = eager.ids(found["arguments"].prompt)
    seen: dict[int, torch.Tensor] = {}
    hidden = eager.hidden_states(ids)[-1][0, -1]
    logits = eager.logits(
        ids,
        before=[
            (layer.self_attn.o_proj, lambda _, args, n=n: seen.__setitem__(n, args[0][0, -1]))
            for n, layer in enumerate(eager.layers)
        ],
    )
    norm = eager.model.model.norm
    scale = norm.weight / (hidden.pow(2).mean() + norm.variance_epsilon).sqrt()
    head = eager.model.lm_head.weight
    direction = (head[found["answer"]] - head[found["other"]]) * scale
    for layer, arriving in seen.items():
        weights = eager.layers[layer].self_attn.o_proj.weight  # [hidden, head * head_dim]
        parts = (direction @ weights * arriving).reshape(found["num_heads"], -1).sum(-1)
        _assert_close(found["heads"][layer], parts, LOGITS_ATOL)
    total = logits[0, found["answer"]] - logits[0, found["other"]]
    _assert_close(found["total"], total, LOGITS_ATOL)
    _assert_close(found["parts"], total, 1e-3)


def _hidden(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _replace(state: torch.Tensor, position: int) -> Callable[..., None]:
    def write(_: Any, __: Any, output: Any) -> None:
        _hidden(output)[:, position] = state

    return write


def _assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_attribution_patching_is_what_autograd_gives(
    run_example: Callable[..., dict[str, Any]], plain: Plain, tmp_path: Path
) -> None:
    found = run_example("attribution_patching")
    assert (tmp_path / "attribution_patching.png").read_bytes().startswith(b"\x89PNG")
    clean = plain.hidden_states(plain.ids(found["CLEAN"]))
    seen: list[torch.Tensor] = []

    def keep(_: object, __: object, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
        hidden.retain_grad()
        seen.append(hidden)
        return hidden

    with ExitStack() as hooks:
        for layer in plain.layers:
            hooks.enter_context(layer.register_forward_hook(keep))
        logits = plain.model(input_ids=plain.ids(found["CORRUPTED"]), use_cache=False).logits
        difference = logits[0, -1, found["one"]] - logits[0, -1, found["other"]]
        difference.backward()
    assert float(found["difference"]) == pytest.approx(difference.item(), abs=LOGITS_ATOL)
    for row, new, old in zip(found["foretold"], clean, seen, strict=True):
        expected = ((new - old) * old.grad).sum(-1)[0]
        assert torch.allclose(row, expected, atol=1e-3, rtol=1e-3)


def test_integrated_gradients_are_what_autograd_gives_and_add_up_to_the_whole(
    run_example: Callable[..., dict[str, Any]], plain: Plain
) -> None:
    found = run_example("integrated_gradients")
    layer = int(found["arguments"].layer)
    ids, other_ids = plain.ids(found["PROMPT"]), plain.ids(found["OTHER"])
    end, begin = (plain.hidden_states(each)[layer] for each in (ids, other_ids))
    total = torch.zeros_like(end)
    for step in range(found["num_steps"]):
        here = (begin + (end - begin) * ((step + 0.5) / found["num_steps"])).requires_grad_()
        with plain.layers[layer].register_forward_hook(lambda *_, value=here: value):
            logits = plain.model(input_ids=ids, use_cache=False).logits[0, -1]
        (logits[found["one"]] - logits[found["other"]]).backward()
        assert here.grad is not None
        total += here.grad / found["num_steps"]
    _assert_close(found["parts"], (total * (end - begin)).sum(-1)[0], 1e-3)
    whole = float(found["at_end"] - found["at_begin"])
    assert whole > 10
    assert float(found["parts"].sum()) == pytest.approx(whole, rel=0.01)
