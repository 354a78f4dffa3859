"""A session that brings a 64 MiB tensor, the first and the second time: bytes, and seconds.

.venv/bin/python benchmarks/uploads.py
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from _subjects import MODEL, machine, server

from insitu import CONFIG, LanguageModel
from insitu.cli._demo_model import prepare_demo_model
from support.recording_proxy import RecordingProxy
from support.routed_server import RoutedServer

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 7
SHAPE = (576, 29128)  # 64 MiB of float32 for the hidden size of the model
EIFFEL = "The Eiffel Tower is in the city of"
PALACE = "Buckingham Palace is in the city of"


def main() -> None:
    CONFIG.set_default_api_key("bench")
    logging.getLogger("insitu").setLevel(logging.ERROR)
    folder = prepare_demo_model()
    with contextlib.redirect_stderr(io.StringIO()):
        num_bytes = _bytes(folder)
        seconds = _seconds(folder)
    print(f"{machine()}; seconds are the fastest of {ROUNDS} interleaved rounds\n")
    print("| session | bytes client - scheduler | bytes scheduler - shard | seconds |")
    print("|---|---|---|---|")
    for name in seconds:
        crossed = " | ".join(f"{count:,}" for count in num_bytes.get(name, ())) or "- | -"
        print(f"| {name} | {crossed} | {min(seconds[name]):.3f} |")


def _bytes(folder: Path) -> dict[str, tuple[int, int]]:
    """Counts what crosses, in both directions."""
    to_scheduler, to_shard = RecordingProxy(), RecordingProxy()
    brought = torch.randn(SHAPE)
    counts = {}
    with tempfile.TemporaryDirectory() as data:
        routed = RoutedServer(f"{MODEL}={folder}", Path(data), to_scheduler, to_shard)
        with routed as os.environ["INSITU_ENDPOINT"]:
            model = LanguageModel(MODEL)
            _first_session(model)
            for name, run in (
                ("the first session, no tensor", lambda: _first_session(model)),
                ("64 MiB, first time", lambda: _probe(model, brought)),
                ("64 MiB, second time", lambda: _probe(model, brought)),
            ):
                to_scheduler.captured.clear()
                to_shard.captured.clear()
                run()
                counts[name] = len(to_scheduler.captured), len(to_shard.captured)
    return counts


def _seconds(folder: Path) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {}
    with server(MODEL, folder) as os.environ["INSITU_ENDPOINT"]:
        model = LanguageModel(MODEL)
        _first_session(model)
        for _ in range(ROUNDS):
            brought = torch.randn(SHAPE)
            for name, run in (
                ("the first session, no tensor", lambda: _first_session(model)),
                ("64 MiB, first time", lambda: _probe(model, brought)),  # noqa: B023
                ("64 MiB, second time", lambda: _probe(model, brought)),  # noqa: B023
            ):
                seconds.setdefault(name, []).append(_timed(run))
    local = LanguageModel(str(folder))
    _probe(local, brought, remote=False)
    seconds["64 MiB, in process"] = [
        _timed(lambda: _probe(local, brought, remote=False)) for _ in range(ROUNDS)
    ]
    return seconds


def _timed(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _first_session(model: LanguageModel) -> None:
    with model.session(remote=True):
        with model.trace(EIFFEL):
            hidden = model.model.layers[29].output[0][:, -1, :]
            model.lm_head.output.argmax(dim=-1).save()
        with model.trace(PALACE):
            model.model.layers[1].output[0][:, -1, :] = hidden[:]
            model.lm_head.output.argmax(dim=-1).save()


def _probe(model: LanguageModel, brought: torch.Tensor, *, remote: bool = True) -> None:
    with model.trace(EIFFEL, remote=remote):
        hidden = model.model.layers[10].output[0][:, -1, :]
        found = (hidden @ brought).argmax(-1).save()
    assert found.shape == (1,)


if __name__ == "__main__":
    main()
