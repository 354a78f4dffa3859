"""Finds out shapes while a session is recorded, by running operations on the meta device."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from insitu_wire.errors import Reason, error
from insitu_wire.operations import last_word
from insitu_wire.torch_codec import dtype_from_pb

if TYPE_CHECKING:
    from collections.abc import Callable

    from insitu_proto.v1 import model_pb2
    from insitu_wire.errors import Location


class Unknown:
    """Stands for a value whose shape is only known when it is there."""


_Tensor = torch.Tensor
KNOWN_WITHOUT_RUNNING: dict[Callable[..., Any], Callable[..., Any]] = {
    _Tensor.shape.__get__: lambda meta: meta.shape,  # type: ignore[attr-defined]
    _Tensor.dtype.__get__: lambda meta: meta.dtype,  # type: ignore[attr-defined]
    _Tensor.ndim.__get__: lambda meta: meta.ndim,  # type: ignore[attr-defined]
    # Wherever a session names a device, it means the one that the model is on.
    _Tensor.device.__get__: lambda _: torch.device("cpu"),
    _Tensor.size: _Tensor.size,
    _Tensor.dim: _Tensor.dim,
    _Tensor.numel: _Tensor.numel,
    _Tensor.nelement: _Tensor.numel,
    _Tensor.element_size: _Tensor.element_size,
    _Tensor.is_floating_point: _Tensor.is_floating_point,
    _Tensor.is_complex: _Tensor.is_complex,
    torch.is_floating_point: _Tensor.is_floating_point,
    torch.numel: _Tensor.numel,
    _Tensor.__len__: _Tensor.__len__,
    _Tensor.ndimension: _Tensor.ndimension,
    _Tensor.nbytes.__get__: lambda meta: meta.nbytes,  # type: ignore[attr-defined]
    _Tensor.itemsize.__get__: lambda meta: meta.itemsize,  # type: ignore[attr-defined]
    _Tensor.layout.__get__: lambda meta: meta.layout,  # type: ignore[attr-defined]
    _Tensor.stride: _Tensor.stride,
    _Tensor.is_contiguous: _Tensor.is_contiguous,
    # Code that asks is told what holds for a tensor of a session before it runs.
    _Tensor.requires_grad.__get__: lambda _: False,  # type: ignore[attr-defined]
    _Tensor.is_cuda.__get__: lambda _: False,  # type: ignore[attr-defined]
}
"""What a shape and a dtype tell without anything being recorded."""

# What torch says when a result's shape depends on elements that a meta tensor does not have.
_NEEDS_ELEMENTS = re.compile(r"meta|data.dependent|unbacked|no data", re.IGNORECASE)
_MISFIT = re.compile(r"shape|size|dimension|broadcast|expand|must match|index", re.IGNORECASE)


def infer(
    function: Callable[..., Any],
    name: str,
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    location: Location,
) -> Any:
    """Gives the structure of an operation's result, with meta tensors for its tensors.

    Args:
        function: the operation.
        name: its name.
        arguments: positional and keyword arguments; tensors on the meta device, `Unknown` for
            those whose shape is not known.
        location: the user's line.

    Raises:
        InvalidTraceError: SHAPE_MISMATCH or MALFORMED_SESSION, if it can not run on these.
    """
    args, kwargs = arguments
    if _has_unknown(arguments):
        return _unknown(name, args, kwargs)
    if name in _WITHOUT_ELEMENTS:
        return _WITHOUT_ELEMENTS[name](*args, **kwargs)
    try:
        return function(*args, **kwargs)
    except NotImplementedError:
        return _unknown(name, args, kwargs)
    except (RuntimeError, IndexError, ValueError, TypeError) as exception:
        text = str(exception)
        if _NEEDS_ELEMENTS.search(text):
            return _unknown(name, args, kwargs)
        is_misfit = not isinstance(exception, TypeError) and _MISFIT.search(text)
        raise error(
            Reason.SHAPE_MISMATCH if is_misfit else Reason.MALFORMED_SESSION,
            f"{name} can not run on ({_shapes(args, kwargs)}): {text}",
            location=location,
            operation=name,
        ) from None


_PAIRS: dict[str, Callable[[Any], Any]] = {
    "cummax": torch.return_types.cummax,
    "cummin": torch.return_types.cummin,
    "kthvalue": torch.return_types.kthvalue,
    "mode": torch.return_types.mode,
    "sort": torch.return_types.sort,
    "topk": torch.return_types.topk,
}
_PAIRS_ALONG_A_DIMENSION: dict[str, Callable[[Any], Any]] = {
    "max": torch.return_types.max,
    "median": torch.return_types.median,
    "min": torch.return_types.min,
    "nanmedian": torch.return_types.nanmedian,
}


def _unknown(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Stands for a result of unknown shape: a tuple of such, where it is known to be a tuple."""
    word = last_word(name)
    if word in _PAIRS:
        return _PAIRS[word]((Unknown(), Unknown()))
    if word in _PAIRS_ALONG_A_DIMENSION and isinstance([*args[1:], kwargs.get("dim")][0], int):
        return _PAIRS_ALONG_A_DIMENSION[word]((Unknown(), Unknown()))
    gives_places = (word == "where" and len(args) == 1) or kwargs.get("as_tuple") is True
    if gives_places and args and isinstance(args[0], torch.Tensor):
        return tuple(Unknown() for _ in range(max(args[0].ndim, 1)))
    return Unknown()


