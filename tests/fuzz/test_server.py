"""Whatever bytes come, a scheduler answers with a status of the error table, soon, and lives on."""

from __future__ import annotations

from random import Random
from typing import Any

import grpc
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu_proto.v1 import registry_service_pb2, scheduler_service_pb2
from insitu_proto.v1.scheduler_service_pb2 import SubmitSessionRequest
from insitu_wire.error_codec import from_rpc_error
from insitu_wire.errors import Error, Reason
from support.fuzzing import arbitrary, garbled, mutated, nested

from .conftest import Running, Target
from .settings import bounded

_METHODS = [
    *scheduler_service_pb2.DESCRIPTOR.services_by_name["SchedulerService"].methods,
    *registry_service_pb2.DESCRIPTOR.services_by_name["RegistryService"].methods,
]
_MAX_GROWTH = 300 * 1024**2


def ask(address: str, method: Any, message: bytes, timeout: float = 20.0) -> Reason | None:
    """Sends bytes as a request; gives why they are refused, and fails if nobody foresaw them."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    with grpc.insecure_channel(address) as channel:
        # Streams to and fro are alike on the wire to calls of one message.
        call = channel.stream_stream(path)(
            iter([message]), metadata=(("insitu-api-key", "fuzz"),), timeout=timeout
        )
        try:
            for number, _ in enumerate(call):
                if number == 20:
                    call.cancel()
                    return None
        except grpc.RpcError as rpc_error:
            return _foreseen(rpc_error, path)
    return None


def _foreseen(rpc_error: Any, path: str) -> Reason | None:
    if rpc_error.code() is grpc.StatusCode.CANCELLED:
        return None
    err: Error = from_rpc_error(rpc_error, address="the server")
    assert err.reason not in (Reason.INTERNAL, Reason.SERVER_UNREACHABLE), f"{path}: {err}"
    return err.reason


@bounded(120)
@given(random=st.randoms(use_true_random=False), method=st.sampled_from(_METHODS))
def test_requests_that_nobody_meant_are_answered(
    running: Running, random: Random, method: Any
) -> None:
    message_type = getattr(
        scheduler_service_pb2
        if hasattr(scheduler_service_pb2, method.input_type.name)
        else registry_service_pb2,
        method.input_type.name,
    )
    message = arbitrary(message_type(), random).SerializeToString()
    ask(running.address, method, garbled(message, random) if random.random() < 0.3 else message)


@bounded(120)
@given(random=st.randoms(use_true_random=False))
def test_sessions_with_something_changed_are_taken_or_refused(
    running: Running, target: Target, random: Random
) -> None:
    session = mutated(random.choice(target.seeds), random)
    request = SubmitSessionRequest(request_id=str(random.random()), session=session)
    message = request.SerializeToString()
    if random.random() < 0.2:
        message = garbled(message, random)
    ask(running.address, _METHODS[0], message)


def test_the_sessions_that_are_changed_are_taken_as_they_are(
    running: Running, target: Target
) -> None:
    for number, seed in enumerate(target.seeds):
        request = SubmitSessionRequest(request_id=f"seed-{number}", session=seed)
        assert ask(running.address, _METHODS[0], request.SerializeToString()) is None


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(b"\x12" + b"\x80\x80\x80\x01" + b"\x0a\x00" * 2**20, id="a million steps"),
        pytest.param(nested(40), id="nested"),
        pytest.param(nested(5000), id="nested far too deep"),
        pytest.param(b"\xff" * 1000, id="no message"),
        pytest.param(b"\x0a" + b"\xff\xff\xff\xff\x07", id="a length beyond the end"),
    ],
)
def test_what_is_meant_to_take_memory_is_refused_within_bounds(
    running: Running, message: bytes
) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    for _ in range(3):
        assert ask(running.address, _METHODS[0], message) is not None
    assert process.memory_info().rss - before < _MAX_GROWTH
