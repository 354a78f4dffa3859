"""Shows what attention computes in each head, whichever kernel computes it otherwise.

An attention module that is watched takes another path for this call: the model file's own eager
attention, with points around it. All others run as they are served. What this relies on of
transformers: attention modules look up their kernel by `config._attn_implementation`, call
`apply_rotary_pos_emb(q, k, ...)` of their file, and their file has `eager_attention_forward` with
one softmax in it.
"""

from __future__ import annotations

import copy
import inspect
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

from insitu_shard.engine.points import Point, any_watched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from transformers import PretrainedConfig

# An attention module: its attributes are the family's, and no type knows them.
Attention = Any

_IMPLEMENTATION = "insitu_heads"
_ROTARY = "apply_rotary_pos_emb"
_EAGER = "eager_attention_forward"
_SOFTMAX = {torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax}
_QUERY, _KEY = "[batch, head, query, head_dim]", "[batch, head, key, head_dim]"
_SQUARE = "[batch, head, query, key]"


@dataclass(slots=True)
class _Call:
    """A call of an attention module that is under way."""

    attention: Attention
    heads: Heads | None
    """None if nobody watches it."""
    config: PretrainedConfig
    """That the module had before."""
    before: _Call | None
    rotated_key: torch.Tensor | None = None
    """The new keys, of each query head, if they were shown before they were rotated."""


_CALL: ContextVar[_Call | None] = ContextVar("attention call", default=None)


