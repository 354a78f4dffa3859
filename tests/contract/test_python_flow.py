"""Plain `if` and `for` over values that are known only when the session runs."""

from __future__ import annotations

import pytest
import torch

import insitu
from insitu import Error, LanguageModel, ValueNotAvailableError
from support.tiny_models import TinyModels

IDS = [5, 9, 17, 23]


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> LanguageModel:
    return LanguageModel(str(tiny.folder("llama")))


@pytest.mark.parametrize(("threshold", "expected"), [(-1e9, 1), (1e9, 2)])
def test_an_if_between_traces_is_a_branch(
    model: LanguageModel, threshold: float, expected: int
) -> None:
    with model.session():
        with model.trace(IDS):
            score = model.lm_head.output[0, -1].max()
        if score > threshold:
            with model.trace(IDS):
                hidden = model.model.layers[1].output[0]
            factor = 1
        else:
            with model.trace(IDS):
                hidden = model.model.layers[2].output[0]
            factor = 2
        result = (hidden * factor).save()
        number = (factor + torch.zeros(())).save()
    with model.trace(IDS):
        wanted = (model.model.layers[expected].output[0] * expected).save()
    assert torch.equal(result, wanted)
    assert int(number) == expected


@pytest.mark.parametrize(("low", "high", "expected"), [(5, 6, 0), (-9e9, 9e9, 1), (-9e9, -8e9, 2)])
def test_elif_nested_ifs_and_not(
    model: LanguageModel, low: float, high: float, expected: int
) -> None:
    with model.session():
        with model.trace(IDS):
            score = model.lm_head.output[0, -1].max() * 0
        chosen = torch.tensor(-1)
        if score < low:
            chosen = torch.tensor(0)
        elif not score > high:
            if score < high:
                chosen = torch.tensor(1)
        else:
            chosen = torch.tensor(2)
        chosen.save()
    assert int(chosen) == expected


def test_an_if_in_a_trace_is_a_condition(model: LanguageModel) -> None:
    def run(threshold: float) -> torch.Tensor:
        with model.trace(IDS):
            hidden = model.model.layers[0].output[0]
            if hidden.max() > threshold:
                model.model.layers[1].output[:] = 0
            logits = model.lm_head.output.save()
        return logits  # noqa: RET504 - it is there only after the block

    with model.trace(IDS):
        model.model.layers[1].output[:] = 0
        zeroed = model.lm_head.output.save()
    with model.trace(IDS):
        clean = model.lm_head.output.save()
    assert torch.equal(run(-1e9), zeroed)
    assert torch.equal(run(1e9), clean)


def test_a_for_runs_once_an_item_and_carries_what_it_assigns(model: LanguageModel) -> None:
    with model.session():
        with model.trace(IDS):
            best = model.lm_head.output[0, -1].topk(3).indices
        chosen = insitu.list().save()
        kept = insitu.list(best)
        total = torch.zeros(())
        for token in kept:
            total = total + token
            if token > 100:
                chosen.append(token)
        total.save()
        best.save()
    assert int(total) == int(best.sum())
    assert [int(token) for token in chosen] == [int(token) for token in best if token > 100]


def test_a_for_takes_pairs_apart(model: LanguageModel) -> None:
    with model.session():
        pairs = insitu.list()
        for number in range(3):
            pairs.append((torch.tensor(number), torch.tensor(number * 10)))
        sums = insitu.list().save()
        for one, ten in pairs:
            sums.append(one + ten)
    assert [int(number) for number in sums] == [0, 11, 22]


def test_loops_of_known_length_are_plain_python(model: LanguageModel) -> None:
    with model.trace(IDS):
        lengths = [row.norm().save() for row in model.model.layers[0].output[0][0]]
    assert len(lengths) == 4


@pytest.mark.parametrize("statement", ["break", "continue", "return"])
def test_what_leaves_a_loop_can_not_hang_on_a_value(
    model: LanguageModel, statement: str, tmp_path: object
) -> None:
    source = f"""
def run(model, ids):
    with model.session():
        with model.trace(ids):
            score = model.lm_head.output.max()
        for number in range(2):
            if score > 0:
                {statement}
"""
    path = f"{tmp_path}/{statement}.py"
    with open(path, "w") as file:
        file.write(source)
    namespace: dict[str, object] = {}
    exec(compile(source, path, "exec"), namespace)
    with pytest.raises(Error, match=rf"`{statement}` in line 8.*loop.exit"):
        namespace["run"](model, IDS)  # type: ignore[operator]


def test_truth_elsewhere_names_the_cure(model: LanguageModel) -> None:
    with pytest.raises(ValueNotAvailableError, match=r"session.cond"):
        with model.trace(IDS):
            _ = 1 if model.lm_head.output.max() > 0 else 2
    with pytest.raises(ValueNotAvailableError, match=r"session.cond"):
        with model.trace(IDS):
            score = model.lm_head.output.max()
            if score > 0 and score < 1:
                pass
    with pytest.raises(ValueNotAvailableError, match=r"session.iter"):
        with model.session():
            _ = [item for item in insitu.list([1, 2])]  # noqa: C416


def test_source_that_can_not_be_read_names_the_cure(model: LanguageModel) -> None:
    source = """
with model.session():
    with model.trace(IDS):
        score = model.lm_head.output.max()
    if score > 0:
        pass
"""
    with pytest.raises(ValueNotAvailableError, match=r"session.cond"):
        exec(source, {"model": model, "IDS": IDS})


def test_nothing_is_traced_when_the_statement_is_over(model: LanguageModel) -> None:
    import sys

    before = sys.gettrace()
    with model.session():
        with model.trace(IDS):
            score = model.lm_head.output.max()
        if score > 0:
            score = score * 2
        assert sys.gettrace() is before
        score.save()
    assert sys.gettrace() is before


@pytest.mark.parametrize(("threshold", "factor"), [(-1e9, 3), (1e9, 4)])
def test_what_either_branch_saves_comes_back_under_its_name(
    model: LanguageModel, threshold: float, factor: int
) -> None:
    with model.session():
        with model.trace(IDS):
            score = model.lm_head.output.max().save()
        if score > threshold:  # noqa: SIM108 - this is the statement that is tested
            result = (score * 3).save()
        else:
            result = (score * 4).save()
    assert torch.equal(result, score * factor)


def test_a_body_that_raises_leaves_nothing_behind(model: LanguageModel) -> None:
    import sys

    with pytest.raises(RuntimeError, match="mine"):
        with model.session():
            with model.trace(IDS):
                score = model.lm_head.output.max()
            if score > 0:
                raise RuntimeError("mine")
    assert sys.gettrace() is None or "coverage" in repr(sys.gettrace())
    with model.trace(IDS):
        logits = model.lm_head.output.save()
    assert logits.shape == (1, 4, 256)
