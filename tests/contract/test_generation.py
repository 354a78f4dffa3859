"""Generation gives what plain transformers' generate gives with hooks written by hand."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import insitu
from insitu import LanguageModel
from insitu._brought import session_tensors
from insitu_proto.v1.shard_service_pb2 import Segment
from insitu_shard.compiler import Limits
from insitu_shard.engine import Saved, SegmentPool, SegmentRun
from insitu_wire.errors import Error, Reason
from support.same_merged import is_there
from support.streaming import Remembering
from support.tiny_models import CONFIGS, TinyModels

IDS = [5, 9, 17, 23, 42, 61, 7]
OTHERS = [11, 3, 200, 150, 31, 8, 90]
STEPS = 10
_DIRECTION = torch.randn(64, generator=torch.Generator().manual_seed(1))
_BLOCKS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers")


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> Any:
    return LanguageModel(str(tiny.folder("llama")))


@pytest.fixture(scope="module")
def module(tiny: TinyModels) -> Any:
    return tiny.module("llama")


def _plain(module: Any, rows: list[list[int]], **options: Any) -> torch.Tensor:
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    generated: torch.Tensor = module.generate(ids, attention_mask=mask, **options)
    return generated


def _block_path(paths: Any) -> str:
    return next(f"{path}.1" for path in _BLOCKS if f"{path}.1" in paths)


def _steered(
    module: Any,
    path: str,
    strengths: dict[int, float],
    ids: list[int] = IDS,
    max_new_tokens: int = STEPS,
    **options: Any,
) -> Any:
    """Generates with a hook that adds to the last position at some steps."""
    seen: list[torch.Tensor] = []

    def hook(_: Any, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[:, -1] += strengths.get(len(seen), 0) * _DIRECTION
        seen.append(hidden[:, -1].clone())

    handle = dict(module.named_modules())[path].register_forward_hook(hook)
    try:
        return _plain(module, [ids], max_new_tokens=max_new_tokens, **options), seen
    finally:
        handle.remove()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 0.8, "top_k": 50}])
def test_steering_at_each_step_is_as_with_a_hook(
    family: str, options: dict[str, Any], tiny: TinyModels
) -> None:
    model: Any = LanguageModel(str(tiny.folder(family)))
    module = tiny.module(family)
    path = _block_path(model._tree)
    strengths = dict.fromkeys(range(STEPS), 2.0)
    torch.manual_seed(7)
    expected, seen = _steered(module, path, strengths, eos_token_id=None, **options)
    with model.generate(IDS, max_new_tokens=STEPS, eos_token_id=None, seed=7, **options) as tracer:
        hidden = insitu.list().save()
        for _ in tracer.iter[:]:
            model.get(path).output[0][:, -1] += 2.0 * _DIRECTION
            hidden.append(model.get(path).output[0][:, -1])
        ids = tracer.result.save()
        num_steps = tracer.num_steps.save()
    assert torch.equal(ids, expected)
    assert int(num_steps) == len(hidden) == STEPS
    for ours, theirs in zip(hidden, seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 8},
        {"do_sample": True, "top_p": 0.7},
        {"do_sample": True, "min_p": 0.05, "temperature": 2.0},
    ],
)
def test_options_mean_what_they_mean_to_transformers(
    options: dict[str, Any], model: Any, module: Any
) -> None:
    torch.manual_seed(3)
    expected = _plain(module, [IDS], max_new_tokens=20, **options)
    with model.generate(IDS, max_new_tokens=20, seed=3, **options) as tracer:
        ids = tracer.result.save()
    assert torch.equal(ids, expected)


@pytest.mark.parametrize(
    ("steps", "chosen"),
    [
        ([0, 4], [0, 4]),
        (slice(2, 5), [2, 3, 4]),
        (slice(1, None, 3), [1, 4, 7]),
        (slice(None, 2), [0, 1]),
        (6, [6]),
    ],
)
def test_chosen_steps_only_are_written_to(
    steps: Any, chosen: list[int], model: Any, module: Any
) -> None:
    strengths = dict.fromkeys(chosen, 3.0)
    expected, _ = _steered(module, "model.layers.1", strengths, eos_token_id=None)
    with model.generate(IDS, max_new_tokens=STEPS, eos_token_id=None) as tracer:
        numbers = []
        for step in tracer.iter[steps]:
            numbers.append(step)
            model.model.layers[1].output[0][:, -1] += 3.0 * _DIRECTION
        ids = tracer.result.save()
    assert numbers == chosen
    assert torch.equal(ids, expected)


def test_without_a_step_an_intervention_is_in_the_prompts_pass(model: Any, module: Any) -> None:
    expected, seen = _steered(module, "model.layers.1", {0: 3.0}, eos_token_id=None)
    with model.generate(IDS, max_new_tokens=STEPS, eos_token_id=None):
        model.model.layers[1].output[0][:, -1] += 3.0 * _DIRECTION
        hidden = model.model.layers[1].output[0].save()
        logits = model.lm_head.output.save()
        ids = model.generator.output.save()
    assert torch.equal(ids, expected)
    assert hidden.shape == (1, len(IDS), 64)
    assert logits.shape == (1, len(IDS), 256)
    torch.testing.assert_close(hidden[:, -1], seen[0])


def test_next_goes_on_by_a_step_for_one_module_or_for_all(model: Any, module: Any) -> None:
    expected = _plain(module, [IDS], max_new_tokens=3, eos_token_id=None)[0, len(IDS) :]
    with model.generate(IDS, max_new_tokens=3, eos_token_id=None):
        one = [model.lm_head.output[0, -1].argmax().save()]
        one += [model.lm_head.next().output[0, -1].argmax().save() for _ in range(2)]
        first = model.model.layers[0].output[0].save()
    with model.generate(IDS, max_new_tokens=3, eos_token_id=None) as tracer:
        other = [model.lm_head.output[0, -1].argmax().save()]
        for _ in range(2):
            tracer.next()
            other.append(model.lm_head.output[0, -1].argmax().save())
        for _ in tracer.iter[0]:
            again = model.lm_head.output[0, -1].argmax().save()
        last = model.lm_head.output[0, -1].argmax().save()
    assert torch.stack(one).tolist() == torch.stack(other).tolist() == expected.tolist()
    assert [int(again), int(last)] == [int(expected[0]), int(expected[2])]
    assert first.shape == (1, len(IDS), 64)


def test_next_in_an_invoke_leaves_the_others_at_their_steps(model: Any, module: Any) -> None:
    rows = [IDS, OTHERS]
    expected = _plain(module, rows, max_new_tokens=3, eos_token_id=None)[:, len(IDS) :]
    chosen: list[list[Any]] = []
    with model.generate(max_new_tokens=3, eos_token_id=None) as tracer:
        for ids in rows:
            with tracer.invoke(ids):
                first = model.lm_head.output[0, -1].argmax().save()
                second = model.lm_head.next().output[0, -1].argmax().save()
                tracer.next()
                chosen.append([first, second, model.lm_head.output[0, -1].argmax().save()])
        with tracer.invoke():
            hidden = model.model.layers[0].output[0].save()
    assert [[int(token) for token in each] for each in chosen] == expected.tolist()
    assert hidden.shape == (2, len(IDS), 64)


def test_a_with_block_is_recorded_once_and_runs_at_each_step(model: Any, module: Any) -> None:
    strengths = {step: float(step) for step in range(STEPS)}
    expected, seen = _steered(module, "model.layers.1", strengths, eos_token_id=None)
    num_runs = 0
    with model.generate(IDS, max_new_tokens=STEPS, eos_token_id=None) as tracer:
        steps = insitu.list().save()
        with tracer.all() as step:
            num_runs += 1
            model.model.layers[1].output[0][:, -1] += step * _DIRECTION
            steps.append(step)
            hidden = model.model.layers[1].output[0][:, -1].save()
        ids = tracer.result.save()
    assert num_runs == 1
    assert torch.equal(ids, expected)
    assert [int(step) for step in steps] == list(range(STEPS))
    torch.testing.assert_close(hidden, seen[-1])


def test_an_early_end_cuts_nothing_off_that_follows_the_loop(
    model: Any, module: Any, caplog: pytest.LogCaptureFixture
) -> None:
    strengths = dict.fromkeys(range(STEPS), 1.5)
    whole, _ = _steered(module, "model.layers.1", strengths, eos_token_id=None)
    generated = whole[0, len(IDS) :].tolist()
    num_steps = next(n for n in range(3, STEPS) if generated.index(generated[n - 1]) == n - 1)
    end = generated[num_steps - 1]
    expected, seen = _steered(module, "model.layers.1", strengths, eos_token_id=end)
    each: list[Any] = []
    with (
        caplog.at_level(logging.INFO, logger="insitu"),
        model.generate(IDS, max_new_tokens=STEPS, eos_token_id=end) as tracer,
    ):
        hidden = insitu.list().save()
        total = torch.zeros(())
        for step in tracer.iter[:]:
            model.model.layers[1].output[0][:, -1] += 1.5 * _DIRECTION
            last = model.model.layers[1].output[0][:, -1].save()
            hidden.append(last)
            total = total + last.sum()
            if step == 2:
                third = last.norm().save()
            each.append(last)
        twice = (total * 2).save()
        ids = tracer.result.save()
        ran = tracer.num_steps.save()
    assert torch.equal(ids, expected)
    assert int(ran) == len(hidden) == num_steps
    assert [is_there(value) for value in each] == [True] * num_steps + [False] * (STEPS - num_steps)
    assert torch.equal(last, hidden[-1])
    assert torch.equal(third, hidden[2].norm())
    torch.testing.assert_close(twice, 2 * torch.stack([at.sum() for at in seen]).sum())
    assert f"generated {num_steps} of at most {STEPS} tokens" in caplog.text


def test_a_recorded_condition_ends_generation_after_its_step(model: Any, module: Any) -> None:
    expected = _plain(module, [IDS], max_new_tokens=40, eos_token_id=None)
    token = int(expected[0, len(IDS) + 5])
    first = expected[0, len(IDS) :].tolist().index(token)
    with model.generate(IDS, max_new_tokens=40, eos_token_id=None) as tracer:
        for _ in tracer.iter[:]:
            tracer.stop(when=model.lm_head.output[:, -1].argmax(-1) == token)
        ids = tracer.result.save()
        norms = insitu.list().save()
        norms.append(ids.sum())
    assert torch.equal(ids, expected[:, : len(IDS) + first + 1])
    assert len(norms) == 1


def test_rows_end_by_themselves_and_are_filled_with_padding(model: Any, module: Any) -> None:
    rows = [IDS, OTHERS]
    whole = _plain(module, rows, max_new_tokens=STEPS, eos_token_id=None)
    end = int(whole[0, len(IDS) + 2])
    expected = _plain(module, rows, max_new_tokens=STEPS, eos_token_id=end)
    with model.generate(rows, max_new_tokens=STEPS, eos_token_id=end) as tracer:
        ids = tracer.result.save()
    assert torch.equal(ids, expected)
    with model.generate(rows, max_new_tokens=STEPS, eos_token_id=None) as tracer:
        for _ in tracer.iter[:]:
            tracer.stop(when=model.lm_head.output[:, -1].argmax(-1) == end)
        stopped = tracer.result.save()
    assert torch.equal(stopped, expected)


def test_rows_that_are_drawn_together_are_as_plain_transformers_draws_them(
    model: Any, module: Any
) -> None:
    rows = [IDS, OTHERS[:4], OTHERS]
    torch.manual_seed(9)
    expected = _plain(module, rows, max_new_tokens=STEPS, do_sample=True, temperature=1.5)
    with model.generate(
        rows, max_new_tokens=STEPS, do_sample=True, temperature=1.5, seed=9
    ) as tracer:
        ids = tracer.result.save()
    assert torch.equal(ids, expected)


def test_a_step_is_written_to_where_a_value_of_it_says_so(model: Any, module: Any) -> None:
    written = []

    def hook(_: Any, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        written.append(bool(hidden[0, -1].sum() > 0))
        hidden[:, -1] += 2.0 * _DIRECTION * written[-1]

    with module.model.layers[1].register_forward_hook(hook):
        expected = _plain(module, [IDS], max_new_tokens=STEPS, eos_token_id=None)
    assert 0 < sum(written) < STEPS
    with model.session():
        with model.generate(IDS, max_new_tokens=STEPS, eos_token_id=None) as tracer:
            for _ in tracer.iter[:]:
                hidden = model.model.layers[1].output[0]
                if hidden[0, -1].sum() > 0:
                    hidden[:, -1] += 2.0 * _DIRECTION
            by_if = tracer.result.save()
        with model.generate(IDS, max_new_tokens=STEPS, eos_token_id=None) as tracer:
            with tracer.all():
                hidden = model.model.layers[1].output[0]
                with tracer.cond(hidden[0, -1].sum() > 0):
                    hidden[:, -1] += 2.0 * _DIRECTION
            by_block = tracer.result.save()
    assert torch.equal(by_if, expected)
    assert torch.equal(by_block, expected)


def test_a_stop_ends_generation_where_nothing_more_is_needed(model: Any) -> None:
    with model.generate(IDS, max_new_tokens=STEPS) as tracer:
        for step in tracer.iter[:3]:
            hidden = model.model.layers[1].output[0][:, -1].save()
            if step == 2:
                tracer.stop()
                later = model.model.layers[2].output[0].save()
    assert hidden.shape == (1, 64)
    assert not is_there(later)


def test_stop_strings_end_rows(demo_folder: Any) -> None:
    model: Any = LanguageModel(str(demo_folder))
    prompt = "The Eiffel Tower is in the city of"
    with model.generate(prompt, max_new_tokens=12) as tracer:
        whole = tracer.result.save()
    with model.generate(prompt, max_new_tokens=12, stop_strings=" Paris") as tracer:
        ids = tracer.result.save()
    text = model.tokenizer.decode(ids[0])
    assert text.endswith(" Paris")
    assert ids.shape[1] < whole.shape[1]
    assert torch.equal(ids[0], whole[0, : ids.shape[1]])


def test_invokes_of_other_lengths_are_rows_of_one_generation(model: Any, module: Any) -> None:
    expected = _plain(module, [IDS, OTHERS[:4]], max_new_tokens=STEPS, eos_token_id=None)
    with model.generate(max_new_tokens=STEPS, eos_token_id=None) as tracer:
        with tracer.invoke(IDS):
            for step in tracer.iter[:2]:
                shape = model.model.layers[1].output[0].shape
                assert shape == (1, 1 if step else len(IDS), 64)
        with tracer.invoke(OTHERS[:4]):
            for _ in tracer.iter[:2]:
                hidden = model.model.layers[1].output[0].save()
            other = tracer.result.save()
        ids = tracer.result.save()
    assert torch.equal(ids, expected)
    assert hidden.shape == (1, 1, 64)
    assert torch.equal(other, expected[1:, 3:])


def test_an_end_in_an_invoke_is_of_its_rows_alone(model: Any, module: Any) -> None:
    others = [OTHERS, OTHERS[::-1]]
    whole = _plain(module, others, max_new_tokens=STEPS, eos_token_id=None)
    end = int(whole[0, len(OTHERS) + 2])
    expected = _plain(module, others, max_new_tokens=STEPS, eos_token_id=end)
    with model.generate(max_new_tokens=STEPS, eos_token_id=None) as tracer:
        with tracer.invoke(IDS):
            first = tracer.result.save()
        with tracer.invoke(others):
            for _ in tracer.iter[:]:
                tracer.stop(when=model.lm_head.output[:, -1].argmax(-1) == end)
            rest = tracer.result.save()
        num_steps = tracer.num_steps.save()
    assert int(num_steps) == STEPS
    assert torch.equal(first, _plain(module, [IDS], max_new_tokens=STEPS, eos_token_id=None))
    length = expected.shape[1]
    assert torch.equal(rest[:, :length], expected)
    assert not rest[:, length:].any()  # padding


def test_a_write_of_one_invoke_changes_its_rows_alone(model: Any, module: Any) -> None:
    expected, _ = _steered(module, "model.layers.1", dict.fromkeys(range(STEPS), 2.0),
                           eos_token_id=None)  # fmt: skip
    with model.generate(max_new_tokens=STEPS, eos_token_id=None) as tracer:
        with tracer.invoke(IDS):
            for _ in tracer.iter[:]:
                model.model.layers[1].output[0][:, -1] += 2.0 * _DIRECTION
        with tracer.invoke(OTHERS):
            pass
        ids = tracer.result.save()
    assert torch.equal(ids[:1], expected)
    assert torch.equal(ids[1:], _plain(module, [OTHERS], max_new_tokens=STEPS, eos_token_id=None))


def test_attention_is_seen_at_each_step(model: Any) -> None:
    with model.generate(IDS, max_new_tokens=4, eos_token_id=None) as tracer:
        patterns = insitu.list().save()
        for _ in tracer.iter[:]:
            patterns.append(model.model.layers[1].self_attn.heads.pattern)
        ids = tracer.result.save()
    assert [list(at.shape[2:]) for at in patterns] == [[7, 7], [1, 8], [1, 9], [1, 10]]
    with model.trace(ids[:, :-1]):
        whole = model.model.layers[1].self_attn.heads.pattern.save()
    torch.testing.assert_close(patterns[-1], whole[:, :, -1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_generations_that_share_a_loop_are_each_as_with_a_hook(
    family: str, tiny: TinyModels
) -> None:
    """Each with its own steps that are written at, its own draws and its own end."""
    model: Any = LanguageModel(str(tiny.folder(family)))
    module = tiny.module(family)
    path = _block_path(model._tree)
    prompts = [IDS, OTHERS, IDS[::-1]]
    options = [
        {"max_new_tokens": STEPS - 3 * number, "eos_token_id": None, "do_sample": number == 1}
        for number in range(3)
    ]
    found = []
    with model.session() as session:
        for number, ids in enumerate(prompts):
            with model.generate(ids, seed=number + 1, **options[number]) as tracer:
                hidden = insitu.list().save()
                for _ in tracer.iter[number:]:
                    model.get(path).output[0][:, -1] += (number + 1) * _DIRECTION
                    hidden.append(model.get(path).output[0][:, -1])
                found.append((tracer.result.save(), hidden))
    assert [plan.traces for plan in session.explain().passes] == [(1, 2, 3)]
    for number, (ids, hidden) in enumerate(found):
        strengths = dict.fromkeys(range(number, STEPS), number + 1.0)
        torch.manual_seed(number + 1)
        expected, seen = _steered(module, path, strengths, prompts[number], **options[number])
        assert torch.equal(ids, expected)
        for ours, theirs in zip(hidden, seen[number:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
def test_prompts_of_other_lengths_share_a_loop_where_padding_is_allowed(
    family: str, tiny: TinyModels
) -> None:
    model: Any = LanguageModel(str(tiny.folder(family)))
    module = tiny.module(family)
    path = _block_path(model._tree)
    prompts = [IDS, OTHERS[:4], [*OTHERS, 12, 19]]
    found = []
    with model.session(padding=True) as session:
        for number, ids in enumerate(prompts):
            with model.generate(ids, max_new_tokens=STEPS, eos_token_id=None) as tracer:
                first = model.blocks[1].attn.heads.pattern.save()
                for _ in tracer.iter[:]:
                    model.get(path).output[0][:, -1] += number * _DIRECTION
                found.append((tracer.result.save(), first))
    assert [plan.traces for plan in session.explain().passes] == [(1, 2, 3)]
    for number, (ids, first) in enumerate(found):
        strengths = dict.fromkeys(range(STEPS), float(number))
        expected, _ = _steered(module, path, strengths, prompts[number], eos_token_id=None)
        assert torch.equal(ids, expected)
        with model.trace(prompts[number]):
            pattern = model.blocks[1].attn.heads.pattern.save()
        torch.testing.assert_close(first, pattern, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "projection"), [("llama", "self_attn.o_proj"), ("gpt2", "attn.c_proj")]
)
def test_a_head_is_ablated_at_each_step(family: str, projection: str, tiny: TinyModels) -> None:
    model: Any = LanguageModel(str(tiny.folder(family)))
    module: Any = tiny.module(family)

    def ablate(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        z = args[0].clone()
        z[..., 16:32] = 0
        return (z,)

    output = module.get_submodule(f"{model.blocks[1].path}.{projection}")
    with output.register_forward_pre_hook(ablate):
        expected = _plain(module, [IDS], max_new_tokens=STEPS, eos_token_id=None)
    with model.generate(IDS, max_new_tokens=STEPS, eos_token_id=None) as tracer:
        for _ in tracer.iter[:]:
            model.blocks[1].attn.heads.z[:, 1] = 0
        ids = tracer.result.save()
    assert torch.equal(ids, expected)
    assert not torch.equal(ids, _plain(module, [IDS], max_new_tokens=STEPS, eos_token_id=None))


def test_an_edit_holds_at_each_step(model: Any, module: Any) -> None:
    expected, _ = _steered(module, "model.layers.1", dict.fromkeys(range(STEPS), 2.0),
                           eos_token_id=None)  # fmt: skip
    with model.edit() as edited:
        model.model.layers[1].output[0][:, -1] += 2.0 * _DIRECTION
    with edited.generate(IDS, max_new_tokens=STEPS, eos_token_id=None) as tracer:
        ids = tracer.result.save()
    assert torch.equal(ids, expected)


def test_a_module_is_skipped_at_a_step(model: Any, module: Any) -> None:
    calls = 0

    def skip(_: Any, args: Any, output: torch.Tensor) -> Any:
        nonlocal calls
        calls += 1
        return args[0].clone() if calls == 3 else output

    handle = module.model.layers[1].register_forward_hook(skip)
    expected = _plain(module, [IDS], max_new_tokens=STEPS, eos_token_id=None)
    handle.remove()
    with model.generate(IDS, max_new_tokens=STEPS, eos_token_id=None) as tracer:
        for _ in tracer.iter[2]:
            model.model.layers[1].skip(model.model.layers[0].output)
        ids = tracer.result.save()
    assert torch.equal(ids, expected)


def test_values_of_earlier_traces_are_used_at_steps_and_ids_go_on_to_later_ones(
    model: Any, module: Any
) -> None:
    with model.session():
        with model.trace(OTHERS):
            hidden = model.model.layers[1].output[0][:, -1]
            kept = hidden.save()
        with model.generate(IDS, max_new_tokens=4, eos_token_id=None) as tracer:
            for _ in tracer.iter[:]:
                model.model.layers[1].output[0][:, -1] = hidden
            ids = tracer.result
            generated = ids.save()
        with model.trace(ids):
            logits = model.lm_head.output.save()
        with model.generate(ids, max_new_tokens=3, eos_token_id=None) as tracer:
            longer = tracer.result.save()

    def patch(_: Any, __: Any, output: Any) -> None:
        (output[0] if isinstance(output, tuple) else output)[:, -1] = kept

    handle = module.model.layers[1].register_forward_hook(patch)
    assert torch.equal(generated, _plain(module, [IDS], max_new_tokens=4, eos_token_id=None))
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(logits, module(generated).logits)
    rows = generated.tolist()
    assert torch.equal(longer, _plain(module, rows, max_new_tokens=3, eos_token_id=None))


def test_the_same_seed_draws_the_same_and_each_item_of_a_loop_others(model: Any) -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        with model.session() as session:
            found = insitu.list().save()
            with session.iter([0, 1]):
                with model.generate(IDS, max_new_tokens=STEPS, do_sample=True) as tracer:
                    found.append(tracer.result)
            with model.generate(IDS, max_new_tokens=STEPS, do_sample=True) as tracer:
                last = tracer.result.save()
        drawn.append([*(at.tolist() for at in found), last.tolist()])
    assert drawn[0] == drawn[1]
    assert len({str(ids) for ids in drawn[0]}) == 3


def test_a_streamer_is_given_tokens_as_they_are_chosen(model: Any, module: Any) -> None:
    ours, theirs = Remembering(), Remembering()
    _plain(module, [IDS], max_new_tokens=5, streamer=theirs)
    with model.generate(IDS, max_new_tokens=5, streamer=ours):
        pass
    assert ours.told == theirs.told


def test_what_nodes_write_that_no_token_can_be_drawn_from_is_an_error(model: Any) -> None:
    with pytest.raises(Error) as caught, model.generate(IDS, max_new_tokens=3, do_sample=True):
        model.lm_head.output[:] = float("nan")
        model.generator.output.save()
    assert caught.value.reason is Reason.INTERVENTION_RAISED


def _refused(model: Any, **options: Any) -> Error:
    with pytest.raises(Error) as caught, model.generate(IDS, **{"max_new_tokens": 5, **options}):
        pass
    assert caught.value.location is not None
    assert caught.value.location.file == __file__
    return caught.value


def test_an_unknown_option_is_an_error_that_lists_the_known(model: Any) -> None:
    err = _refused(model, num_beams=4)
    assert "num_beams" in err.message
    assert "temperature" in err.message
    assert "did you mean top_k" in _refused(model, topk=4).message


@pytest.mark.parametrize(
    "option",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"temperature": 0},
        {"top_p": 1.5},
        {"do_sample": 1},
        {"eos_token_id": "x"},
        {"stop_strings": ""},
    ],
)
def test_an_option_that_can_not_be_is_an_error_that_says_what_can(
    option: dict[str, Any], model: Any
) -> None:
    assert (
        "; it is a" in _refused(model, **option).message
        or "True" in _refused(model, **option).message
    )


@pytest.mark.parametrize("steps", [slice(0, 6), slice(-2, None), 5, [0, 9], slice(0, 4, 0)])
def test_a_step_beyond_the_last_is_an_error_at_its_line(steps: Any, model: Any) -> None:
    with pytest.raises(Error) as caught, model.generate(IDS, max_new_tokens=5) as tracer:
        tracer.iter[steps]
    assert "max_new_tokens=5" in caught.value.message
    assert caught.value.location is not None
    assert caught.value.location.source == "tracer.iter[steps]"


def test_a_block_that_goes_on_beyond_the_last_step_is_an_error_at_its_line(model: Any) -> None:
    with pytest.raises(Error) as caught, model.generate(IDS, max_new_tokens=5) as tracer:
        with tracer.all():
            model.lm_head.next().output.save()
    assert "tracer.iter[:4]" in caught.value.message
    assert caught.value.location is not None
    assert caught.value.location.source == "with tracer.all():"
    with model.generate(IDS, max_new_tokens=5, eos_token_id=None) as tracer:
        with tracer.iter[:4]:
            following = model.lm_head.next().output[0, -1].argmax().save()
        ids = tracer.result.save()
    assert int(following) == int(ids[0, -1])


def test_shapes_are_checked_as_each_step_has_them(model: Any) -> None:
    with pytest.raises(Error) as caught, model.generate(IDS, max_new_tokens=5) as tracer:
        for _ in tracer.iter[:]:
            model.model.layers[1].output[0][:, 3] = 0
    assert "[1, 1, 64]" in caught.value.message
    assert caught.value.location is not None
    assert "[:, 3] = 0" in caught.value.location.source


def test_a_value_of_a_later_step_can_not_be_written_at_an_earlier_one(model: Any) -> None:
    with pytest.raises(Error) as caught, model.generate(IDS, max_new_tokens=5) as tracer:
        for _ in tracer.iter[2]:
            later = model.model.layers[0].output[0][:, -1]
        model.model.layers[1].output[0][:, -1] = later
    assert caught.value.reason is Reason.CYCLIC_TRACE
    with pytest.raises(Error) as caught, model.generate(IDS, max_new_tokens=5) as tracer:
        model.model.layers[1].output[0][:, -1] = tracer.num_steps * torch.ones(64)
    assert caught.value.reason is Reason.CYCLIC_TRACE


def test_there_are_no_gradients_and_no_caches_while_generating(model: Any) -> None:
    with pytest.raises(Error) as caught, model.generate(IDS, max_new_tokens=5) as tracer:
        tracer.cache()
    assert caught.value.reason is Reason.UNSUPPORTED_FEATURE
    with pytest.raises(Error) as caught, model.generate(IDS, max_new_tokens=5):
        hidden = model.model.layers[0].output[0]
        model.lm_head.output.sum().backward()
        hidden.grad.save()
    assert caught.value.reason is Reason.UNSUPPORTED_FEATURE


def _recorded(model: Any, ids: list[int], seed: int, num_tokens: int, strength: float) -> Any:
    with model.session(run=False) as session:
        with model.generate(
            ids, max_new_tokens=num_tokens, eos_token_id=None, do_sample=seed > 1, seed=seed
        ) as tracer:
            for _ in tracer.iter[:]:
                model.model.layers[1].output[0][:, -1] *= strength
            tracer.result.save()
    return session._recorder.session


def _run_of(model: Any, session: Any) -> SegmentRun:
    segment = Segment(
        steps=session.steps,
        locations=session.locations,
        first_trace_number=1,
        seed=session.seed,
        tensors=session.tensors,
    )
    tensors = list(session_tensors(session, {}))
    return SegmentRun({model.name: model._local._model}, segment, values={}, tensors=tensors)


def _told(pool: SegmentPool) -> dict[str, Any]:
    told: dict[str, Any] = {}
    while len(pool):
        for key, event in pool.round():
            assert not isinstance(event, Error)
            if isinstance(event, Saved):
                told[key] = event.value
    return told


def _alone(model: Any, session: Any) -> torch.Tensor:
    """Gives what a session saves that runs by itself."""
    pool = SegmentPool()
    pool.add("alone", _run_of(model, session))
    ids: torch.Tensor = _told(pool)["alone"]
    return ids


def test_generations_of_several_users_share_passes_and_get_what_they_get_alone(model: Any) -> None:
    sessions = {
        f"user {number}": _recorded(model, [number + 3, *IDS[1:]], number + 1, 4 + number, 1.1)
        for number in range(4)
    }
    alone = {key: _alone(model, session) for key, session in sessions.items()}
    pool = SegmentPool()
    shared: list[int] = []
    pool.on_pass = lambda report: shared.append(report.num_segments)
    for key, session in sessions.items():
        pool.add(key, _run_of(model, session), user=key)
    together = _told(pool)
    assert shared == [4, 4, 4, 4, 3, 2, 1]
    assert together.keys() == sessions.keys()
    for key, ids in alone.items():
        assert torch.equal(together[key], ids)
    assert model._local._model.pass_memory._num_held == 0


@pytest.mark.parametrize(
    ("num_ahead", "lengths", "passes"),
    [
        # Three steps, then as many of the other, which comes after the second; three together.
        (2, (6, 6), [1] * 6 + [2] * 3),
        # The other ends before.
        (1, (6, 4), [1] * 4 + [2] * 2 + [1] * 2),
        # What they would have in common is not worth the wait.
        (2, (6, 4), [1] * 10),
        (4, (6, 6), [1] * 12),
    ],
)
def test_a_generation_catches_up_with_one_that_has_begun_before(
    model: Any, num_ahead: int, lengths: tuple[int, int], passes: list[int]
) -> None:
    sessions = [
        _recorded(model, [at, *IDS[1:]], at, length, 1.2)
        for at, length in zip((3, 4), lengths, strict=True)
    ]
    alone = [_alone(model, session) for session in sessions]
    pool = SegmentPool()
    shared: list[int] = []
    pool.on_pass = lambda report: shared.append(report.num_segments)
    pool.add("first", _run_of(model, sessions[0]), user="ann")
    for _ in range(num_ahead):
        list(pool.round())
    pool.add("second", _run_of(model, sessions[1]), user="ben")
    together = _told(pool)
    assert shared == passes
    assert torch.equal(together["first"], alone[0])
    assert torch.equal(together["second"], alone[1])
    assert model._local._model.pass_memory._num_held == 0


def test_of_two_that_have_met_either_may_be_dropped_held_and_end(model: Any) -> None:
    sessions = [_recorded(model, [at, *IDS[1:]], at, 8, 1.2) for at in (3, 4)]
    expected = _alone(model, sessions[1])
    pool = SegmentPool()
    pool.add("goes", _run_of(model, sessions[0]), user="ann")
    list(pool.round())
    pool.add("stays", _run_of(model, sessions[1]), user="ben")
    list(pool.round())
    pool.pause("goes")
    list(pool.round())
    pool.drop("goes")
    assert torch.equal(_told(pool)["stays"], expected)
    assert model._local._model.pass_memory._num_held == 0


def test_a_generation_that_is_dropped_leaves_those_that_it_shares_passes_with(model: Any) -> None:
    sessions = [_recorded(model, [at, *IDS[1:]], at, 6, 1.2) for at in (3, 4)]
    expected = _alone(model, sessions[0])
    pool = SegmentPool()
    pool.add("stays", _run_of(model, sessions[0]))
    pool.add("goes", _run_of(model, sessions[1]))
    for _ in range(3):
        list(pool.round())
    pool.drop("goes")
    assert torch.equal(_told(pool)["stays"], expected)
    assert model._local._model.pass_memory._num_held == 0


def test_a_generation_that_fails_leaves_those_that_it_shares_passes_with(
    model: Any, module: Any
) -> None:
    with pytest.raises(Error) as caught, model.session() as session:
        with model.generate(IDS, max_new_tokens=STEPS, eos_token_id=None) as tracer:
            ids = tracer.result.save()
        with model.generate(OTHERS, max_new_tokens=STEPS, eos_token_id=None) as tracer:
            for _ in tracer.iter[3]:
                hidden = model.model.layers[1].output[0]
                number = hidden.sum().long() % 1 + 100_000
                model.model.layers[1].output[0][:] = model.model.embed_tokens(number)
            tracer.result.save()
        plan = session.explain()
    assert len(plan.passes) == 1
    assert caught.value.trace_number == 2
    assert torch.equal(ids, _plain(module, [IDS], max_new_tokens=STEPS, eos_token_id=None))


def test_explain_says_which_generations_share_passes_and_why_others_do_not(model: Any) -> None:
    with model.session(run=False) as session:
        for ids in (IDS, OTHERS, IDS[:5]):
            with model.generate(ids, max_new_tokens=5):
                model.generator.output.save()
        with model.generate(IDS, max_new_tokens=5) as tracer:
            for _ in tracer.iter[:]:
                model.model.layers[1].self_attn.heads.pattern.save()
    plans = session.explain().passes
    assert [plan.traces for plan in plans] == [(1, 2), (3,), (4,)]
    assert "a pass for each of up to 5 tokens" in plans[0].note
    assert "its prompt has 5 tokens, and that of trace 1 7; with padding=True" in plans[1].note
    assert "looks into attention" in plans[2].note
    # Two rows of 7 tokens and 5 more, keys and values of 3 layers of 2 heads of 16 float32.
    assert plans[0].num_bytes > 2 * 12 * 2 * 3 * 2 * 16 * 4


def test_caches_count_in_the_memory_of_passes(model: Any) -> None:
    loaded = model._local._model
    assert loaded.state_bytes == 2 * 3 * 2 * 16 * 4
    limits = Limits(max_bytes=40 * loaded.state_bytes + 200_000)
    pool = SegmentPool(limits)
    shared: list[int] = []
    pool.on_pass = lambda report: shared.append(report.num_segments)
    for at in range(8):
        session = _recorded(model, [at, *IDS[1:]], at + 1, 200, 1.0)
        pool.add(str(at), _run_of(model, session))
    list(pool.round())
    assert 1 <= shared[0] < 8
    for key in pool.keys:
        pool.drop(key)


def test_where_a_pass_of_several_fails_each_starts_over_by_itself(
    model: Any, module: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: Any, args: Any, output: Any) -> None:
        if len(output) > 1 and output.shape[1] == 1:
            raise RuntimeError("one row at a time")

    hook = model._local._model.modules["model.layers.2.mlp"].register_forward_hook(refuse)
    streamer = Remembering()
    try:
        with model.session():
            with model.generate(
                IDS, max_new_tokens=6, eos_token_id=None, streamer=streamer
            ) as tracer:
                norms = insitu.list().save()
                for _ in tracer.iter[:]:
                    norms.append(model.model.layers[1].output[0].norm())
                one = tracer.result.save()
            with model.generate(OTHERS, max_new_tokens=8, eos_token_id=None) as tracer:
                other = tracer.result.save()
    finally:
        hook.remove()
    assert "a step of 2 traces failed" in caplog.text
    assert torch.equal(one, _plain(module, [IDS], max_new_tokens=6, eos_token_id=None))
    assert torch.equal(other, _plain(module, [OTHERS], max_new_tokens=8, eos_token_id=None))
    assert len(norms) == 6
    assert streamer.told == [[IDS], *([at] for at in one[0, len(IDS) :].tolist()), "end"]
