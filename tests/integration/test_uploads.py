"""The user's own tensors and modules, in process and through real servers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import insitu
from insitu import CONFIG, CapacityError, InvalidTraceError, LanguageModel
from support.recording_proxy import RecordingProxy
from support.routed_server import RoutedServer
from support.tiny_models import TinyModels
from support.up import Up
from support.up import insitu as command

IDS = [5, 9, 17, 23, 42]
MIB = 1024 * 1024


class TopKSae(nn.Module):
    """A sparse autoencoder as researchers bring it: its weights are the user's own."""

    def __init__(self, hidden: int = 64, features: int = 1024, k: int = 8) -> None:
        super().__init__()
        self.k = k
        self.bias = nn.Parameter(torch.randn(hidden))
        self.encoder = nn.Linear(hidden, features)
        self.decoder = nn.Linear(features, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.encoder(x - self.bias))
        values, indices = features.topk(self.k, dim=-1)
        sparse = torch.zeros_like(features).scatter_(-1, indices, values)
        return self.decoder(sparse) + self.bias


@pytest.fixture(scope="module")
def up(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Up:
    with Up(tmp_path_factory.mktemp("up"), [f"tiny/llama={tiny.folder('llama')}"]) as server:
        yield server


@pytest.fixture(params=["local", "remote"])
def model(request: pytest.FixtureRequest, connect: Callable[[str], LanguageModel]) -> LanguageModel:
    tiny: TinyModels = request.getfixturevalue("tiny")
    if request.param == "local":
        return LanguageModel(str(tiny.folder("llama")))
    up: Up = request.getfixturevalue("up")
    return connect(up.endpoint)


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], LanguageModel]:
    """Makes a model behind an address."""

    def made(endpoint: str) -> LanguageModel:
        monkeypatch.setenv("INSITU_ENDPOINT", endpoint)
        monkeypatch.setattr(CONFIG, "_api_key", "tests")
        return LanguageModel("tiny/llama")

    return made


