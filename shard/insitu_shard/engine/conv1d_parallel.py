"""Tensor parallelism for GPT-2, whose linear layers are `Conv1D`s that transformers can not split.

A `Conv1D`'s weight is [in, out], the transpose of a linear layer's, and that of the attention holds
queries, keys and values beside each other: each rank takes its heads of each of the three.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from insitu_shard.engine.transformers_internals import TensorParallelLayer, register_style

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

_BLOCK = "transformer.h.*."
_ATTENTION = {
    f"{_BLOCK}attn": "insitu_gpt2_heads",
    f"{_BLOCK}attn.c_attn": "insitu_conv1d_colwise_qkv",
    f"{_BLOCK}attn.c_proj": "insitu_conv1d_rowwise",
}
_REST = {
    "transformer.wte": "embedding_rowwise",
    "lm_head": "colwise_gather_output",
    f"{_BLOCK}mlp.c_fc": "insitu_conv1d_colwise",
    f"{_BLOCK}mlp.c_proj": "insitu_conv1d_rowwise",
}


def gpt2_rules(*, has_even_heads: bool) -> dict[str, str]:
    """Gives GPT-2's plan: names of modules and the style of each.

    Args:
        has_even_heads: whether each rank gets the same number of heads; else every rank has the
            whole attention.
    """
    _register_styles()
    return {**_REST, **_ATTENTION} if has_even_heads else _REST


def _register_styles() -> None:
    register_style("insitu_conv1d_colwise", _Colwise())
    register_style("insitu_conv1d_colwise_qkv", _Colwise(num_parts=3))
    register_style("insitu_conv1d_rowwise", _Rowwise())
    register_style("insitu_gpt2_heads", _Heads())


class _SumGradients(torch.autograd.Function):
    """Each rank's part of the outputs gives a part of the gradient of the whole input."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        whole = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> Any:
        return gradient, None


class _Conv1DStyle(TensorParallelLayer):
    def _split(self, module: torch.nn.Module, name: str, mesh: DeviceMesh, at: Placement) -> None:
        whole = module._parameters[name]
        assert whole is not None
        split = distribute_tensor(whole, mesh, [at], src_data_rank=None)
        module._parameters[name] = torch.nn.Parameter(split, requires_grad=whole.requires_grad)


class _Colwise(_Conv1DStyle):
    """Each rank gives its part of the output's features; of a packed output, of each part."""

    def __init__(self, num_parts: int = 1) -> None:
        self._num_parts = num_parts

    def shard_param(self, module: torch.nn.Module, name: str, mesh: DeviceMesh) -> None:
        dim = 0 if name == "bias" else 1
        packed = _StridedShard(dim=dim, split_factor=self._num_parts)
        self._split(module, name, mesh, Shard(dim) if self._num_parts == 1 else packed)

    def install_forward(self, module: torch.nn.Module, mesh: DeviceMesh) -> torch.nn.Module:
        group = mesh.get_group()

        def forward(whole: torch.Tensor) -> torch.Tensor:
            summed: Any = _SumGradients
            whole = summed.apply(whole, group)
            rows = whole.reshape(-1, whole.shape[-1])
            part = torch.addmm(_local(module, "bias"), rows, _local(module, "weight"))
            return part.view(*whole.shape[:-1], -1)

        module.forward = forward
        return module


class _Rowwise(_Conv1DStyle):
    """Each rank takes its part of the input's features; what they give is summed."""

    def shard_param(self, module: torch.nn.Module, name: str, mesh: DeviceMesh) -> None:
        self._split(module, name, mesh, Replicate() if name == "bias" else Shard(0))

    def install_forward(self, module: torch.nn.Module, mesh: DeviceMesh) -> torch.nn.Module:
        group = mesh.get_group()

        def forward(part: torch.Tensor) -> torch.Tensor:
            rows = part.reshape(-1, part.shape[-1])
            summed: Any = _Sum
            whole = summed.apply(rows @ _local(module, "weight"), group) + _local(module, "bias")
            result: torch.Tensor = whole.view(*part.shape[:-1], -1)
            return result

        module.forward = forward
        return module


class _Heads(TensorParallelLayer):
    """The attention cuts what `c_attn` gives into queries, keys and values of its rank's width."""

    def install_forward(self, module: torch.nn.Module, mesh: DeviceMesh) -> torch.nn.Module:
        attention: Any = module
        attention.split_size //= mesh.size()
        return module


def _local(module: torch.nn.Module, name: str) -> torch.Tensor:
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
