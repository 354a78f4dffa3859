"""Loops, branches, variables and collections that live where the session runs."""

from __future__ import annotations

import pytest
import torch

import insitu
from insitu import Error, InvalidTraceError, LanguageModel, ValueNotAvailableError
from support.tiny_models import TinyModels

IDS = [5, 9, 17, 23]


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> LanguageModel:
    return LanguageModel(str(tiny.folder("llama")))


def test_a_loop_runs_its_traces_once_an_item(model: LanguageModel) -> None:
    with model.session() as session:
        logits = insitu.list().save()
        with session.iter([0.0, 0.5, 2.0]) as scale:
            with model.trace(IDS):
                model.model.layers[1].output[:] *= scale
                logits.append(model.lm_head.output[:, -1])
    assert type(logits[0]) is torch.Tensor
    assert len(logits) == 3
    for scale, actual in zip([0.0, 0.5, 2.0], logits, strict=True):
        with model.trace(IDS):
            model.model.layers[1].output[:] *= scale
            expected = model.lm_head.output[:, -1].save()
        assert torch.equal(actual, expected)


def test_loops_nest_and_run_over_ranges_tensors_and_lists_of_the_session(
    model: LanguageModel,
) -> None:
    with model.session() as session:
        with model.trace(IDS):
            best = model.lm_head.output[0, -1].topk(3).indices
        pairs = insitu.list().save()
        with session.iter(best) as token, session.iter(range(2)) as number:
            pairs.append((token, number))
        copied = insitu.list().save()
        with session.iter(pairs) as pair:
            copied.append(pair)
        best.save()
    assert [(int(a), int(b)) for a, b in pairs] == [(int(t), n) for t in best for n in range(2)]
    assert copied == pairs


def test_exit_leaves_a_loop_and_only_it(model: LanguageModel) -> None:
    with model.session() as session:
        seen = insitu.list().save()
        with session.iter(range(10), return_context=True) as (item, loop):
            seen.append(item)
            with loop.cond(item >= 2):
                loop.exit()
        seen.append(torch.tensor(-1))
    assert [int(item) for item in seen] == [0, 1, 2, -1]


def test_exit_of_the_session_hides_what_comes_after_and_keeps_what_was_collected(
    model: LanguageModel,
) -> None:
    with model.session() as session:
        seen = insitu.list().save()
        with session.iter(range(10)) as item:
            with session.cond(item == 3):
                session.exit()
            seen.append(item)
        seen.append(torch.tensor(-1))
    assert [int(item) for item in seen] == [0, 1, 2]


def test_one_of_two_branches_runs(model: LanguageModel) -> None:
    for threshold, expected in ((-1e9, 1), (1e9, 2)):
        with model.session() as session:
            with model.trace(IDS):
                score = model.lm_head.output[0, -1].max()
            chosen = insitu.variable(torch.tensor(0)).save()
            result = insitu.list().save()
            with session.cond(score > threshold) as branch:
                chosen.update(torch.tensor(1))
                with model.trace(IDS):
                    result.append(model.lm_head.output.argmax(-1))
            with branch.else_():
                chosen.update(torch.tensor(2))
            final = (chosen + 0).save()
        assert int(final) == expected
        assert len(result) == (1 if expected == 1 else 0)


def test_a_value_of_a_branch_that_did_not_run_is_not_there_and_says_so(
    model: LanguageModel,
) -> None:
    with model.session() as session:
        with model.trace(IDS):
            score = model.lm_head.output[0, -1].max()
        with session.cond(score > 1e9):
            twice = score * 2
        more = (twice + 1).save()
        score.save()
    assert score.ndim == 0
    with pytest.raises(ValueNotAvailableError, match="did not run"):
        more.item()


def test_a_branch_in_a_trace_writes_only_if_it_holds(model: LanguageModel) -> None:
    def run(threshold: float) -> torch.Tensor:
        with model.trace(IDS) as tracer:
            hidden = model.model.layers[0].output[0]
            with tracer.cond(hidden.max() > threshold) as branch:
                model.model.layers[1].output[:] = 0
            with branch.else_():
                model.model.layers[1].output[:] += 1
            logits = model.lm_head.output.save()
        return logits  # noqa: RET504 - it is there only after the block

    with model.trace(IDS):
        model.model.layers[1].output[:] = 0
        zeroed = model.lm_head.output.save()
    with model.trace(IDS):
        model.model.layers[1].output[:] += 1
        raised = model.lm_head.output.save()
    assert torch.equal(run(-1e9), zeroed)
    assert torch.equal(run(1e9), raised)


def test_a_condition_that_is_known_too_late_is_refused_while_recording(
    model: LanguageModel,
) -> None:
    with pytest.raises(InvalidTraceError, match="only later"):
        with model.trace(IDS) as tracer:
            with tracer.cond(model.lm_head.output.max() > 0):
                model.model.layers[0].output[:] = 0


