"""Shard groups of several ranks give what one process gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import insitu
from insitu import CONFIG, Error, InvalidTraceError, LanguageModel
from support.tiny_models import TinyModels
from support.up import Up, ranks
from support.up import insitu as run_insitu

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
IDS = [5, 9, 17, 23, 42]


def _model(up: Up, name: str, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
    monkeypatch.setattr(CONFIG, "_api_key", "tests")
    return LanguageModel(name)


def _all_sorts(model: LanguageModel, *, remote: bool) -> dict[str, torch.Tensor]:
    """Patches, draws tokens, looks into heads, takes gradients and trains, all in one session."""
    found = {}
    block = model.blocks[10]
    with model.session(remote=remote) as session:
        with model.trace("The Eiffel Tower is in the city of"):
            hs_29 = model.model.layers[29].output[0][:, -1, :]
            found["tokens"] = model.lm_head.output.argmax(dim=-1).save()
            z, hidden = block.attn.heads.z, block.output[0]
            found["pattern"] = block.attn.heads.pattern.save()
            model.lm_head.output[0, -1].log_softmax(-1)[7042].backward()
            found["by z"], found["by hidden"] = z.grad.save(), hidden.grad.save()
        with model.trace("Buckingham Palace is in the city of"):
            model.model.layers[1].output[0][:, -1, :] = hs_29[:]
            found["patched tokens"] = model.lm_head.output.argmax(dim=-1).save()
        vector = session.parameter(torch.zeros(model.config.hidden_size))
        optimizer = insitu.optim.SGD([vector], lr=1.0, momentum=0.9)
        for _ in range(2):
            with model.trace("The Eiffel Tower is in the city of"):
                block.output[0][:] += vector
                model.lm_head.output[0, -1].log_softmax(-1)[7042].backward()
            optimizer.step()
            optimizer.zero_grad()
        found["trained vector"] = vector.save()
        with model.generate("Once", max_new_tokens=6, do_sample=True, seed=3) as tracer:
            for _ in tracer.iter[:]:
                block.attn.heads.z[:, 8] = 0
                block.output[0][:, -1] += vector
            found["drawn tokens"] = tracer.result.save()
    return found


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_several_ranks_give_what_one_gives(
    num_ranks: int, demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _all_sorts(LanguageModel(str(demo_folder)), remote=False)
    with Up(tmp_path, [f"{NAME}={demo_folder}"], ["--tp", str(num_ranks)]) as up:
        assert len(ranks(up.descendants())) == num_ranks
        actual = _all_sorts(_model(up, NAME, monkeypatch), remote=True)
    for name, value in expected.items():
        tolerance = 0 if name.endswith("tokens") else 1e-4
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def two_ranks(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Up:
    models = [f"tiny/llama={tiny.folder('llama')}"]
    with Up(tmp_path_factory.mktemp("tp2"), models, ["--tp", "2"]) as up:
        yield up


def _everywhere(model: LanguageModel, *, remote: bool) -> dict[str, torch.Tensor]:
    """Reads and writes where tensor parallelism splits the model and where it does not."""
    saved = {}
    with model.session(remote=remote):
        with model.trace(IDS):
            layer = model.model.layers[1]
            saved["gate"] = layer.mlp.gate_proj.output.save()
            saved["o_input"] = layer.self_attn.o_proj.input.save()
            layer.mlp.up_proj.output[:, -1, 60:70] = 0.5
            layer.self_attn.q_proj.output = layer.self_attn.q_proj.output.flip(-1)
            layer.mlp.down_proj.input = layer.mlp.down_proj.input - layer.mlp.down_proj.input.mean()
            kept = layer.output[0][:, -1, :]
            saved["lens"] = model.lm_head(model.model.norm(layer.output[0])).save()
            saved["projected"] = layer.mlp.gate_proj(layer.output[0]).save()
            saved["logits"] = model.lm_head.output.save()
        with model.trace(IDS[::-1]):
            model.model.layers[0].output[0][:, -1, :] = kept
            saved["patched"] = model.lm_head.output.save()
    return saved


def test_two_ranks_show_and_take_whole_tensors_everywhere(
    two_ranks: Up, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _everywhere(LanguageModel(str(tiny.folder("llama"))), remote=False)
    actual = _everywhere(_model(two_ranks, "tiny/llama", monkeypatch), remote=True)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_a_failing_trace_leaves_the_group_alive(
    two_ranks: Up, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(two_ranks, "tiny/llama", monkeypatch)
    with pytest.raises(InvalidTraceError) as raised:
        with model.session(remote=True):
            with model.trace(IDS):
                saved = model.lm_head.output.save()
            with model.trace(IDS):
                first = model.model.layers[0].output[0]
                model.model.layers[1].output = first[first > 0]
    assert raised.value.trace_number == 2
    assert raised.value.location is not None
    assert raised.value.location.source == "model.model.layers[1].output = first[first > 0]"
    assert saved.shape == (1, len(IDS), 256)
    with model.trace(IDS, remote=True):
        again = model.lm_head.output.save()
    assert torch.equal(again, saved)


def _without_positions(model: LanguageModel) -> None:
    args, kwargs = model.model.layers[1].inputs
    model.model.layers[1].inputs = (args, {**kwargs, "position_embeddings": None})


def _outside_the_vocabulary(model: LanguageModel) -> None:
    model.model.embed_tokens.input[0, 0] = 999


@pytest.mark.parametrize("write", [_without_positions, _outside_the_vocabulary])
def test_a_write_that_the_model_can_not_take_leaves_the_group_alive(
    two_ranks: Up, monkeypatch: pytest.MonkeyPatch, write: Callable[[LanguageModel], None]
) -> None:
    model = _model(two_ranks, "tiny/llama", monkeypatch)
    with pytest.raises(Error, match=r"can not run on|takes token ids"):
        with model.trace(IDS, remote=True):
            write(model)
            model.lm_head.output.save()
    with model.trace(IDS, remote=True):
        tokens = model.lm_head.output.argmax(-1).save()
    assert tokens.shape == (1, len(IDS))


def test_more_ranks_than_heads_are_refused_before_anything_runs(
    demo_folder: Path, tmp_path: Path
) -> None:
    done = run_insitu(
        "up", "--model", f"{NAME}={demo_folder}", "--tp", "10",
        "--port", "0", "--data-dir", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 1
    assert "a model of 9 attention heads can not be split over 10 ranks" in done.stderr
    assert "use at most 9 (each rank has heads of its own with 1, 3)" in done.stderr
    assert "is ready" not in done.stdout
    assert "Traceback" not in done.stderr


def test_two_ranks_both_get_a_brought_tensor(
    two_ranks: Up, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(64, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 64))

    def run(model: LanguageModel, *, remote: bool) -> torch.Tensor:
        with model.trace(IDS, remote=remote):
            model.model.layers[1].output = mlp(model.model.layers[0].output[0])
            # Split over the ranks where it is written: each needs it whole.
            model.model.layers[2].mlp.up_proj.output += mlp[0].bias[:128]
            logits: torch.Tensor = model.lm_head.output.save()
        return logits

    expected = run(LanguageModel(str(tiny.folder("llama"))), remote=False)
    for _ in range(2):
        actual = run(_model(two_ranks, "tiny/llama", monkeypatch), remote=True)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def _sweep(model: LanguageModel, *, remote: bool, exact: bool) -> list[torch.Tensor]:
    """A sweep whose traces share a pass, at places that are split and at places that are not."""
    saved = []
    with model.session(remote=remote, exact=exact):
        with model.trace(IDS * 3):
            clean = [layer.output[0] for layer in model.model.layers]
        for number, layer in enumerate(model.model.layers):
            for position in (2, 7, 9, -1):
                with model.trace(IDS[::-1] * 3):
                    layer.output[0][:, position] = clean[number][:, position]
                    saved.append(model.lm_head.output[:, -1].save())
            with model.trace(IDS[::-1] * 3):
                layer.mlp.up_proj.output[:, :, 60:70] *= 2
                saved.append(layer.mlp.gate_proj.output[:, 3].save())
                saved.append(model.lm_head.output[:, -3:].save())
    return saved


def test_a_merged_sweep_on_two_ranks_is_that_of_one(
    two_ranks: Up, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _sweep(LanguageModel(str(tiny.folder("llama"))), remote=False, exact=True)
    model = _model(two_ranks, "tiny/llama", monkeypatch)
    for exact in (False, True):
        actual = _sweep(model, remote=True, exact=exact)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
