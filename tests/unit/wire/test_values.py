from __future__ import annotations

import pytest
import torch

from insitu_wire import torch_codec
from insitu_wire.dtypes import DTYPES_BY_NAME, itemsize, num_bytes
from insitu_wire.errors import InvalidTraceError

PLAIN = [
    None, True, False, 0, -(2**63) + 1, 2**63 - 1, 1.5, float("inf"), "text", ...,
    slice(None, 3, -1), [1, [2]], (1, (2, None)), {"a": 1, (1, 2): [3]}, torch.float32,
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_values_survive_the_wire(value: object) -> None:
    assert torch_codec.decode(torch_codec.encode(value)) == value


def test_a_bool_stays_a_bool() -> None:
    assert torch_codec.decode(torch_codec.encode(True)) is True


@pytest.mark.parametrize("name", sorted(DTYPES_BY_NAME))
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)], ids=str)
def test_tensors_of_every_dtype_survive_the_wire(name: str, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(6)[: 6 if shape else 1].to(getattr(torch, name))
    tensor = tensor[: torch.Size(shape).numel()].reshape(shape)
    encoded = torch_codec.encode(tensor)
    decoded = torch_codec.decode(encoded)
    assert isinstance(decoded, torch.Tensor)
    assert decoded.dtype is tensor.dtype
    assert torch.equal(decoded, tensor)
    assert num_bytes(encoded.tensor) == len(encoded.tensor.data)
    assert itemsize(encoded.tensor.dtype) == tensor.element_size()


def test_a_view_is_encoded_as_it_looks() -> None:
    view = torch.arange(12).reshape(3, 4).T[1:, ::2]
    assert torch.equal(torch_codec.decode(torch_codec.encode(view)), view)


def test_saved_tensors_lie_one_after_another_in_the_data() -> None:
    saved = {"a": torch.arange(3), "b": (torch.ones(2, dtype=torch.bfloat16), "text")}
    encoded, tensors = torch_codec.encode_saved(saved)
    data = bytearray(b"".join(torch_codec.tensor_data(tensor) for tensor in tensors))
    decoded = torch_codec.decode(encoded, data=data)
    assert torch.equal(decoded["a"], saved["a"])
    assert torch.equal(decoded["b"][0], saved["b"][0])
    assert decoded["b"][1] == "text"


def test_a_list_inside_a_dict_key_is_refused() -> None:
    encoded = torch_codec.encode({(1, 2): 3})
    encoded.dict.items[0].key.tuple.items[0].list.SetInParent()
    with pytest.raises(InvalidTraceError, match="key of a dict"):
        torch_codec.decode(encoded)


@pytest.mark.parametrize(
    "value", [object(), 2**64, {1, 2}, b"bytes"], ids=["object", "too large", "set", "bytes"]
)
def test_what_has_no_encoding_is_refused_by_its_type(value: object) -> None:
    with pytest.raises(InvalidTraceError, match=type(value).__name__):
        torch_codec.encode(value)
