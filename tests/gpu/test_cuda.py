"""What contract tests promise of CPUs holds of a GPU: one device, bfloat16, downloads, a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from insitu import CONFIG, LanguageModel
from insitu_proto.v1 import shard_service_pb2
from insitu_proto.v1.intervention_pb2 import HOOK_SIDE_OUTPUT
from insitu_shard.downloads import Download, Downloads
from insitu_shard.engine import Saved, SegmentRun, load_model
from support.judge import with_hooks, with_insitu
from support.tiny_models import TinyModels
from support.up import Up

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.gpu
IDS = [5, 9, 17, 23, 42]
FAMILIES = ["llama", "gpt2", "gemma3", "gpt_neox", "mixtral"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_on_a_gpu_reads_and_writes_as_hooks_do(
    family: str,
    dtype: torch.dtype,
    tiny: TinyModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = f"tiny/{family}"
    flags = ["--dtype", str(dtype).removeprefix("torch.")]
    with Up(tmp_path, [f"{name}={tiny.folder(family)}"], flags) as up:
        monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
        monkeypatch.setattr(CONFIG, "_api_key", "tests")
        actual = with_insitu(LanguageModel(name), remote=True)
    module = tiny.module(family).to("cuda", dtype)
    tolerance = 1e-4 if dtype is torch.float32 else 5e-2
    for key, expected in with_hooks(module).items():
        torch.testing.assert_close(
            actual[key].float(), expected.float().cpu(), rtol=tolerance, atol=tolerance, msg=key
        )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ranks_on_several_gpus_give_what_one_gives(
    family: str, tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs a GPU a rank, and this machine has one")
    with Up(tmp_path, [f"tiny={tiny.folder(family)}"], ["--tp", "2"]) as up:
        monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
        monkeypatch.setattr(CONFIG, "_api_key", "tests")
        actual = with_insitu(LanguageModel("tiny"), remote=True)
    for key, expected in with_hooks(tiny.module(family).to("cuda")).items():
        torch.testing.assert_close(actual[key], expected.cpu(), rtol=1e-4, atol=1e-4, msg=key)


def test_what_a_merged_sweep_gives_on_a_gpu_is_what_single_passes_give(tiny: TinyModels) -> None:
    model = load_model("tiny", tiny.folder("llama"), device=torch.device("cuda"))

    def run(*, exact: bool) -> list[torch.Tensor]:
        segment = shard_service_pb2.Segment(first_trace_number=1, exact=exact)
        for layer in range(3):
            trace = segment.steps.add().trace
            trace.model = "tiny"
            trace.invokes.add().rows.add().token_ids.extend(IDS)
            read = trace.nodes.add(id=4 * layer + 1).read.hook_point
            read.module_path = f"model.layers.{layer}.mlp"
            read.side = HOOK_SIDE_OUTPUT
            trace.nodes.add(id=4 * layer + 2).save.value.reference.node_id = 4 * layer + 1
        events = SegmentRun({"tiny": model}, segment, values={}).run()
        return [event.value for event in events if isinstance(event, Saved)]  # type: ignore[misc]

    for merged, single in zip(run(exact=False), run(exact=True), strict=True):
        torch.testing.assert_close(merged, single, rtol=1e-5, atol=1e-5)


async def test_a_value_is_downloaded_while_the_gpu_computes() -> None:
    device = torch.device("cuda")
    downloads = Downloads(device)
    value = torch.randn(1 << 22, device=device)
    expected = (value * 2).cpu()
    busy = torch.randn(4096, 4096, device=device)
    download = downloads.begun(Saved(1, "x", {"twice": value * 2}))
    assert isinstance(download, Download)
    for _ in range(200):
        busy = busy @ busy
    computed = torch.cuda.Event()
    computed.record()
    saved = await download.finished()
    assert not computed.query(), "the download has waited for what was computed after it"
    assert saved.value["twice"].is_pinned()  # type: ignore[index]
    assert torch.equal(saved.value["twice"], expected)  # type: ignore[index]


def test_running_out_of_memory_is_the_sessions_error_and_the_model_goes_on(
    tiny: TinyModels,
) -> None:
    from insitu_wire.errors import CapacityError

    model = load_model("tiny", tiny.folder("llama"), device=torch.device("cuda"))
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(max(0, free - (256 << 20)), dtype=torch.uint8, device="cuda")

    def segment(size: int) -> shard_service_pb2.Segment:
        made = shard_service_pb2.Segment(first_trace_number=1)
        trace = made.steps.add().trace
        trace.model = "tiny"
        trace.invokes.add().rows.add().token_ids.extend(IDS)
        read = trace.nodes.add(id=1).read.hook_point
        read.module_path, read.side = "lm_head", HOOK_SIDE_OUTPUT
        call = trace.nodes.add(id=2).call
        call.name = "torch.Tensor.new_zeros"
        call.args.add().reference.node_id = 1
        call.args.add().int_value = size
        trace.nodes.add(id=3).save.value.reference.node_id = 2
        return made

    with pytest.raises(CapacityError):
        list(SegmentRun({"tiny": model}, segment(1 << 29), values={}).run())
    del held
    events = list(SegmentRun({"tiny": model}, segment(8), values={}).run())
    assert any(isinstance(event, Saved) for event in events)
