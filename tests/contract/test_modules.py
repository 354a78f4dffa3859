"""Any torch module is traced as a language model is: what comes back is what plain hooks give."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import insitu
from insitu import InterventionError, InvalidTraceError, LanguageModel, Model, VersionError
from support.tiny_models import TinyModels


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.act = nn.ReLU()
        self.second = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        result: torch.Tensor = self.second(self.act(self.first(x))) * scale
        return result


class ResidualConv(nn.Module):
    """Writes in place, into what its modules have returned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.act(self.norm(self.conv(x)))
        out += x
        return out


class Pair(nn.Module):
    """Takes two inputs, and gives a tuple and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.split = Halves()
        self.head = nn.Linear(4, 2)

    def forward(self, left: torch.Tensor, *, right: torch.Tensor) -> dict[str, Any]:
        low, high = self.split(left + right)
        return {"low": self.head(low), "both": (low, high)}


class Halves(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.chunk(2, -1)


class Recurrent(nn.Module):
    """Calls one module three times."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = torch.tanh(self.step(x))
        return x


class Routed(nn.Module):
    """Goes the way that its elements tell, so that shapes are not known before."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.up(x) if x.sum() > 0 else self.down(x)
        return result


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _output(net: nn.Module, path: str, *args: Any, **kwargs: Any) -> Any:
    """Gives what a submodule returns in its first call, as a plain hook sees it."""
    seen: list[Any] = []
    module = net.get_submodule(path)
    hook = module.register_forward_hook(lambda _, __, result: seen.append(result.clone()))
    with torch.no_grad():
        net(*args, **kwargs)
    hook.remove()
    return seen


def test_a_module_is_read_with_its_shapes() -> None:
    net, x = Mlp(), torch.randn(2, 4)
    model = Model(net)
    with model.trace(x, scale=2.0):
        hidden = model.first.output
        assert hidden.shape == (2, 8)
        assert model.act.input.dtype == torch.float32
        hidden.save()
        doubled = (hidden * 2).save()
        result = model.output.save()
    assert torch.equal(hidden, net.first(x))
    assert torch.equal(doubled, net.first(x) * 2)
    assert torch.equal(result, net(x, scale=2.0))
    assert repr(model) == repr(net)


def test_a_module_is_written_to_and_values_cross_traces() -> None:
    net = Mlp()
    one, other = torch.randn(2, 4), torch.randn(2, 4)
    model = Model(net)
    with model.session():
        with model.trace(one):
            kept = model.first.output[:, :4]
        with model.trace(other):
            model.first.output[:, :4] = kept
            model.second.output *= 2
            patched = model.output.save()
        with model.trace(kept.relu()):
            again = model.output.save()
    with torch.no_grad():
        hidden = net.first(other)
        hidden[:, :4] = net.first(one)[:, :4]
        assert torch.equal(patched, net.second(hidden.relu()) * 2)
        assert torch.equal(again, net(net.first(one)[:, :4].relu()))


def test_what_was_read_is_not_changed_by_what_the_module_writes_in_place() -> None:
    net, x = ResidualConv().eval(), torch.randn(2, 3, 5, 5)
    given = x.clone()
    model = Model(net)
    with model.trace(x):
        norm = model.norm.output.save()
        view = model.norm.output[:, 0]
        act = model.act.output.save()
        result = model.output.save()
        view.save()
    assert torch.equal(norm, _output(net, "norm", x)[0])
    assert torch.equal(view, norm[:, 0])
    assert torch.equal(act, _output(net, "act", x)[0])
    assert torch.equal(result, net(x))
    assert torch.equal(x, given)


def test_writes_reach_a_module_that_writes_in_place() -> None:
    net, x = ResidualConv().eval(), torch.randn(2, 3, 5, 5)
    model = Model(net)
    with model.trace(x):
        model.norm.output[:, 0] = 1.0
        model.act.output[:, 1] = 0.0
        result = model.output.save()
    with torch.no_grad():
        expected = net.norm(net.conv(x))
        expected[:, 0] = 1.0
        expected = expected.relu()
        expected[:, 1] = 0.0
    assert torch.equal(result, expected + x)


def test_finding_out_shapes_leaves_the_module_as_it_was() -> None:
    net = ResidualConv().train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    model = Model(net)
    with model.scan(torch.randn(2, 3, 5, 5)):
        assert model.conv.output.shape == (2, 3, 5, 5)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    with model.trace(torch.randn(2, 3, 5, 5)):
        model.output.save()
    assert net.norm.num_batches_tracked == 1


def test_several_inputs_tuples_and_dicts_are_taken_and_given() -> None:
    net, left, right = Pair(), torch.randn(3, 8), torch.randn(3, 8)
    model = Model(net)
    with model.trace(left, right=right):
        args, kwargs = model.inputs
        assert kwargs["right"].shape == args[0].shape == (3, 8)
        low, high = model.split.output
        assert high.shape == (3, 4)
        model.split.output = (high, low)
        output = model.output.save()
    with torch.no_grad():
        first, second = (left + right).chunk(2, -1)
        assert torch.equal(output["low"], net.head(second))
        assert torch.equal(output["both"][1], first)


def test_every_call_of_a_module_is_read_and_written() -> None:
    net, x = Recurrent(), torch.randn(2, 4)
    model = Model(net)
    with model.trace(x):
        first = model.step.output.save()
        second = model.step.calls[1].output.save()
        last = model.step.calls[2].output.save()
    for saved, expected in zip((first, second, last), _output(net, "step", x), strict=True):
        assert torch.equal(saved, expected)
    with model.trace(x):
        model.step.calls[2].output = model.step.calls[1].output
        result = model.output.save()
        model.step.calls[1].skip(torch.zeros(2, 4))
    assert torch.equal(result, torch.zeros(2, 4))
    with pytest.raises(InvalidTraceError, match=r"call 3"):
        with model.trace(x):
            model.step.calls[3].output.save()


def test_a_write_that_needs_a_later_call_is_refused_while_recording() -> None:
    model = Model(Recurrent())
    with pytest.raises(InvalidTraceError, match=r"step\.calls\[2\]\.output") as raised:
        with model.trace(torch.randn(2, 4)):
            late = model.step.calls[2].output
            model.step.calls[1].output = late
            pytest.fail("the line above is refused")
    assert raised.value.reason == "CYCLIC_TRACE"


def test_a_write_of_another_shape_is_refused_while_recording() -> None:
    model = Model(Mlp())
    with pytest.raises(InvalidTraceError, match=r"first\.output is float32\[2, 8\]"):
        with model.trace(torch.randn(2, 4)):
            model.first.output = torch.zeros(2, 4)
            pytest.fail("the line above is refused")


def test_a_module_whose_shapes_are_not_known_is_traced_all_the_same() -> None:
    net, x = Routed(), torch.ones(2, 4)
    model = Model(net)
    with model.trace(x):
        model.up.output[0] = 0
        result = (model.output + 1).save()
    with torch.no_grad():
        expected = net.up(x)
        expected[0] = 0
    assert torch.equal(result, expected + 1)
    with pytest.raises(InvalidTraceError, match="never reached"):
        with model.trace(x):
            model.down.output.save()


def test_a_module_is_applied_to_values() -> None:
    net, x = Mlp(), torch.randn(2, 4)
    model = Model(net)
    with model.trace(x):
        early = model.second(model.first.output)
        assert early.shape == (2, 3)
        early.save()
    assert torch.equal(early, net.second(net.first(x)))


def test_tensors_that_a_forward_makes_are_not_recorded() -> None:
    class Making(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.ones(x.shape[-1])

    model = Model(Making())
    with model.trace(torch.zeros(2, 3)):
        result = model.output.save()
    assert torch.equal(result, torch.ones(2, 3))


def test_caches_edits_loops_and_conditions_are_those_of_language_models() -> None:
    net, x = Mlp(), torch.randn(2, 4)
    model = Model(net, rename={"first": "entry"})
    with model.trace(x) as tracer:
        cache = tracer.cache()
        assert model.entry.output.shape == (2, 8)
    assert torch.equal(cache["second"].output, net(x))
    with model.edit() as edited:
        model.second.output[:] = 0
    with edited.trace(x):
        zeroed = model.output.save()
    assert torch.equal(zeroed, torch.zeros(2, 3))
    with model.session() as session:
        sums = insitu.list().save()
        with session.iter([0.0, 1.0]) as scale:
            with model.trace(x):
                model.second.output *= scale
                sums.append(model.output.sum())
    assert sums[0] == 0
    assert sums[1] == net(x).sum()


def test_one_session_runs_modules_and_language_models(tiny: TinyModels) -> None:
    language = LanguageModel(str(tiny.folder("llama")))
    probe = nn.Linear(64, 2)
    model = Model(probe)
    with model.session():
        with language.trace([5, 9, 17]):
            hidden = language.model.layers[1].output[0].save()
        with model.trace(hidden):
            assert model.output.shape == (1, 3, 2)
            scores = model.output.save()
    assert torch.equal(scores, probe(hidden))


def test_a_module_runs_in_its_own_process_only() -> None:
    model = Model(Mlp())
    with pytest.raises(VersionError, match="LanguageModel that the server has"):
        model.trace(torch.zeros(1, 4), remote=True)
    with pytest.raises(VersionError, match="no server has it"):
        model.session(remote=True)


def test_a_trace_of_a_module_has_one_input() -> None:
    model = Model(Mlp())
    x = torch.randn(2, 4)
    with model.trace() as tracer:
        with tracer.invoke(x):
            result = model.output.save()
    assert torch.equal(result, model._module(x))
    with pytest.raises(VersionError, match="one batch"):
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.output.save()
            with tracer.invoke(x):
                pass
    with pytest.raises(InvalidTraceError, match="Mlp can not be part of a session"):
        with model.trace(Mlp()):
            pass


def test_what_a_forward_raises_is_an_error_of_the_trace(caplog: pytest.LogCaptureFixture) -> None:
    class Strict(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[-1] != 4:
                raise ValueError("four, please")
            return functional.relu(x)

    model = Model(Strict())
    with caplog.at_level(logging.INFO), pytest.raises(InterventionError, match="four, please"):
        with model.trace(torch.zeros(1, 5)):
            model.output.save()
    assert "no known shapes: four, please" in caplog.text
