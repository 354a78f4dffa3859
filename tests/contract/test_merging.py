"""Traces that share rows of a pass never notice each other: one hazard after the other."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

import insitu
from insitu import LanguageModel
from support.same_merged import check_same, is_there

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.same_merged import Told
    from support.tiny_models import TinyModels

# Matrices of fewer than 12 rows go another way in the CPU's libraries, and differ in the last bits.
IDS = list(range(3, 17))
OTHERS = list(range(40, 54))

Record = Any


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> LanguageModel:
    return LanguageModel(str(tiny.folder("llama")))


@pytest.fixture
def check(model: LanguageModel, caplog: pytest.LogCaptureFixture) -> Callable[..., Told]:
    return partial(check_same, model, caplog=caplog)


def _layer(model: Any, number: int) -> Any:
    return model.model.layers[number]


def test_a_stopped_trace_does_not_make_the_write_of_those_who_share_its_rows(
    model: Any, check: Callable[[Record], Told]
) -> None:
    def record(_: Any, saved: dict[str, Any]) -> None:
        for path in ("earlier", "there"):
            with model.trace(IDS) as tracer:
                layer = _layer(model, 0 if path == "earlier" else 1)
                saved[path] = layer.output[0].save()
                tracer.stop()
                _layer(model, 1).output[0][:] += 1
        with model.trace(IDS):
            _layer(model, 1).output[0][:] += 1
            saved["logits"] = model.lm_head.output.save()

    told = check(record)
    with model.trace(IDS):
        clean = model.lm_head.output.save()
    assert not torch.equal(told.values["logits"], clean)


def test_what_one_gives_and_the_next_takes_are_two_values_for_all_who_share_rows(
    model: Any, check: Callable[[Record], Told]
) -> None:
    def record(_: Any, saved: dict[str, Any]) -> None:
        for number in range(3):
            with model.trace(IDS):
                layer = _layer(model, 1)
                saved[f"hidden {number}"] = _layer(model, 0).output[0].save()
                layer.input[:] = 0
                saved[f"normed {number}"] = layer.input_layernorm.output.save()
                layer.self_attn.q_proj.input[:, 3:] = 1
                saved[f"key {number}"] = layer.self_attn.k_proj.input.save()
                saved[f"logits {number}"] = model.lm_head.output[:, -1].save()

    told = check(record)
    for number in range(3):
        assert told.values[f"hidden {number}"].abs().sum() > 0


@pytest.mark.parametrize("prompts", [(IDS, IDS), (IDS, IDS, OTHERS), (IDS, OTHERS)])
def test_values_of_one_trace_are_written_to_later_and_those_of_others_stay(
    model: Any, check: Callable[[Record], Told], prompts: tuple[list[int], ...]
) -> None:
    def record(_: Any, saved: dict[str, Any]) -> None:
        hidden, last = [], []
        for ids in prompts:
            with model.trace(ids):
                hidden.append(_layer(model, 1).output[0])
                last.append(hidden[-1][:, -1])
        hidden[0][:, 2] = 0
        with model.trace(IDS):
            last[-1][:] = 5  # is seen in hidden[-1], and there alone
            saved["logits"] = model.lm_head.output[:, -1].save()
        for number, value in enumerate(hidden):
            saved[f"hidden {number}"] = value.clone().save()

    told = check(record)
    assert told.values["hidden 0"][:, 2].abs().sum() == 0
    assert told.values["hidden 1"][:, 2].abs().sum() > 0
    assert (told.values[f"hidden {len(prompts) - 1}"][:, -1] == 5).all()
    assert not (told.values["hidden 0"][:, -1] == 5).all()


def test_saved_values_of_traces_that_share_rows_share_no_memory(
    model: Any, check: Callable[[Record], Told]
) -> None:
    def record(_: Any, saved: dict[str, Any]) -> None:
        for name in ("one", "other"):
            with model.trace(IDS):
                saved[name] = _layer(model, 1).output[0].save()

    told = check(record)
    told.values["one"].zero_()
    assert told.values["other"].abs().sum() > 0


def test_writes_into_other_positions_of_the_logits_are_not_the_same_write(
    model: Any, check: Callable[[Record], Told]
) -> None:
    def record(_: Any, saved: dict[str, Any]) -> None:
        for position in (-1, 3, 0, 3):
            with model.trace(IDS):
                part = model.lm_head.output[:, position]
                part += 1
                saved[f"part {position}"] = part.save()
        with model.trace(IDS):
            part = model.lm_head.output[:, 0]
            part += 1
            saved["whole"] = model.lm_head.output.argmax(-1).save()
            saved["first"] = part.save()

    check(record)


def test_invokes_cut_equal_rows_in_other_ways(model: Any, check: Callable[[Record], Told]) -> None:
    def record(_: Any, saved: dict[str, Any]) -> None:
        for number, (one, other) in enumerate([([IDS], [OTHERS, IDS]), ([IDS, OTHERS], [IDS])]):
            with model.trace() as tracer:
                with tracer.invoke(one):
                    _layer(model, 1).output[0][:] *= 0.5
                with tracer.invoke(other):
                    saved[f"other {number}"] = model.lm_head.output[:, -1].save()
                with tracer.invoke():
                    saved[f"all {number}"] = model.lm_head.output[:, -1].save()

    check(record)


def test_arguments_of_padded_rows_are_read(model: Any, check: Callable[[Record], Told]) -> None:
    def record(_: Any, saved: dict[str, Any]) -> None:
        for scale in (1, 2):
            with model.trace([IDS, OTHERS[:12]]):
                args, kwargs = _layer(model, 2).inputs
                saved[f"taken {scale}"] = args[0].save()
                saved[f"mask {scale}"] = kwargs["attention_mask"].save()
                _layer(model, 1).output[0][:] *= scale
                saved[f"logits {scale}"] = model.lm_head.output[:, -1].save()

    check(record)


def test_arguments_that_all_rows_share_are_read_where_rows_fork(
    model: Any, check: Callable[[Record], Told]
) -> None:
    def record(_: Any, saved: dict[str, Any]) -> None:
        for scale in (1, 2, 3):
            with model.trace(IDS):
                _layer(model, 0).output[0][:] *= scale
                _, kwargs = _layer(model, 2).self_attn.inputs
                cosine, sine = kwargs["position_embeddings"]
                saved[f"turns {scale}"] = [cosine.save(), sine.save()]

    check(record)


def test_a_trace_that_writes_into_an_earlier_value_on_its_way_does_so_once(
    model: Any, check: Callable[[Record], Told]
) -> None:
    def record(_: Any, saved: dict[str, Any]) -> None:
        total = torch.zeros(1, len(IDS), 64) + insitu.variable(torch.zeros(()))
        for _number in range(3):
            with model.trace(IDS):
                total += _layer(model, 0).output[0]
                _layer(model, 1).output[0][:] += total
                saved[f"logits {_number}"] = model.lm_head.output[:, -1].save()
        saved["total"] = total.save()

    check(record)


def test_a_failing_trace_is_told_in_its_turn_and_the_pass_goes_on_without_its_rows(
    model: Any, check: Callable[[Record], Told]
) -> None:
    def record(_: Any, saved: dict[str, Any]) -> None:
        for number in range(3):
            with model.trace(IDS) as tracer:
                hidden = _layer(model, 0).output[0]
                tracer.log("sum", hidden.sum())
                index = hidden[0, 0].argmax() + (1000 if number == 1 else 0)
                saved[f"{number}"] = hidden.flatten()[index].save()

    told = check(record)
    assert told.error
    assert len(told.logs) == 2
    assert is_there(told.values["0"])
    assert not is_there(told.values["2"])


def test_what_a_failing_trace_logs_of_earlier_traces_is_told(
    model: Any, check: Callable[[Record], Told]
) -> None:
    def record(_: Any, saved: dict[str, Any]) -> None:
        total = insitu.variable(torch.zeros(()))
        with model.trace(IDS):
            total.update(_layer(model, 0).output[0].sum())
        with model.trace(OTHERS) as tracer:
            tracer.log("before", total)
            hidden = _layer(model, 1).output[0]
            saved["none"] = hidden[0, hidden[0, 0].argmax() + 1000].save()
            tracer.log("after", total, _layer(model, 2).output[0].sum())

    told = check(record)
    assert [line.split()[1] for line in told.logs] == ["before"]


def test_the_first_error_of_a_trace_is_told_even_if_it_comes_to_light_late(
    model: Any, check: Callable[[Record], Told]
) -> None:
    def record(_: Any, saved: dict[str, Any]) -> None:
        total = insitu.variable(torch.zeros(3))
        with model.trace(IDS):
            total.update(_layer(model, 0).output[0, 0, :3])
        with model.trace(OTHERS) as tracer:
            saved["first"] = total[total.argmax() + 1000].save()
            hidden = _layer(model, 1).output[0]
            tracer.log("hidden", hidden.sum())
            saved["second"] = hidden[0, hidden[0, 0].argmax() + 1000].save()

    told = check(record)
    assert told.error[2] == 2
    assert not told.logs


@pytest.mark.parametrize("is_conditional", [False, True])
def test_nothing_after_a_stop_runs_though_what_is_before_it_waits(
    model: Any, check: Callable[[Record], Told], is_conditional: bool
) -> None:
    def record(_: Any, saved: dict[str, Any]) -> None:
        found = insitu.list().save()
        total = insitu.variable(torch.zeros(()))
        for ids in (IDS, OTHERS):
            with model.trace(ids) as tracer:
                hidden = _layer(model, 0).output[0]
                found.append(hidden.sum())
                total.update(total + hidden.abs().sum())
                if is_conditional:
                    with tracer.cond(total > 0):
                        tracer.stop()
                else:
                    tracer.stop()
                later = _layer(model, 1).output[0]
                saved[f"never {ids[0]}"] = later[0, later[0, 0].argmax() + 1000].save()
                found.append(later.sum())
        saved["found"] = found

    told = check(record)
    assert not told.error
    assert len(told.values["found"]) == 2


def test_what_is_put_into_lists_and_sums_is_not_lost_where_it_is_written_to_afterwards(
    model: Any, check: Callable[[Record], Told]
) -> None:
    def record(_: Any, saved: dict[str, Any]) -> None:
        found = insitu.list().save()
        by_name = insitu.dict().save()
        total = torch.zeros(1, len(IDS), 64) + insitu.variable(torch.zeros(()))
        row = total[:, 2]
        for number in range(2):
            with model.trace(IDS):
                hidden = _layer(model, number).output[0]
                found.append(hidden)
                by_name[number] = hidden
                total += hidden
                hidden[:, 2] = 0
                found.append(by_name[number])
        saved.update(found=found, by_name=by_name, row=row.save())

    told = check(record)
    assert len(told.values["found"]) == 4
    assert told.values["row"].abs().sum() > 0


def test_logits_are_read_at_a_position_and_used_whole_by_a_later_trace(
    model: Any, check: Callable[[Record], Told]
) -> None:
    def record(_: Any, saved: dict[str, Any]) -> None:
        with model.trace(IDS):
            logits = model.lm_head.output
            row = logits[0]
            saved["last"] = row[-1].save()
        with model.trace(OTHERS):
            saved["all"] = (model.lm_head.output - logits).save()
            saved["row"] = (row * 2).save()

    told = check(record)
    assert told.values["all"].shape[1] == told.values["row"].shape[0] == len(IDS)


def test_logits_that_are_indexed_one_dimension_after_the_other_are_those_of_one_position(
    model: Any, check: Callable[[Record], Told]
) -> None:
    sizes: list[int] = []

    def record(_: Any, saved: dict[str, Any]) -> None:
        for ids in (IDS, OTHERS) * 8:
            with model.trace(ids):
                logits = model.lm_head.output
                saved[f"{len(saved)}"] = logits[0][-1].save()
                saved[f"{len(saved)}"] = logits[:][0, -2:, :7].save()
                saved[f"{len(saved)}"] = logits[-1][-2, ..., 3].save()

    check(record)
    head = model._local._model.module.lm_head
    hook = head.register_forward_hook(lambda *at: sizes.append(at[2].shape[:2].numel()))
    with model.session() as session:
        record(session, {})
    hook.remove()
    # The two last positions of two rows, and as many more as the CPU's libraries want.
    assert sizes == [16]