def applied(
    model: LanguageModel, function: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives the hidden state of a layer, and what a function made of it where the model runs."""
    with model.trace(IDS, remote=model.name == "tiny/llama"):
        hidden = model.model.layers[1].output[0].save()
        result = function(hidden).save()
    return hidden, result


def modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "top-k sae": TopKSae(),
        "linear": nn.Linear(64, 512),
        "layer norm": nn.LayerNorm(64),
        "rms norm": nn.RMSNorm(64),
        "mlp": nn.Sequential(
            nn.Linear(64, 512), nn.GELU(), nn.Dropout(0.5), nn.Linear(512, 8), nn.Softmax(-1)
        ),
        "bfloat16": nn.Sequential(nn.Linear(64, 1024), nn.SiLU()).to(torch.bfloat16),
    }


@pytest.mark.parametrize("name", modules())
def test_a_module_gives_what_it_gives_in_eager_torch(model: LanguageModel, name: str) -> None:
    module = modules()[name].eval()
    dtype = next(module.parameters()).dtype
    hidden, result = applied(model, lambda hidden: module(hidden.to(dtype)))
    with torch.no_grad():
        torch.testing.assert_close(result, module(hidden.to(dtype)), rtol=1e-5, atol=1e-5)


def test_a_steered_model_sees_the_reconstruction(model: LanguageModel, tiny: TinyModels) -> None:
    torch.manual_seed(0)
    sae = TopKSae()
    with model.trace(IDS, remote=model.name == "tiny/llama"):
        model.model.layers[1].output = sae(model.model.layers[1].output[0])
        logits = model.lm_head.output.save()
    module = tiny.module("llama")

    def replace(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        return sae(output)

    module.model.layers[1].register_forward_hook(replace)
    with torch.no_grad():
        torch.testing.assert_close(logits, module(torch.tensor([IDS])).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.bool])
def test_large_tensors_of_every_kind_arrive_as_they_are(
    model: LanguageModel, dtype: torch.dtype
) -> None:
    brought = torch.randn(64, 2048).to(dtype).T
    _, result = applied(model, lambda hidden: torch.broadcast_tensors(brought, hidden[0, 0])[0])
    assert result.dtype is dtype
    assert torch.equal(result, brought)


def test_a_safetensors_file_is_brought_as_it_is(model: LanguageModel, tmp_path: Path) -> None:
    saved = {"encoder": torch.randn(64, 1024), "threshold": torch.rand(1024)}
    save_file(saved, tmp_path / "sae.safetensors")
    weights = load_file(tmp_path / "sae.safetensors")

    def features(hidden: torch.Tensor) -> torch.Tensor:
        before = hidden @ weights["encoder"]
        return torch.where(before > weights["threshold"], before, 0)

    hidden, result = applied(model, features)
    torch.testing.assert_close(result, features(hidden), rtol=1e-3, atol=1e-3)


def test_the_users_tensor_is_never_written_to(model: LanguageModel) -> None:
    brought = torch.zeros(64, 1024)
    kept = brought.clone()
    for _ in range(2):
        with model.session(remote=model.name == "tiny/llama"):
            with model.trace(IDS):
                hidden = model.model.layers[1].output[0]
                view = brought.view_as(torch.zeros_like(hidden[0, :1]).T.expand(64, 1024))
                view += 1
                written = view.save()
                again = (hidden[0, 0] @ brought).save()
        assert torch.equal(written, kept + 1)
        assert not again.any()
    assert torch.equal(brought, kept)


def test_a_tensor_that_is_changed_inside_the_block_is_refused(model: LanguageModel) -> None:
    brought = torch.zeros(64, 1024)
    with pytest.raises(InvalidTraceError, match=r"was changed .* \.clone\(\)"):
        with model.trace(IDS, remote=model.name == "tiny/llama"):
            (model.model.layers[1].output[0] @ brought).save()
            brought += 1


def test_loops_variables_and_containers_do_not_write_into_the_users_tensor(
    model: LanguageModel,
) -> None:
    brought = torch.zeros(4, 8192)
    with model.session(remote=model.name == "tiny/llama") as session:
        collected = insitu.list().save()
        kept = insitu.variable(torch.ones(4, 8192))
        kept.update(brought)
        kept += 1
        with session.iter(brought) as row:
            row += 2
            collected.append(row)
        collected.append(brought)
        collected[4].add_(3)
        last = kept.clone().save()
        sums = brought.expand_as(kept).sum().save()
    assert torch.equal(last, brought + 1)
    assert all(torch.equal(row, brought[0] + 2) for row in collected[:4])
    assert not sums.any()
    assert not brought.any()


def test_an_edit_brings_its_tensors_to_every_trace(model: LanguageModel) -> None:
    torch.manual_seed(0)
    small, large = torch.randn(64), nn.Linear(64, 64 * 16)
    with model.edit() as edited:
        hidden = model.model.layers[1].output
        model.model.layers[1].output = (
            hidden + small + large(hidden).unflatten(-1, (64, 16)).sum(-1)
        )
    other = torch.randn(64, 1024)
    with edited.session(remote=model.name == "tiny/llama"):
        with edited.trace(IDS):
            product = (edited.model.layers[0].output[0] @ other).save()
            plain = edited.model.layers[0].output.save()
            steered = edited.model.layers[1].output.save()
    with model.trace(IDS, remote=model.name == "tiny/llama"):
        hidden = model.model.layers[1].output[0].save()
    with torch.no_grad():
        added = small + large(hidden).unflatten(-1, (64, 16)).sum(-1)
    torch.testing.assert_close(steered[0], hidden + added, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(product, plain[0] @ other, rtol=1e-3, atol=1e-3)


def test_a_session_file_holds_its_tensors(
    model: LanguageModel, up: Up, tiny: TinyModels, tmp_path: Path
) -> None:
    is_remote = model.name == "tiny/llama"
    brought, path = torch.randn(64, 1024), tmp_path / "session.pb"
    with model.session(remote=is_remote, run=False) as session:
        with model.trace(IDS):
            result = (model.model.layers[1].output[0] @ brought).save()
    session.save(path)
    output = tmp_path / "results.safetensors"
    done = command(
        "run", str(path), "--remote" if is_remote else "--local", "--output", str(output),
        INSITU_ENDPOINT=up.endpoint, INSITU_API_KEY="tests",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ("Uploading tensors: 100%" in done.stderr) is is_remote
    hidden, _ = applied(model, torch.clone)
    actual = load_file(output)["result"]
    # Other processes round otherwise.
    torch.testing.assert_close(actual, hidden @ brought, rtol=1e-3, atol=1e-3)
    assert result.shape == (1, 5, 1024)


def test_a_tensor_crosses_each_wire_once(
    tiny: TinyModels, tmp_path: Path, connect: Callable[[str], LanguageModel]
) -> None:
    brought = torch.randn(64, 4096)
    to_scheduler, to_shard = RecordingProxy(), RecordingProxy()
    server = RoutedServer(f"tiny/llama={tiny.folder('llama')}", tmp_path, to_scheduler, to_shard)
    with server as endpoint:
        model = connect(endpoint)
        for is_first in (True, False):
            for proxy in (to_scheduler, to_shard):
                proxy.captured.clear()
            hidden, result = applied(model, lambda hidden: (hidden @ brought).sum(-1))
            torch.testing.assert_close(result, (hidden @ brought).sum(-1), rtol=1e-3, atol=1e-3)
            for proxy in (to_scheduler, to_shard):
                assert (len(proxy.captured) > MIB) is is_first
                assert len(proxy.captured) < (MIB + 100_000 if is_first else 50_000)
    for proxy in (to_scheduler, to_shard):
        proxy.close()


def test_what_had_to_make_room_is_uploaded_again(
    tiny: TinyModels,
    tmp_path: Path,
    connect: Callable[[str], LanguageModel],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("INSITU_UPLOAD_STORE_BYTES", str(5 * MIB // 2))
    monkeypatch.setenv("INSITU_UPLOAD_CACHE_BYTES", str(3 * MIB // 2))
    a, b, c = (torch.randn(64, 4096) for _ in range(3))
    with Up(tmp_path, [f"tiny/llama={tiny.folder('llama')}"]) as up:
        model = connect(up.endpoint)
        for brought in (a, b, b, a, c, b):
            hidden, result = applied(model, lambda hidden: hidden @ brought)  # noqa: B023
            torch.testing.assert_close(result, hidden @ brought, rtol=1e-3, atol=1e-3)
        assert capsys.readouterr().err.count("Uploading tensors: 100%") == 4
        with pytest.raises(CapacityError, match="2,097,152 bytes, and the shard group keeps"):
            applied(model, lambda hidden: hidden @ b + hidden @ c)
        hidden, result = applied(model, lambda hidden: hidden @ c)
        torch.testing.assert_close(result, hidden @ c, rtol=1e-3, atol=1e-3)
