"""The output of a decoder layer, before it is there and after: a tensor, and a tuple of one."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from insitu._proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator


class BlockProxy(Proxy):
    """The output of a decoder layer: its hidden state, [batch, length, hidden].

    It may also be treated as the tuple `(hidden_state,)` that some versions of transformers return.
    """

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, int) or isinstance(key, bool):
            return super().__getitem__(key)
        if key in (0, -1):
            return Proxy.make(self._origin, self._meta)
        raise _only_hidden_state(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, int) and not isinstance(key, bool):
            self[key][...] = value
        else:
            super().__setitem__(key, value)

    def __iter__(self) -> Iterator[Proxy]:
        return iter([self[0]])

    def __len__(self) -> int:
        return 1


class BlockOutput(torch.Tensor):
    """A saved output of a decoder layer: its hidden state, where `[0]` is the whole of it too."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, key: Any) -> torch.Tensor:
        hidden = self.as_subclass(torch.Tensor)
        if not isinstance(key, int) or isinstance(key, bool):
            return hidden[key]
        if key in (0, -1):
            return hidden
        raise _only_hidden_state(key)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([self[0]])

    def __len__(self) -> int:
        return 1

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return copy.deepcopy(self[0], memo).as_subclass(BlockOutput)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Whoever loads it need not have insitu.
        return self[0].__reduce_ex__(protocol)


def _only_hidden_state(key: int) -> IndexError:
    return IndexError(
        f"a decoder layer's output is (hidden_state,), so [{key}] is out of range; [0] is the "
        "hidden state, and [:, -1] a part of it"
    )
