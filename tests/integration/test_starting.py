"""What can not be served: one line that says what to do, status 1, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import torch

from insitu import CONFIG, LanguageModel
from support.judge import with_hooks, with_insitu
from support.ports import free_port
from support.tiny_models import TinyModels
from support.up import Up, insitu, run_python

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def bad(tiny: TinyModels, tmp_path: Path) -> dict[str, str]:
    """Models that can not be loaded, and a port that somebody listens on."""
    models = {"good": str(tiny.folder("llama"))}
    for name in ("missing", "truncated", "unknown", "none"):
        models[name] = str(tmp_path / name)
    tiny.module("llama").save_pretrained(models["missing"], max_shard_size="200KB")
    sorted(Path(models["missing"]).glob("*.safetensors"))[0].unlink()
    shutil.copytree(models["good"], models["truncated"])
    weights = Path(models["truncated"], "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(models["good"], models["unknown"])
    Path(models["unknown"], "config.json").write_text('{"model_type": "llama99"}')
    Path(models["none"]).mkdir()
    return models


@pytest.fixture
def taken_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield str(listening.getsockname()[1])


@pytest.mark.parametrize(
    ("model", "flags", "says"),
    [
        ("missing", [], "download the model again"),
        ("truncated", ["--tp", "2"], "model.safetensors is damaged or cut short"),
        ("unknown", [], "install a newer transformers"),
        ("none", [], "has no config.json"),
        ("good", ["--dtype", "float8_e4m3fn"], "must be one of float32, bfloat16"),
        ("good", ["--tp", "5"], "can not be split over 5 ranks"),
        ("good", ["--max-memory", "cpu=lots"], "must be like 0=20GiB,cpu=64GiB"),
        ("good", ["--port", "{port}"], "choose a free port with --port, or 0"),
        ("good", ["--metrics-port", "{port}"], "choose a free port with --metrics-port, or 0"),
    ],
    ids=[
        "missing",
        "truncated",
        "unknown",
        "none",
        "dtype",
        "heads",
        "memory",
        "port",
        "metrics port",
    ],
)
def test_a_shard_group_that_can_not_start_says_what_to_do(
    model: str, flags: list[str], says: str, bad: dict[str, str], taken_port: str, tmp_path: Path
) -> None:
    flags = [flag.replace("{port}", taken_port) for flag in flags]
    command = [sys.executable, "-m", "insitu_shard", "--model", f"x={bad[model]}", *flags]
    done = run_python(command, STARTED_BY=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("insitu shard: ")
    assert says in done.stderr
    assert not _started_by(tmp_path)


@pytest.mark.parametrize(
    ("model", "flags", "says"),
    [
        ("missing", [], "download the model again"),
        ("truncated", ["--tp", "2"], "model.safetensors is damaged or cut short"),
        ("unknown", ["--max-loaded", "1"], "install a newer transformers"),
        ("good", ["--dtype", "float8_e4m3fn"], "must be one of float32, bfloat16"),
    ],
    ids=["missing", "truncated", "unknown", "dtype"],
)
def test_a_deployment_of_what_can_not_be_served_ends_and_says_what_to_do(
    model: str, flags: list[str], says: str, bad: dict[str, str], tmp_path: Path
) -> None:
    flags = [*flags, "--port", "0", "--data-dir", str(tmp_path / "data")]
    done = insitu("up", "--model", f"x={bad[model]}", *flags, STARTED_BY=str(tmp_path))
    assert done.returncode == 1
    assert "is ready" not in done.stdout
    (line,) = (line for line in done.stderr.splitlines() if says in line)
    assert line.startswith("insitu ")
    assert "Traceback" not in done.stderr
    assert not _started_by(tmp_path)


def test_a_node_that_waits_for_the_others_ends_when_it_is_told(
    bad: dict[str, str], tmp_path: Path
) -> None:
    flags = ["--model", f"x={bad['good']}", "--tp", "2", "--nodes", "2", "--node-rank", "1"]
    flags += ["--rendezvous", f"127.0.0.1:{free_port()}", "--scheduler", "127.0.0.1:1"]
    environment = {**os.environ, "STARTED_BY": str(tmp_path)}
    node = subprocess.Popen([sys.executable, "-m", "insitu_shard", *flags], env=environment)
    _wait_until(lambda: _takes_signals_itself(node.pid))
    node.terminate()
    assert node.wait(20) == 0
    _wait_until(lambda: not _started_by(tmp_path))


def _takes_signals_itself(process: int) -> bool:
    status = Path(f"/proc/{process}/status").read_text()
    blocked = next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk"))
    return bool(int(blocked, 16) >> (signal.SIGTERM - 1) & 1)


def _wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _started_by(mark: Path) -> list[psutil.Process]:
    running = psutil.process_iter(["environ"])
    return [p for p in running if (p.info["environ"] or {}).get("STARTED_BY") == str(mark)]


def test_a_model_that_memory_does_not_hold_is_served_from_disk(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tiny.module("gpt2")
    num_bytes = sum(weight.nbytes for weight in module.parameters())
    monkeypatch.setenv("INSITU_MAX_MEMORY", f"cpu={num_bytes * 6 // 10}")
    monkeypatch.setattr(CONFIG, "_api_key", "tests")
    with Up(tmp_path, [f"tiny/gpt2={tiny.folder('gpt2')}"], ["--tp", "2"]) as up:
        monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
        actual = with_insitu(LanguageModel("tiny/gpt2"), remote=True)
        assert "over 1 rank(s)" in up.log
    for name, expected in with_hooks(module).items():
        assert torch.equal(actual[name], expected), name
