"""Where in a forward pass a module is called: before the decoder layers, in one, or after them.

A pass has parts: 0 before the first block, k + 1 inside block k, and N + 1 after the last of N.
Moments count them twice: moment 2p is inside part p, and 2p + 1 at its end, where the hidden state
goes from block to block and rows may come and go.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from insitu_shard.compiler.prefixes import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from insitu_proto.v1 import model_pb2

_ITEM_BYTES = 4
# What an opaque value of these classes shows is the same for every row.
_ROWLESS = {"NoneType", "bool", "int", "float", "str"}


@dataclass(frozen=True, slots=True)
class Outline:
    """The order of a model's modules in a forward pass, and the sizes of what they give."""

    blocks: Sequence[str] = ()
    """Paths of the decoder layers, in the order of their calls; empty if rows can not fork."""
    head_path: str = ""
    """Path of the module that gives the logits; empty if it is not known."""
    modules: Mapping[str, model_pb2.Module] = field(default_factory=dict)
    block_bytes: int = 0
    """Estimate of the bytes that a block takes for each token while it runs."""
    shares_prefixes: bool = False
    """Whether lanes may leave their first positions to others."""
    _parts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    _sizes: dict[tuple[str, bool], list[tuple[int, int]]] = field(default_factory=dict)
    _shown: dict[tuple[str, bool], bool] = field(default_factory=dict)

    @staticmethod
    def of(description: model_pb2.ModelDescription) -> Outline:
        """Reads a model's description."""
        modules = {module.path: module for module in description.modules}
        called = sorted(
            (module for module in modules.values() if module.call_order),
            key=lambda module: module.call_order,
        )
        blocks = tuple(module.path for module in called if module.is_block)
        parts = _parts([module.path for module in called], blocks)
        if not blocks or parts is None or not all(_is_hidden(modules[path]) for path in blocks):
            return Outline(modules=modules)
        head_path = _head_path(called, parts, len(blocks))
        # What is inside of modules is there only for who looks at it.
        own = (module for module in called if not module.is_point)
        inside = (module for module in own if _is_below(module.path, blocks[0]))
        block_bytes = sum(size for at in inside for size, _ in _sizes_per_token(at.output))
        family = json.loads(description.config_json or "{}").get("model_type")
        return Outline(blocks, head_path, modules, block_bytes, family in FAMILIES, parts)

    @property
    def last_moment(self) -> int:
        """The moment after which a pass is over."""
        return 2 * (len(self.blocks) + 1)

    def moment(self, path: str, *, is_input: bool) -> int | None:
        """Gives the moment of a module's first call, or of its end; None if it is not known."""
        if path not in self._parts:
            return None
        entered, left = self._parts[path]
        if is_input:
            return 2 * entered
        return 2 * left + (path in self.blocks)

    def fork_moment(self, path: str, *, is_input: bool) -> int | None:
        """Gives the last moment at which rows can part before a write is made."""
        moment = self.moment(path, is_input=is_input)
        if moment is None or moment % 2:
            return moment
        return max(moment - 1, 0)

    def is_in_block(self, path: str) -> bool:
        """Whether a module is a block, or in one."""
        entered, left = self._parts.get(path, (0, 0))
        return 0 < entered == left <= len(self.blocks)

    def is_after_blocks(self, path: str) -> bool:
        """Whether a module is called after the last block alone."""
        return self._parts.get(path, (0, 0))[0] > len(self.blocks)

    def is_after_head(self, path: str, *, is_input: bool) -> bool:
        """Whether a moment comes after the head has given the logits."""
        return not is_input and path != self.head_path and _is_below(self.head_path, path)

    def structures(self, path: str, *, is_input: bool) -> list[model_pb2.StructureSpec]:
        """Gives what is known of a module's result, or of its arguments, one by one."""
        module = self.modules[path]
        if not is_input:
            return [module.output]
        return [*module.args.tuple.items, *module.kwargs.dict.items]

    def shows_rows(self, path: str, *, is_input: bool) -> bool:
        """Whether all that is at a boundary is known to be a row's own, or the same for all."""
        key = (path, is_input)
        if key not in self._shown:
            structures = self.structures(path, is_input=is_input)
            self._shown[key] = all(map(_shows_rows, structures))
        return self._shown[key]

    def output_bytes(self, path: str, *, is_input: bool, length: int = 1) -> int:
        """Estimates the bytes of a module's result, or of its first argument, for each token.

        Args:
            path: the module's.
            is_input: whether its first argument is meant.
            length: tokens in a row: what is between pairs of them has so many for each.
        """
        key = (path, is_input)
        if key not in self._sizes:
            structures = self.structures(path, is_input=is_input)[:1]
            self._sizes[key] = [size for at in structures for size in _sizes_per_token(at)]
        return sum(elements * length**power for elements, power in self._sizes[key])


