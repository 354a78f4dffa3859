"""`insitu up` and the commands around it, as real processes."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
import torch

from insitu import (
    CONFIG,
    CancelledError,
    LanguageModel,
    SessionState,
    UnavailableError,
    attach,
)
from insitu.backends.remote import RemoteBackend
from support.tiny_models import TinyModels
from support.up import INSITU, Up, insitu, interruptible, ranks, run_python

IDS = [5, 9, 17, 23]


@pytest.fixture(scope="module")
def up(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Up:
    models = [f"tiny/{family}={tiny.folder(family)}" for family in ("llama", "gpt2")]
    with Up(tmp_path_factory.mktemp("up"), models) as server:
        yield server


@pytest.fixture
def model(up: Up, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
    monkeypatch.setattr(CONFIG, "_api_key", "tests")
    return LanguageModel("tiny/llama")


def test_status_lists_models_groups_and_queues(up: Up) -> None:
    done = insitu("status", INSITU_ENDPOINT=up.endpoint, INSITU_API_KEY="t")
    assert done.returncode == 0, done.stderr
    assert "tiny/llama" in done.stdout
    assert "tiny/gpt2" in done.stdout
    assert "ready" in done.stdout
    assert "…" not in done.stdout


def test_status_without_a_server_names_the_address_it_tried() -> None:
    done = insitu("status", INSITU_ENDPOINT="127.0.0.1:1", INSITU_API_KEY="t")
    assert done.returncode == 1
    assert "127.0.0.1:1" in done.stderr
    assert "insitu up" in done.stderr
    assert "Traceback" not in done.stderr


def test_metrics_show_the_queue_latency(up: Up, model: LanguageModel) -> None:
    with model.trace(IDS, remote=True):
        model.lm_head.output.argmax(-1).save()
    with urllib.request.urlopen(f"http://{up.metrics_address}/metrics") as response:
        scheduler = response.read().decode()
    assert 'insitu_queue_latency_seconds_bucket{le="0.001",model="tiny/llama",' in scheduler
    shard = next(
        line.partition("metrics are at ")[2]
        for line in up.log.splitlines()
        if "insitu_shard.server" in line and "metrics are at" in line
    )
    with urllib.request.urlopen(shard) as response:
        assert "insitu_shard_handle_bytes" in response.read().decode()


def test_ctrl_c_and_sigterm_end_every_process_and_free_the_port(
    tiny: TinyModels, tmp_path: Path
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        with Up(tmp_path / number.name, [f"tiny={tiny.folder('llama')}"]) as up:
            started = up.descendants()
            assert len(started) >= 3, "scheduler, agent and rank"
            up.process.send_signal(number)
            assert up.process.wait(60) == 0
            _, left = psutil.wait_procs(started, timeout=5)
            assert not left
            host, _, port = up.endpoint.partition(":")
            with socket.socket() as connection:
                assert connection.connect_ex((host, int(port))) != 0


def test_a_killed_up_leaves_no_process(tiny: TinyModels, tmp_path: Path) -> None:
    with Up(tmp_path, [f"tiny={tiny.folder('llama')}"]) as up:
        started = up.descendants()
        up.process.kill()
        up.process.wait()
        _, left = psutil.wait_procs(started, timeout=30)
        assert not left


def test_what_dies_is_started_again_where_it_was(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Up(tmp_path, [f"tiny/llama={tiny.folder('llama')}"], ["--replicas", "2"]) as up:
        monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
        monkeypatch.setattr(CONFIG, "_api_key", "tests")
        model = LanguageModel("tiny/llama")
        before = _tokens(model)
        both = ranks(up.descendants())
        assert len(both) == 2
        for rank in both:
            rank.kill()
        _wait_for(up, "the ranks of tiny/llama were started again")
        # It waits in the queue for a group to come back.
        assert torch.equal(_tokens(model), before)
        scheduler = next(
            process for process in up.descendants() if "insitu_scheduler" in process.cmdline()
        )
        scheduler.kill()
        _wait_for(up, "the scheduler ended")
        _wait_until_it_answers()
        assert torch.equal(_tokens(model), before)
        assert up.process.poll() is None


def _tokens(model: LanguageModel) -> torch.Tensor:
    with model.trace(IDS, remote=True):
        tokens: torch.Tensor = model.lm_head.output.argmax(-1).save()
    return tokens


def _wait_until_it_answers() -> None:
    """A scheduler that comes back knows models once their groups have found it."""
    backend = RemoteBackend(CONFIG)
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline
        with suppress(UnavailableError):
            if backend.server_state().groups:
                break
        time.sleep(0.1)
    backend.close()


def _wait_for(up: Up, *messages: str) -> None:
    deadline = time.monotonic() + 60
    while not all(message in up.log for message in messages):
        assert time.monotonic() < deadline, up.log
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "x=/nowhere/at/all"], ["/nowhere/at/all", "insitu demo-model"]),
        (["--model", "{folder}", "--tp", "0"], ["--tp is 0"]),
        (["--model", "{folder}", "--replicas", "0"], ["--replicas is 0"]),
        (["--model", "{folder}", "--api-keys-file", "/nowhere/keys"], ["/nowhere/keys"]),
    ],
    ids=["no model", "no ranks", "no replicas", "no key file"],
)
def test_what_can_not_start_says_why_and_leaves_nothing(
    flags: list[str], says: list[str], tiny: TinyModels, tmp_path: Path
) -> None:
    flags = [flag.replace("{folder}", str(tiny.folder("llama"))) for flag in flags]
    mark = {"STARTED_BY": str(tmp_path)}
    done = insitu("up", *flags, "--port", "0", "--data-dir", str(tmp_path), **mark)
    assert done.returncode == 1
    assert "is ready" not in done.stdout
    assert "Traceback" not in done.stderr
    for part in says:
        assert part in done.stderr
    running = psutil.process_iter(["environ"])
    assert not [p for p in running if (p.info["environ"] or {}).get("STARTED_BY") == str(tmp_path)]


def test_a_port_in_use_is_named(up: Up, tiny: TinyModels, tmp_path: Path) -> None:
    port = up.endpoint.rpartition(":")[2]
    folder = str(tiny.folder("llama"))
    done = insitu("up", "--model", folder, "--port", port, "--data-dir", str(tmp_path))
    assert done.returncode == 1
    assert port in done.stderr
    assert "Traceback" not in done.stderr


def test_a_client_that_is_gone_in_the_middle_cancels_its_session_and_holds_up_nobody(
    up: Up, model: LanguageModel, tmp_path: Path
) -> None:
    script = tmp_path / "client.py"
    script.write_text(
        "import insitu, sys\n"
        "model = insitu.LanguageModel('tiny/llama')\n"
        "with model.session(remote=True, exact=True):\n"
        "    for _ in range(9000):\n"
        "        with model.trace([5, 9, 17]):\n"
        "            hidden = model.model.layers[1].output[0]\n"
        "            model.model.layers[2].output[0][:] = hidden\n"
    )
    environment = {**os.environ, "INSITU_ENDPOINT": up.endpoint, "INSITU_API_KEY": "gone"}
    with subprocess.Popen(
        [sys.executable, str(script)], stderr=subprocess.PIPE, text=True, env=environment
    ) as client:
        assert client.stderr is not None
        for line in client.stderr:
            if " - RUNNING: " in line:
                break
        client.kill()
    killed_at = time.monotonic()
    with model.trace(IDS, remote=True):
        tokens = model.lm_head.output.argmax(-1).save()
    assert tokens.shape == (1, 4)
    assert time.monotonic() - killed_at < 60
    while "CANCELLED" not in _journaled_states(up):
        assert time.monotonic() - killed_at < 60
        time.sleep(0.1)


def _journaled_states(up: Up) -> list[str]:
    with closing(sqlite3.connect(up.data_dir / "journal.sqlite")) as connection:
        return [state for (state,) in connection.execute("SELECT state FROM sessions")]


def test_ctrl_c_in_a_blocking_session_cancels_it_and_the_group_goes_on_serving(
    up: Up, model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "client.py"
    script.write_text(
        "import insitu\n"
        "model = insitu.LanguageModel('tiny/llama')\n"
        "with model.session(remote=True, exact=True):\n"
        "    for _ in range(9000):\n"
        "        with model.trace([5, 9, 17]):\n"
        "            model.model.layers[2].output[0][:] = 0\n"
    )
    monkeypatch.setenv("INSITU_API_KEY", "ctrl-c")
    with interruptible([sys.executable, str(script)]) as client:
        assert client.stderr is not None
        for line in client.stderr:
            if " - RUNNING: " in line:
                break
        client.send_signal(signal.SIGINT)
        rest = client.stderr.read()
    assert "KeyboardInterrupt" in rest
    monkeypatch.setattr(CONFIG, "_api_key", "ctrl-c")
    submission = attach(line.split(" - ")[0].split()[-1])
    with pytest.raises(CancelledError):
        submission.wait(timeout=10)
    assert submission.status() is SessionState.CANCELLED
    with model.trace(IDS, remote=True):
        tokens = model.lm_head.output.argmax(-1).save()
    assert tokens.shape == (1, 4)


def test_help_is_documentation() -> None:
    for command in (["--help"], ["up", "--help"], ["scheduler", "--help"], ["shard", "--help"]):
        done = run_python([*INSITU, *command], COLUMNS="200")
        assert done.returncode == 0, done.stderr
    assert "INSITU_MODEL" in done.stdout


def test_the_command_starts_without_torch() -> None:
    code = (
        "import sys, insitu.cli, insitu.cli._up, insitu.cli._status, insitu.cli._sessions\n"
        "assert 'torch' not in sys.modules"
    )
    done = run_python([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr


def test_demo_model_prints_its_folder_last(demo_folder: Path) -> None:
    done = insitu("demo-model")
    assert Path(done.stdout.splitlines()[-1]) == demo_folder
    assert (demo_folder / "model.safetensors").is_file()
