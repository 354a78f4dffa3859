"""What is shown while a model loads."""

from __future__ import annotations

import logging

import pytest

from insitu_shard.engine import load_model, progress
from support.tiny_models import TinyModels


def _counted(numbers: range) -> None:
    with progress.progress_shown("tiny"):
        from transformers.utils.logging import tqdm

        for _ in tqdm(numbers, desc="Loading weights"):
            pass


def test_the_log_has_a_line_every_tenth_and_not_one_a_weight(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(progress, "MIN_SECONDS", 0.0)
    with caplog.at_level(logging.INFO):
        _counted(range(1000))
    assert 8 <= len(caplog.messages) <= 10
    assert caplog.messages[4].startswith("tiny: Loading weights, 50% (5")


def test_the_log_has_no_line_of_what_is_soon_over(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        _counted(range(1000))
    assert caplog.messages == []


def test_no_bar_is_drawn_where_there_is_no_terminal(
    tiny: TinyModels, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny.folder("llama")
    capfd.readouterr()
    with caplog.at_level(logging.INFO):
        load_model("tiny", folder)
    assert "Loading" not in capfd.readouterr().err
    assert any("tiny is loaded, in " in message for message in caplog.messages)


def test_a_terminal_has_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    _counted(range(1000))
    assert "Loading weights: " in capsys.readouterr().err
