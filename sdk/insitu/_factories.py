"""Records tensors that the user's code makes inside a session: they are made where it runs."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from insitu._origin import Container, Moment, Origin
from insitu._proxy import record, recorded_in, wrap
from insitu._shapes import infer
from insitu._source import user_location
from insitu_wire.operations import FACTORIES

if TYPE_CHECKING:
    from collections.abc import Callable

    from insitu._recorder import SessionRecorder

_LIBRARIES = ("insitu", "insitu_wire", "insitu_shard", "torch", "transformers")
_NOT_THE_USERS = tuple(
    f"{folder}/"
    for name in _LIBRARIES
    if (spec := find_spec(name)) is not None
    for folder in spec.submodule_search_locations or ()
)
_FACTORIES: dict[Any, str] = {getattr(torch, name.partition(".")[2]): name for name in FACTORIES}


class FactoryMode(TorchFunctionMode):
    """While a session is recorded: sees the torch functions that are called with no value of it.

    torch.zeros and its like are recorded, and so is what is called with lists of the session.
    """

    def __init__(self, recorder: SessionRecorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Records, or has torch do what it was asked for."""
        kwargs = kwargs or {}
        if types:
            return func(*args, **kwargs)
        if func in _FACTORIES and not _is_called_by_a_library():
            return self._make(func, _FACTORIES[func], args, kwargs)
        if any(isinstance(arg, Container) for arg in args):
            return record(func, recorded_in((args, kwargs)), args, kwargs)
        return func(*args, **kwargs)

    def _make(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        location = user_location()
        kwargs = {key: kwargs[key] for key in kwargs.keys() - {"device", "pin_memory"}}
        structure = infer(func, name, (args, {**kwargs, "device": "meta"}), location)
        block = self._recorder.block
        node_id = block.call(name, args, kwargs, location)
        made = Origin(
            self._recorder,
            location,
            name,
            node_id,
            moment=Moment(block.number),
            scope=self._recorder.scope,
        )
        return wrap(structure, made)


def _is_called_by_a_library() -> bool:
    """Whether torch is called by itself, by transformers or by insitu: these want real tensors."""
    frame = sys._getframe(2)
    return frame.f_code.co_filename.startswith(_NOT_THE_USERS)