def has_rows(structure: model_pb2.StructureSpec) -> bool:
    """Whether every tensor in a value has rows of its own for each row of the batch."""
    tensors = list(_tensors(structure))
    return bool(tensors) and all(
        tensor is not None and any(size.batch_power for size in tensor.dimensions)
        for tensor in tensors
    )


def _shows_rows(structure: model_pb2.StructureSpec) -> bool:
    """Whether all that is in a value is known to be either a row's own or the same for all."""
    return all(tensor is not None for tensor in _tensors(structure))


def _tensors(structure: model_pb2.StructureSpec) -> list[model_pb2.TensorSpec | None]:
    """Gives the tensors in a value; None for what may be one that nothing is known of."""
    match structure.WhichOneof("kind"):
        case "tensor":
            return [structure.tensor]
        case "tuple" | "list" | "dict" as kind:
            items = getattr(structure, kind).items
            return [tensor for item in items for tensor in _tensors(item)]
        case "opaque" if structure.opaque.class_name in _ROWLESS:
            return []
    return [None]


def _sizes_per_token(structure: model_pb2.StructureSpec) -> list[tuple[int, int]]:
    """Gives the bytes of each tensor for a token, and the power of the length in them."""
    sizes = []
    for tensor in _tensors(structure):
        if tensor is not None and any(size.batch_power for size in tensor.dimensions):
            elements = prod(size.factor for size in tensor.dimensions)
            num_lengths = sum(size.length_power for size in tensor.dimensions)
            sizes.append((elements * _ITEM_BYTES, max(num_lengths - 1, 0)))
    return sizes


def _parts(called: Sequence[str], blocks: Sequence[str]) -> dict[str, tuple[int, int]] | None:
    """Gives in which part each module is entered and left; None if blocks do not just follow."""
    parts: dict[str, tuple[int, int]] = {}
    after = len(blocks) + 1
    part = 0
    numbers = {block: number for number, block in enumerate(blocks, 1)}
    above = {block[:end] for block in blocks for end in range(len(block)) if block[end] == "."}
    for path in called:
        part = numbers.get(path, part)
        if not path or path in above:
            parts[path] = (0, after)
        elif part and _is_below(path, blocks[part - 1]):
            parts[path] = (part, part)
        elif part in (0, len(blocks)):
            parts[path] = (0, 0) if not part else (after, after)
        else:
            return None
    return parts


def _is_below(path: str, ancestor: str) -> bool:
    return path == ancestor or not ancestor or path.startswith(f"{ancestor}.")


def _is_hidden(block: model_pb2.Module) -> bool:
    """Whether a block takes and gives the hidden state, [batch, length, hidden]."""
    first = block.args.tuple.items[0] if block.args.tuple.items else None
    return all(
        structure is not None
        and structure.WhichOneof("kind") == "tensor"
        and [(size.batch_power, size.length_power) for size in structure.tensor.dimensions]
        == [(1, 0), (0, 1), (0, 0)]
        for structure in (block.output, first)
    )


def _head_path(
    called: Sequence[model_pb2.Module], parts: Mapping[str, tuple[int, int]], num_blocks: int
) -> str:
    """Finds the last module of all that takes the hidden state and gives the logits."""
    for module in reversed(called):
        is_leaf = not any(_is_below(other.path, module.path) for other in called if other != module)
        if is_leaf and parts[module.path] == (num_blocks + 1, num_blocks + 1):
            gives_tensor = module.output.WhichOneof("kind") == "tensor"
            return module.path if gives_tensor and len(module.args.tuple.items) == 1 else ""
    return ""
