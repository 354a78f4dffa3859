"""A shard group keeps the uploads that sessions hold, and the last used of the others."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import torch

from insitu_proto.v1.tensor_pb2 import Dtype, Tensor
from insitu_shard.upload_cache import UploadCache, receive_upload, session_tensors
from insitu_wire.content_hash import content_hash
from insitu_wire.errors import CapacityError, InternalError, SessionStateError

CPU = torch.device("cpu")


def spec(name: str, size: int = 4) -> Tensor:
    return Tensor(dtype=Dtype.DTYPE_UINT8, shape=[size], content_hash=name)


def store(cache: UploadCache, name: str, size: int = 4) -> list[str]:
    dropped = cache.make_room(size)
    cache.tensors[name] = torch.zeros(size, dtype=torch.uint8)
    return dropped


def test_what_is_held_once_is_found_the_next_time() -> None:
    cache = UploadCache(10)
    assert cache.hold("s1", [spec("a"), spec("b"), spec("a")]) == ["a", "b"]
    store(cache, "a")
    store(cache, "b")
    cache.release("s1")
    assert cache.hold("s2", [spec("a")]) == []
    assert cache.num_bytes == 8


def test_the_least_recently_used_makes_room_and_what_is_held_stays() -> None:
    cache = UploadCache(12)
    for name in "abc":
        cache.hold(name, [spec(name)])
        store(cache, name)
        cache.release(name)
    cache.hold("s", [spec("a"), spec("d")])
    assert store(cache, "d") == ["b"]
    assert list(cache.tensors) == ["c", "a", "d"]
    cache.hold("t", [spec("e")])
    assert store(cache, "e") == ["c"]


def test_a_session_that_brings_more_than_fits_is_refused() -> None:
    cache = UploadCache(10)
    with pytest.raises(CapacityError, match=r"11 bytes, and .* at most 10"):
        cache.hold("s", [spec("a", 6), spec("b", 5)])
    assert cache.hold("s", [spec("a", 10)]) == ["a"]


def test_a_session_that_was_never_released_gives_way() -> None:
    cache = UploadCache(10)
    cache.hold("forgotten", [spec("a", 6)])
    store(cache, "a", 6)
    cache.hold("s", [spec("b", 4)])
    assert store(cache, "b", 4) == []
    cache.hold("t", [spec("c", 6)])
    assert store(cache, "c", 6) == ["a"]


def test_a_sessions_list_has_small_tensors_inside_and_large_ones_by_hash() -> None:
    small = Tensor(dtype=Dtype.DTYPE_INT8, shape=[2], data=b"\1\2")
    kept = torch.ones(4)
    tensors = session_tensors([small, spec("a")], {"a": kept}, device=CPU)
    assert tensors[0].tolist() == [1, 2]
    assert tensors[1] is kept
    with pytest.raises(SessionStateError, match="lacks the tensor with content hash b"):
        session_tensors([spec("b")], {"a": kept}, device=CPU)


async def _chunks(*data: bytes) -> AsyncIterator[bytes]:
    for chunk in data:
        yield chunk


async def test_elements_are_checked_against_their_hash() -> None:
    tensor = spec("")
    tensor.content_hash = content_hash(tensor, b"abcd")
    assert await receive_upload(tensor, _chunks(b"ab", b"cd")) == b"abcd"
    for wrong in ((b"abc",), (b"abcd", b"e"), (b"abce",), ()):
        with pytest.raises(InternalError, match="was damaged on the way"):
            await receive_upload(tensor, _chunks(*wrong))