def test_a_condition_of_many_elements_is_refused(model: LanguageModel) -> None:
    with pytest.raises(InvalidTraceError, match=r"reduce it with .any\(\)"):
        with model.trace(IDS) as tracer, tracer.cond(model.lm_head.output > 0):
            pass


def test_a_variable_carries_state_over_items(model: LanguageModel) -> None:
    with model.session() as session:
        total = insitu.variable(torch.zeros(64))
        with session.iter([[5, 9], [17, 23]]) as pair:
            with model.trace(IDS):
                total.update(total + model.model.layers[1].output[0, -1] * len(IDS))
                del pair
        total.save()
    with model.trace(IDS):
        expected = (model.model.layers[1].output[0, -1] * 8).save()
    torch.testing.assert_close(total, expected)


def test_a_reader_before_an_update_sees_the_old_value(model: LanguageModel) -> None:
    with model.trace(IDS):
        kept = insitu.variable(torch.zeros(64))
        # Waits for a later layer than the update below.
        old = (kept + 0 * model.model.layers[2].output[0, -1]).save()
        kept.update(model.model.layers[0].output[0, -1])
        new = (kept + 0).save()
    assert old.abs().sum() == 0
    assert new.abs().sum() > 0


def test_dicts_and_nested_collections_come_back_whole(model: LanguageModel) -> None:
    with model.session() as session:
        by_layer = insitu.dict().save()
        for index, layer in enumerate(model.model.layers):
            with model.trace(IDS):
                by_layer[f"layer {index}"] = {"last": layer.output[0, -1], "index": index}
        with session.iter(range(2)) as number:
            by_layer[number] = number * 10
    assert by_layer["layer 1"]["last"].shape == (64,)
    assert by_layer["layer 2"]["index"] == 2
    assert [int(by_layer[key]) for key in (0, 1)] == [0, 10]


def test_a_collection_keeps_what_was_put_into_it(model: LanguageModel) -> None:
    with model.trace(IDS):
        kept = insitu.list().save()
        hidden = model.model.layers[0].output[0]
        kept.append(hidden)
        hidden[:] = 0
        kept.append(hidden)
    assert kept[0].abs().sum() > 0
    assert kept[1].abs().sum() == 0


def test_lists_of_the_session_are_what_torch_takes(model: LanguageModel) -> None:
    with model.session() as session:
        parts = insitu.list()
        with session.iter(range(3)) as number:
            parts.append(torch.full((2,), 1.0) * number)
        stacked = torch.stack(parts).save()
    assert stacked.tolist() == [[0, 0], [1, 1], [2, 2]]


def test_what_stands_between_traces_runs_in_order(model: LanguageModel) -> None:
    with model.session() as session:
        with model.trace(IDS):
            one = model.model.layers[1].output[0]
        with model.trace([1, 2, 3, 4]):
            two = model.model.layers[1].output[0]
        direction = (one - two).mean(1).save()
        session.log("norm", direction.norm())
        lens = model.lm_head(model.model.norm(direction)).save()
        with model.trace(IDS):
            model.model.layers[1].output[:, -1] += direction
            model.lm_head.output.save()
    assert lens.shape == (1, 256)
    assert direction.shape == (1, 64)


def test_tokens_that_a_trace_computes_are_the_next_ones_prompt(model: LanguageModel) -> None:
    with model.session():
        with model.trace(IDS):
            tokens = model.lm_head.output.argmax(-1)
        with model.trace(tokens):
            again = model.lm_head.output.save()
        tokens.save()
    with model.trace(tokens.tolist()):
        expected = model.lm_head.output.save()
    assert torch.equal(again, expected)


def test_a_prompt_that_is_no_tokens_fails_at_its_line(model: LanguageModel) -> None:
    with pytest.raises(Error, match="token ids from 0 to 255"):
        with model.session():
            with model.trace(IDS):
                hidden = model.model.layers[0].output[0]
            with model.trace(hidden):
                model.lm_head.output.save()


def test_a_loop_in_a_trace_is_refused(model: LanguageModel) -> None:
    with pytest.raises(Error, match="runs whole traces"):
        with model.session() as session, model.trace(IDS), session.iter([1]):
            pass


def test_a_failing_item_names_the_line_and_keeps_what_was_saved(model: LanguageModel) -> None:
    with pytest.raises(Error) as raised:
        with model.session() as session:
            with model.trace(IDS):
                first = model.lm_head.output.save()
            with session.iter([1, 7]) as position:
                with model.trace(IDS):
                    row = model.model.layers[0].output[0].index_select(1, position.reshape(1))
                    row.save()
    assert first.shape == (1, 4, 256)
    assert raised.value.location is not None
    assert "index_select" in raised.value.location.source
    assert raised.value.trace_number == 2