class Heads(torch.nn.Module):
    """The points inside of an attention module."""

    def __init__(self, attention: Attention, watched_config: PretrainedConfig) -> None:
        """Makes the points.

        Args:
            attention: the module that they are in.
            watched_config: configuration of a module that is watched.
        """
        super().__init__()
        self._served_config: PretrainedConfig = attention.config
        self._watched_config = watched_config
        forward = _forward(attention)
        self._eager = forward.__globals__[_EAGER]
        has_rotary = "position_embeddings" in forward.__code__.co_varnames
        knows_rotary = has_rotary and _rotates_together(forward)
        if knows_rotary or not has_rotary:
            self.q, self.k = Point(_QUERY), Point(_KEY)
        if has_rotary:
            self.q_rotary, self.k_rotary = Point(_QUERY), Point(_KEY)
        self.v = Point(_KEY)
        self.scores, self.pattern = Point(_SQUARE), Point(_SQUARE)
        self.z = Point(_QUERY)
        if knows_rotary:
            _show_rotation(forward)

    def enter(self, attention: Attention, _: object) -> None:
        """Chooses the path of a call that begins."""
        heads = self if any_watched(self._modules.values()) else None
        _CALL.set(_Call(attention, heads, attention.config, _CALL.get()))
        _configure(attention, self._watched_config if heads else self._served_config)

    def leave(self, attention: Attention, _: object, __: object) -> None:
        """Ends the call."""
        call = _CALL.get()
        assert call is not None
        _configure(attention, call.config)
        _CALL.set(call.before)

    def rotate(
        self,
        call: _Call,
        rotated: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        query: torch.Tensor,
        key: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotates queries and keys, and shows them before.

        Some families hand over only the first part of each head, which is what they rotate; they
        are shown whole.
        """
        width = _head_dim(call.attention)
        part = query.shape[-1]
        whole_query, whole_key = _widened(query, width), _widened(key, width)
        shown_query = self.q(whole_query.clone())
        shown_key = self.k(_for_each_head(whole_key, query))
        if part < width:
            whole_query.copy_(shown_query)
        new_query, new_key = rotated(
            shown_query[..., :part], shown_key[..., :part], *args, **kwargs
        )
        call.rotated_key = torch.cat((new_key, shown_key[..., part:]), dim=-1)
        # A cache keeps the keys of the key-value heads, as they were.
        return new_query, rotated(query, key, *args, **kwargs)[1]

    def attend(
        self,
        attention: Attention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Does what the kernel does, with all points on the way.

        Args:
            attention: the module.
            query: [batch, head, query, head_dim].
            key: [batch, key-value head, key, head_dim].
            value: [batch, key-value head, key, head_dim].
            mask: as the kernel that serves the model takes it.
            kwargs: further arguments of the kernel.

        Returns:
            z, [batch, query, head, head_dim], and the pattern where the kernel gives it.
        """
        has_rotary = hasattr(self, "q_rotary")
        query = (self.q_rotary if has_rotary else self.q)(query)
        key = _with_new(_for_each_head(key, query), _CALL.get())
        key = (self.k_rotary if has_rotary else self.k)(key)
        value = self.v(_for_each_head(value, query))
        mask = _added(mask, query, key, is_causal=getattr(attention, "is_causal", True))
        with _ShownSoftmax(self, value.dtype):
            z, pattern = self._eager(_Ungrouped(attention), query, key, value, mask, **kwargs)
        z = self.z(z.transpose(1, 2)).transpose(1, 2)
        gives_pattern = self._served_config._attn_implementation == "eager"
        return z, pattern if gives_pattern else None


def attach_heads(attentions: Iterable[Attention]) -> None:
    """Gives attention modules their points, as a child of the name "heads"."""
    AttentionInterface.register(_IMPLEMENTATION, _attend)
    watched: dict[int, PretrainedConfig] = {}
    for attention in attentions:
        config = attention.config
        if id(config) not in watched:
            watched[id(config)] = copy.deepcopy(config)
            watched[id(config)]._attn_implementation = _IMPLEMENTATION
        heads = Heads(attention, watched[id(config)])
        attention.add_module("heads", heads)
        attention.register_forward_pre_hook(heads.enter)
        attention.register_forward_hook(heads.leave, always_call=True)


def can_show_heads(attention: Attention) -> bool:
    """Whether a module is an attention that looks its kernel up and has an eager one."""
    forward = _forward(attention)
    return (
        "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names
        and _EAGER in forward.__globals__
        and hasattr(attention, "config")
        and not hasattr(attention, "heads")
    )


def _attend(
    attention: Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    heads = attention.heads
    assert isinstance(heads, Heads)
    return heads.attend(attention, query, key, value, attention_mask, **kwargs)


def _configure(attention: Attention, config: PretrainedConfig) -> None:
    # A module looks through all that it has before it takes an attribute.
    if attention.config is not config:
        attention.config = config


def _forward(module: Attention) -> Any:
    return inspect.unwrap(type(module).forward)


def _rotates_together(forward: Any) -> bool:
    """Whether a file's rotation is one call for the queries and the keys of whole heads."""
    function = forward.__globals__.get(_ROTARY)
    if function is None or _ROTARY not in forward.__code__.co_names:
        return False
    # Multi-head latent attention rotates the last part of its heads, and one key for all.
    is_latent = any("lora" in name for name in forward.__code__.co_names)
    return [*inspect.signature(function).parameters][:2] == ["q", "k"] and not is_latent


def _show_rotation(forward: Any) -> None:
    """Has a file's rotation show what it is given, where it is called by a module that is watched.

    The function is put in place once; in the calls of all others it is what it was.
    """
    rotated = forward.__globals__[_ROTARY]
    if hasattr(rotated, "is_shown"):
        return

    @wraps(rotated)
    def shown(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        call = _CALL.get()
        if call is None or call.heads is None or not any_watched((call.heads.q, call.heads.k)):
            return rotated(query, key, *args, **kwargs)
        return call.heads.rotate(call, rotated, query, key, *args, **kwargs)

    shown.is_shown = True  # type: ignore[attr-defined]
    forward.__globals__[_ROTARY] = shown


def _head_dim(attention: Attention) -> int:
    size: int = getattr(attention, "head_dim", None) or attention.head_size
    return size


def _widened(part: torch.Tensor, width: int) -> torch.Tensor:
    """Gives whole heads from views of their first part, in the same memory."""
    if part.shape[-1] == width:
        return part
    return part.as_strided((*part.shape[:-1], width), part.stride(), part.storage_offset())


def _for_each_head(grouped: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Gives keys or values of each query head, in memory of their own: a cache may own the others.

    Args:
        grouped: [batch, key-value head, key, head_dim].
        query: [batch, head, query, head_dim].
    """
    return grouped.repeat_interleave(query.shape[1] // grouped.shape[1], dim=1)


def _with_new(key: torch.Tensor, call: _Call | None) -> torch.Tensor:
    """Puts the keys that were shown before the rotation in the place of the last ones."""
    if call is None or call.rotated_key is None:
        return key
    num_new = call.rotated_key.shape[2]
    return torch.cat((key[:, :, : key.shape[2] - num_new], call.rotated_key), dim=2)


def _added(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, *, is_causal: bool
) -> torch.Tensor | None:
    """Gives a mask as it is added to scores: 0 or the lowest number, [..., query, key]."""
    sizes = (query.shape[2], key.shape[2])
    if mask is None:
        if not is_causal or sizes[0] == 1:
            return None
        whole = torch.ones(sizes, dtype=torch.bool, device=query.device)
        mask = whole.tril(sizes[1] - sizes[0])[None, None]
    if mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(mask, zero, torch.finfo(query.dtype).min)


class _Ungrouped:
    """An attention module for eager attention over keys and values of each query head."""

    num_key_value_groups = 1

    def __init__(self, attention: Attention) -> None:
        self._attention = attention

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)


class _ShownSoftmax(TorchFunctionMode):
    """Shows what goes into a softmax and what comes out of it."""

    def __init__(self, heads: Heads, dtype: torch.dtype) -> None:
        super().__init__()
        self._heads = heads
        self._dtype = dtype

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        if func not in _SOFTMAX:
            return func(*args, **(kwargs or {}))
        scores, *others = args
        pattern = func(self._heads.scores(scores), *others, **(kwargs or {}))
        # Some families take the softmax in float32 and go on in the model's type.
        return self._heads.pattern(pattern.to(self._dtype))
