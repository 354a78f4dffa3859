from __future__ import annotations

import torch

from insitu_wire.content_hash import content_hash, is_content_hash
from insitu_wire.torch_codec import tensor_data, tensor_spec


def _hash(tensor: torch.Tensor) -> str:
    return content_hash(tensor_spec(tensor), tensor_data(tensor))


def test_the_form_of_a_content_hash_stays_what_it_is() -> None:
    # Servers keep uploads under these names: another form would lose them all.
    assert _hash(torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)) == (
        "41ac633224ae159c74a94c1d2d87c1ad9b6438b33da56ea4fc86e7ad9f342bfc"
    )


def test_type_shape_and_elements_make_the_hash() -> None:
    zeros = torch.zeros(2, 3)
    others = [zeros.reshape(3, 2), zeros.int(), zeros + 1, zeros.reshape(-1)]
    assert len({_hash(tensor) for tensor in (zeros, *others)}) == 5
    assert _hash(zeros) == _hash(torch.zeros(3, 2).T)


def test_only_64_lowercase_hexadecimal_digits_can_be_a_hash() -> None:
    assert is_content_hash(_hash(torch.zeros(1)))
    assert not any(map(is_content_hash, ("", "0" * 63, "0" * 65, "A" * 64, "../" + "0" * 61)))
