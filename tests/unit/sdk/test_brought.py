"""The user's own tensors are in a session once, however they are used."""

from __future__ import annotations

import pytest
import torch

from insitu._brought import BroughtTensors
from insitu_proto.v1.session_pb2 import Session
from insitu_wire.errors import InvalidTraceError, ValueNotAvailableError
from insitu_wire.limits import MIN_UPLOAD_BYTES

LARGE = MIN_UPLOAD_BYTES // 4


@pytest.fixture
def session() -> Session:
    return Session()


@pytest.fixture
def brought(session: Session) -> BroughtTensors:
    return BroughtTensors(session.tensors)


def test_a_large_parameter_is_referred_to_once(session: Session, brought: BroughtTensors) -> None:
    weight = torch.nn.Parameter(torch.ones(2, LARGE))
    assert [brought.add(weight), brought.add(weight.data), brought.add(weight.T.T)] == [0, 0, 0]
    assert brought.add(weight.T) == 1
    assert [list(spec.shape) for spec in session.tensors] == [[2, LARGE], [LARGE, 2]]
    assert not any(spec.data or spec.content_hash for spec in session.tensors)
    assert brought.large()[0].data_ptr() == weight.data_ptr()
    assert not brought.large()[0].requires_grad


def test_small_tensors_of_one_content_are_inside_once(
    session: Session, brought: BroughtTensors
) -> None:
    indices = [brought.add(tensor) for tensor in (torch.ones(3), torch.ones(3), torch.zeros(3))]
    assert indices == [0, 0, 1]
    assert [len(spec.data) for spec in session.tensors] == [12, 12]
    assert brought.large() == {}


def test_a_small_tensor_is_what_it_was_when_it_was_used(brought: BroughtTensors) -> None:
    running = torch.zeros(3)
    first = brought.add(running)
    running += 1
    assert brought.add(running) != first


def test_a_large_tensor_that_was_changed_after_its_use_is_refused(brought: BroughtTensors) -> None:
    weight = torch.zeros(LARGE)
    brought.add(weight)
    weight += 1
    with pytest.raises(InvalidTraceError, match=r"was changed .* \.clone\(\)"):
        brought.large()


def test_a_changed_clone_is_another_tensor(brought: BroughtTensors) -> None:
    weight = torch.zeros(LARGE)
    assert brought.add(weight.clone()) == 0
    weight += 1
    assert brought.add(weight.clone()) == 1


def test_memory_of_a_large_tensor_is_not_given_to_another(brought: BroughtTensors) -> None:
    indices = [brought.add(torch.full((LARGE,), float(value))) for value in range(20)]
    assert indices == list(range(20))
    assert [float(tensor[0]) for tensor in brought.large().values()] == list(range(20))


def test_inference_tensors_are_copied(brought: BroughtTensors) -> None:
    with torch.inference_mode():
        weight = torch.zeros(LARGE)
        brought.add(weight)
        weight += 1
    assert float(brought.large()[0].sum()) == 0


def test_a_tensor_that_no_session_can_hold_is_refused(brought: BroughtTensors) -> None:
    with pytest.raises(ValueNotAvailableError, match="meta device"):
        brought.add(torch.empty(3, device="meta"))
    with pytest.raises(InvalidTraceError, match=r"torch\.sparse_coo.* \.to_dense"):
        brought.add(torch.eye(3).to_sparse())
    with pytest.raises(InvalidTraceError, match="float8_e4m3fn can not be part of a session"):
        brought.add(torch.zeros(LARGE * 4).to(torch.float8_e4m3fn))
