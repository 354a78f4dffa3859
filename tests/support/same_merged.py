"""Runs a session merged and trace by trace, and compares all that comes of it."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from insitu._proxy import Proxy
from insitu_wire.errors import Error

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from insitu import LanguageModel

    Record = Callable[[Any, dict[str, Any]], None]

LOGGERS = ("insitu", "insitu_shard.engine.pass_run")


@dataclass
class Told:
    """What came of a session."""

    values: dict[str, Any] = field(default_factory=dict)
    logs: list[str] = field(default_factory=list)
    error: tuple[object, ...] = ()
    warnings: list[str] = field(default_factory=list)


def told(
    model: LanguageModel, record: Record, caplog: pytest.LogCaptureFixture, **options: bool
) -> Told:
    """Records a session and runs it.

    Args:
        model: what it runs on.
        record: records the steps; it is given the session, and a dict for what it saves.
        caplog: pytest's.
        options: the session's.
    """
    result = Told()
    caplog.clear()
    with ExitStack() as levels:
        for name in LOGGERS:
            levels.enter_context(caplog.at_level(logging.INFO, logger=name))
        try:
            with model.session(**options) as session:
                record(session, result.values)
        except Error as err:
            line = err.location.line if err.location else 0
            result.error = (err.reason, line, err.trace_number, err.message)
    for at in caplog.records:
        if at.name == LOGGERS[1]:
            result.warnings.append(at.getMessage())
        elif "LOG" in (message := at.getMessage()):
            result.logs.append(message.partition(" - ")[2])
    return result


def check_same(
    model: LanguageModel,
    record: Record,
    caplog: pytest.LogCaptureFixture,
    *,
    tolerance: float = 0,
    padding: bool = False,
) -> Told:
    """Checks that a session is the same merged as trace by trace; gives what it told.

    Args:
        model: what it runs on.
        record: see `told`.
        caplog: pytest's.
        tolerance: how far values may be apart.
        padding: whether traces of different lengths share a pass.
    """
    alone = told(model, record, caplog, exact=True)
    merged = told(model, record, caplog, padding=padding)
    assert merged.error == alone.error
    if not tolerance:
        assert merged.logs == alone.logs
    assert len(merged.logs) == len(alone.logs)
    # Run trace by trace after all, it would only seem to be right.
    assert not merged.warnings
    assert merged.values.keys() == alone.values.keys()
    for name, value in alone.values.items():
        _check_equal(name, merged.values[name], value, tolerance)
    return merged


def is_there(value: Any) -> bool:
    """Whether a saved value has come back."""
    if isinstance(value, Proxy):
        return False
    return bool(getattr(value, "_is_there", True))


def _check_equal(name: str, actual: Any, expected: Any, tolerance: float) -> None:
    assert is_there(actual) == is_there(expected), f"{name} is there only once"
    if not is_there(expected):
        return
    ours, theirs = (pytree.tree_leaves(plain(value)) for value in (actual, expected))
    assert len(ours) == len(theirs), name
    for one, other in zip(ours, theirs, strict=True):
        if not isinstance(other, torch.Tensor):
            assert one == other, name
            continue
        torch.testing.assert_close(
            one,
            other,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda text: f"{name}: {text}",
        )


def plain(value: Any) -> Any:
    """Gives a saved container as plain lists and dicts."""
    if isinstance(value, torch.Tensor) or not hasattr(value, "__iter__"):
        return value
    if hasattr(value, "keys"):
        return {key: plain(value[key]) for key in value}
    return [plain(item) for item in value] if not isinstance(value, str) else value