def _has_unknown(value: Any) -> bool:
    # By hand: pytree takes four times as long, which is felt in every operation.
    if isinstance(value, tuple | list):
        return any(map(_has_unknown, value))
    if isinstance(value, dict):
        return any(map(_has_unknown, value.values()))
    return isinstance(value, Unknown)


def _moved(meta: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Stands for Tensor.to: no device but the model's is meant, so only the dtype changes."""
    candidates = [*args, *kwargs.values()]
    dtypes = [part.dtype if isinstance(part, torch.Tensor) else part for part in candidates]
    dtype = next((part for part in dtypes if isinstance(part, torch.dtype)), meta.dtype)
    return meta.to(dtype)


_WITHOUT_ELEMENTS: dict[str, Callable[..., torch.Tensor]] = {
    "torch.Tensor.item": lambda meta: torch.empty((), dtype=meta.dtype, device="meta"),
    "torch.Tensor.to": _moved,
    "torch.Tensor.cpu": _moved,
}


def describe(value: Any) -> str:
    """Describes a value for an error message, such as "float32[1, 10, 576]"."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(describe, value))})"
    return repr(value)


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    parts = [describe(leaf) for leaf in args]
    return ", ".join(parts + [f"{key}={describe(leaf)}" for key, leaf in kwargs.items()])


def check_fits(expected: Any, value: Any, what: str, location: Location) -> None:
    """Refuses to write a value to a place that takes another shape; where both are known.

    Args:
        expected: what stands there, with meta tensors for its tensors.
        value: what is to stand there; tensors on the meta device.
        what: the place, for the message.
        location: the user's line.

    Raises:
        InvalidTraceError: SHAPE_MISMATCH.
    """
    if isinstance(expected, torch.Tensor) and not isinstance(value, torch.Tensor | Unknown):
        actual = f"a {type(value).__name__}"
    elif isinstance(expected, torch.Tensor) and isinstance(value, torch.Tensor):
        if expected.shape == value.shape:
            return
        actual = f"a tensor of {list(value.shape)}"
    elif isinstance(expected, tuple | list) and isinstance(value, tuple | list):
        if len(expected) == len(value):
            for index, (old, new) in enumerate(zip(expected, value, strict=True)):
                check_fits(old, new, f"{what}[{index}]", location)
            return
        actual = f"{len(value)} items"
    else:
        return
    wanted = describe(expected)
    raise error(
        Reason.SHAPE_MISMATCH,
        f"{what} is {wanted} and can not be replaced by {actual}; write the same structure that "
        "reading it gives, or a part with [...] = ...",
        location=location,
        expected=wanted,
        actual=actual,
    )


def applied(module: model_pb2.Module, args: tuple[Any, ...]) -> Any:
    """Gives what a module returns for arguments of the sizes of a forward pass, if it can be known.

    Args:
        module: its description.
        args: positional arguments; tensors on the meta device.
    """
    specs = module.args.tuple.items
    if len(args) != 1 or len(specs) != 1 or module.kwargs.dict.keys:
        return Unknown()
    if not isinstance(args[0], torch.Tensor) or not specs[0].HasField("tensor"):
        return Unknown()
    sizes = _sizes(specs[0].tensor, list(args[0].shape))
    return structure(module.output, *sizes) if sizes else Unknown()


def _sizes(spec: model_pb2.TensorSpec, shape: list[int]) -> tuple[int, int] | None:
    """Finds for how many rows and tokens a tensor has a shape."""
    rows, length = 1, 1
    if len(spec.dimensions) != len(shape):
        return None
    for dimension, size in zip(spec.dimensions, shape, strict=True):
        powers = (dimension.batch_power, dimension.length_power)
        if powers == (1, 0):
            rows = size // dimension.factor
        elif powers == (0, 1):
            length = size // dimension.factor
        elif powers != (0, 0) or dimension.factor != size:
            return None
    return rows, length


def structure(spec: model_pb2.StructureSpec, num_rows: int, length: int) -> Any:
    """Gives what a module takes or returns for a batch, with meta tensors for its tensors."""
    match spec.WhichOneof("kind"):
        case "tensor":
            shape = [
                part.factor * num_rows**part.batch_power * length**part.length_power
                for part in spec.tensor.dimensions
            ]
            return torch.empty(shape, dtype=dtype_from_pb(spec.tensor.dtype), device="meta")
        case "tuple":
            return tuple(structure(item, num_rows, length) for item in spec.tuple.items)
        case "list":
            return [structure(item, num_rows, length) for item in spec.list.items]
        case "dict":
            items = [structure(item, num_rows, length) for item in spec.dict.items]
            return dict(zip(spec.dict.keys, items, strict=True))
        case "opaque" if spec.opaque.class_name == "NoneType":
            return None
    return Unknown()
